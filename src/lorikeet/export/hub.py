"""`publish`: a certified run -> one repository on the Hugging Face hub.

    publish(Path("runs/mine"), repo="me/mine")

One repository holds everything, so that one name serves every program: the merged weights and the GGUF files at its root,
where transformers, llama.cpp and Ollama look, the adapter in `adapter/`, the card on top. Nothing else of the run leaves
the machine: no data, no reports, no checkpoints, no path.

Files are sent one after another and appear together in one commit. What has arrived is not sent again, so a killed upload
is resumed by running it again. It does not know how files travel: `huggingface_hub` does, by chunks (Xet) where the hub
offers that, else by LFS.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorikeet.card import card, public_base
from lorikeet.errors import HubError, InputError, LorikeetError, causes
from lorikeet.export.modelfile import NAME as MODELFILE
from lorikeet.export.modelfile import parse, repository_files
from lorikeet.files import sha256_file
from lorikeet.run import RunFolder

if TYPE_CHECKING:
    from huggingface_hub import HfApi

LONGEST_WAIT_S = 60
"""The hub may keep a request waiting, or ask to come back, for so long; after that the user is told."""

LARGE = (".safetensors", ".gguf")
"""Files that are sent one by one before the commit; the others travel with it."""

PATH_KEYS = ("_name_or_path", "_model_name_or_path", "name_or_path", "base_model_name_or_path")
"""Where Hugging Face's configurations keep the name of the folder that a model was read from."""


@dataclass(frozen=True, slots=True)
class Upload:
    """One file of the repository."""

    name: str
    """Its path in the repository."""
    content: Path | bytes
    sha256: str = ""
    """Of a file that is sent as it is; '' for text made here."""

    @property
    def size_bytes(self) -> int:
        """How long it is."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size


def publish(root: Path, *, repo: str, private: bool = False, formats: Sequence[str], dry_run: bool = False) -> str:
    """Upload a run to the repository `repo` (`owner/name`, or `name` of one's own) and return its URL; '' for a dry run.

    `formats` are those of adapter, merged and gguf. Raises InputError without a passing certificate for exactly the files
    that are here, for a bad name and for a token that is missing or may not write; HubError if the hub fails.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, though not marked so

    run = RunFolder.open(root)
    certificate = run.certificate()
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError(f"--repo {repo!r} is no name of a repository; give owner/name, as in me/my-model") from error
    files = plan(run, certificate["artefacts"], repo=repo, formats=formats)
    _list(files, repo)
    if manifest_verdict(run) not in {"", "ship"}:
        _say("warning: the proof of this run says do not ship; the card's first line says so too")
    if dry_run:
        return ""
    with _hub_session(repo) as api:
        repo = _own_name(api, repo)
        return _send(api, repo, plan(run, certificate["artefacts"], repo=repo, formats=formats), private=private)


def plan(run: RunFolder, certified: dict[str, dict[str, str]], *, repo: str, formats: Sequence[str]) -> list[Upload]:
    """Return what the repository will hold. `certified` are the artefacts' hashes by file.

    Raises InputError for a format that the run or its certificate does not have.
    """
    files = [Upload("README.md", card(run, repo=repo).encode())]
    wanted = [name for name in certified if name in formats or (name.startswith("gguf/") and "gguf" in formats)]
    for kind in formats:
        if not any(name == kind or name.startswith(f"{kind}/") for name in wanted):
            raise InputError(f"{run.root} has no certified {kind}; make it with: lorikeet export {run.root}")
    base = public_base(run.manifest()["base"])
    for artefact in wanted:
        for file, digest in certified[artefact].items():
            name = _name_in_repository(artefact, file, repo)
            source = run.root / artefact
            path = source if source.is_file() else source / file
            files.append(_without_paths(Upload(name, path, digest), base["hub"] or base["name"]))
    about = run.manifest().get("modelfile", {})
    if "gguf" in formats and about.get("complete"):
        path = run.root / MODELFILE
        if not path.is_file() or sha256_file(path) != about["sha256"]:
            raise InputError(f"{path} is not the one that export wrote; make it again with: lorikeet export {run.root}")
        text = path.read_text(encoding="utf-8")
        artefact = parse(text).source.removeprefix("./")
        gguf = _name_in_repository(artefact, artefact.rpartition("/")[2], repo)
        files += [Upload(name, part.encode()) for name, part in repository_files(text, gguf=gguf).items()]
    return files


def manifest_verdict(run: RunFolder) -> str:
    """Return the verdict of the run's last proof, '' if it has none."""
    return str(run.manifest().get("proof", {}).get("verdict", ""))


def _name_in_repository(artefact: str, file: str, repo: str) -> str:
    """Return where a file goes: merged and GGUF to the root, a GGUF under the name that programs read its type from."""
    if artefact.startswith("gguf/"):
        quant = file.removeprefix("model-").removesuffix(".gguf")
        return f"{repo.rpartition('/')[2]}-{quant.upper()}.gguf"
    return f"adapter/{file}" if artefact == "adapter" else file


def _without_paths(file: Upload, base: str) -> Upload:
    """Return a configuration without the folder that the base was read from; any other file as it is."""
    if not file.name.endswith("config.json") or not isinstance(file.content, Path):
        return file
    config: dict[str, Any] = json.loads(file.content.read_text(encoding="utf-8"))
    found = [key for key in PATH_KEYS if key in config]
    if not found:
        return file
    return Upload(file.name, (json.dumps(config | dict.fromkeys(found, base), indent=2) + "\n").encode())


def _list(files: list[Upload], repo: str) -> None:
    for file in files:
        print(f"{file.size_bytes:>14,}  {file.name}")
    print(f"{sum(file.size_bytes for file in files):>14,}  bytes in {len(files)} files, for {repo}")


def _own_name(api: HfApi, repo: str) -> str:
    """Return `owner/name`; the owner is the token's if none is given. This is the first request: it proves the token."""
    user = str(api.whoami()["name"])
    return repo if "/" in repo else f"{user}/{repo}"


def _send(api: HfApi, repo: str, files: list[Upload], *, private: bool) -> str:
    """Make the repository, send what it lacks, commit, and return its URL."""
    from huggingface_hub import CommitOperationAdd, constants

    url = str(api.create_repo(repo, private=private or None, exist_ok=True))
    if private and not api.model_info(repo).private:
        raise InputError(f"{repo} is there already and public; make it private on the hub, or choose another --repo")
    present = _present(api, repo)
    ours = {file.name for file in files}
    if stale := [name for name in present if name not in ours and name.endswith(LARGE)]:
        _say(f"warning: {repo} also holds {', '.join(stale)}, which this run's certificate is not about")
    missing = [file for file in files if not file.sha256 or present.get(file.name) != file.sha256]
    if len(missing) < len(files):
        _say(f"{len(files) - len(missing)} files are there already")
    operations = []
    # The client goes by what is installed, not by what this hub offers; `_hub_session` puts it back.
    constants.HF_HUB_DISABLE_XET = constants.HF_HUB_DISABLE_XET or not _offers_xet(api, repo)
    for file in missing:
        operation = CommitOperationAdd(file.name, file.content)
        operations.append(operation)
        if file.name.endswith(LARGE):
            began = time.monotonic()
            api.preupload_lfs_files(repo, [operation], free_memory=False)
            _say(f"{file.name}: {file.size_bytes / 1e6:,.1f} MB in {time.monotonic() - began:.1f} s")
    api.create_commit(repo, operations, commit_message="Publish with Lorikeet")
    return url


def _present(api: HfApi, repo: str) -> dict[str, str]:
    """Return the sha256 of the large files that the repository has, by path."""
    found = {file.path: getattr(file, "lfs", None) for file in api.list_repo_tree(repo, recursive=True)}
    return {path: str(lfs.sha256) for path, lfs in found.items() if lfs}


@contextmanager
def _hub_session(repo: str) -> Iterator[HfApi]:
    """Give a client that waits no longer than a person would; whatever the hub answers becomes one line."""
    from huggingface_hub import HfApi, close_session, constants, get_session, get_token
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars  # type: ignore[attr-defined]

    if not get_token():
        raise InputError("there is no token for the hub; log in with: hf auth login, or set HF_TOKEN")
    session = get_session()
    session.timeout = LONGEST_WAIT_S
    session.event_hooks = {**session.event_hooks, "response": [_refuse_long_wait]}
    xet_disabled = constants.HF_HUB_DISABLE_XET
    handlers = logging.getLogger("huggingface_hub").handlers
    for handler in handlers:
        handler.addFilter(_hide_signatures)
    if not sys.stderr.isatty():
        disable_progress_bars()
    api = HfApi()
    try:
        yield api
    except LorikeetError:
        raise
    except Exception as error:
        explained = _explained(error, repo, api.endpoint)
        if explained is None:
            raise
        raise explained from error
    finally:
        constants.HF_HUB_DISABLE_XET = xet_disabled
        close_session()
        enable_progress_bars()
        for handler in handlers:
            handler.removeFilter(_hide_signatures)


def _offers_xet(api: HfApi, repo: str) -> bool:
    """Return whether this hub stores files in chunks; a mirror or a local one may know LFS alone."""
    from huggingface_hub import get_session
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    url = f"{api.endpoint}/api/models/{repo}/xet-write-token/main"
    return bool(get_session().get(url, headers=build_hf_headers()).status_code == 200)


def _refuse_long_wait(response: Any) -> None:
    """Raise HubError where the hub asks for a pause so long that the client would seem to hang."""
    pause = response.headers.get("Retry-After", "")
    if response.status_code in {429, 503} and pause.isdigit() and int(pause) > LONGEST_WAIT_S:
        raise HubError(f"the hub asks to come back in {pause} s; run the same command then, what has arrived stays")


def _hide_signatures(record: logging.LogRecord) -> bool:
    """Take the query, which may be signed, off every address in what the client logs."""
    record.msg, record.args = re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]+", r"\1", record.getMessage()), ()
    return True


def _explained(error: Exception, repo: str, endpoint: str) -> LorikeetError | None:
    """Return what a person can do about an error of the hub's client; None if it is another's."""
    chain = list(causes(error))
    for link in chain:
        if isinstance(link, LorikeetError):
            return link
        response = getattr(link, "response", None)
        if response is not None and hasattr(response, "status_code"):
            return _refused(response, repo, endpoint)
    modules = {type(link).__module__.partition(".")[0] for link in chain}
    if modules & {"httpx", "httpx2", "httpcore", "huggingface_hub", "hf_xet"} or isinstance(error, OSError):
        reason = " ".join(str(error).split())[:200]
        return HubError(f"cannot reach the hub at {endpoint} ({reason}); run again, what has arrived is not sent again")
    return None


def _refused(response: Any, repo: str, endpoint: str) -> LorikeetError:
    """Return the error for an answer of the hub that is no success."""
    status = response.status_code
    advice = {
        401: "the hub does not accept the token; log in again with: hf auth login, or set HF_TOKEN",
        402: f"the hub wants a paid plan for {repo}",
        403: f"the token may not write to {repo}; use one with write permission, or another --repo",
        404: f"the hub at {endpoint} has no {repo} that this token may see; check --repo",
        409: f"{repo} was changed by somebody else just now; run again",
        412: f"{repo} was changed by somebody else just now; run again",
        413: f"the hub finds a file of {repo} too large",
    }
    if status in advice:
        return InputError(f"{advice[status]} ({status}{_own_words(response)})")
    if status == 429:
        return HubError(
            f"the hub has had too many requests ({status}); wait a little and run again, what has arrived stays"
        )
    if status >= 500:
        return HubError(f"the hub at {endpoint} fails ({status}); run again later, what has arrived is not sent again")
    return InputError(f"the hub does not take {repo} ({status}{_own_words(response)})")


def _own_words(response: Any) -> str:
    """Return the hub's own message, shortened, to follow a status; '' if it gives none."""
    words = response.headers.get("X-Error-Message", "")
    if not words:
        try:
            words = str(response.json()["error"])
        except Exception:  # noqa: BLE001  # whatever it sent is no message
            return ""
    return f": {' '.join(words.split())[:160]}"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
