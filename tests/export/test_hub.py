"""publish against a hub that speaks the real protocol: what arrives, what does not leave, breaks, refusals."""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorikeet.cli import run as lorikeet
from lorikeet.config import ExportConfig, TuneConfig
from lorikeet.engine import LlamaEngine
from lorikeet.export.stage import export
from lorikeet.files import sha256_file, sha256_tree
from lorikeet.messages import Message
from lorikeet.prompt import PromptFormat
from lorikeet.run import RunFolder
from lorikeet.tune import loop

from ..conftest import make_conversations, make_model, write_jsonl
from ..hub import TOKEN, Fault, WritableHub, serve_writable_hub

# huggingface_hub 2.4 hands parts to its HTTP client in a way that the client has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

REPO = "me/tiny"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A tiny run, tuned and exported, with the certificate that `verify` leaves."""
    folder = tmp_path_factory.mktemp("private")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORIKEET_CACHE", str(folder / "cache"))
        data = write_jsonl(folder / "clients.jsonl", make_conversations())
        base = make_model(folder / "base")
        config = TuneConfig(model=str(base), data=str(data), max_steps=3, learning_rate=1e-2, dtype="float32")
        run = loop.tune(config, out=folder / "run")
        export(run.root, ExportConfig())
        certify(run)
        yield run.root


def certify(run: RunFolder, **more: Any) -> None:
    """Leave a passing certificate for the artefacts that are here."""
    artefacts = {name: sha256_tree(run.root / name) for name in run.certifiable()}
    check = {"name": "template", "value": 0, "limit": 0, "pass": True}
    run.reports.mkdir(exist_ok=True)
    (run.reports / "parity.json").write_text(
        json.dumps({"pass": True, "checks": [check], "artefacts": artefacts} | more)
    )


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WritableHub]:
    """An empty hub, and a client that is logged in to it."""
    with serve_writable_hub(tmp_path / "hub") as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.endpoint)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield served


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses of the hub's client, noted and not taken."""
    taken: list[float] = []
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", taken.append)
    return taken


def publish(root: Path, *more: str, repo: str = REPO) -> int:
    return lorikeet(["publish", str(root), "--repo", repo, *more])


def command(root: Path, hub: WritableHub) -> tuple[list[str], dict[str, str]]:
    line = [sys.executable, "-c", "import sys; from lorikeet.cli import run; sys.exit(run(sys.argv[1:]))"]
    environment = os.environ | {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN}
    return [*line, "publish", str(root), "--repo", REPO], environment


def test_what_is_published_can_be_used(
    exported: Path, hub: WritableHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert publish(exported) == 0
    captured = capsys.readouterr()
    assert f"published: {hub.endpoint}/{REPO}" in captured.err and TOKEN not in captured.out + captured.err
    files = hub.files(REPO)
    listed = {line.split()[1]: int(line.split()[0].replace(",", "")) for line in captured.out.splitlines()[:-1]}
    assert listed == {name: len(data) for name, data in files.items()}
    assert len(hub.commits) == 1

    # One name, four programs: downloaded by the hub's own client, as each of them does.
    code = f"from huggingface_hub import snapshot_download; print(snapshot_download({REPO!r}))"
    environment = os.environ | {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    snapshot = Path(done.stdout.strip())
    merged = AutoModelForCausalLM.from_pretrained(snapshot, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(snapshot)
    base = AutoModelForCausalLM.from_pretrained(exported.parent / "base")
    adapted = PeftModel.from_pretrained(base, str(snapshot), subfolder="adapter").eval()
    messages = [{"role": "user", "content": "the quick brown?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        difference = (merged(**ids).logits - adapted(**ids).logits).abs().max()
        moved = (
            (merged(**ids).logits - AutoModelForCausalLM.from_pretrained(exported.parent / "base")(**ids).logits)
            .abs()
            .max()
        )
    assert difference < 0.2 * moved
    prompt = PromptFormat.load(exported / "adapter")
    with LlamaEngine(snapshot / "tiny-Q8_0.gguf", context_tokens=256) as engine:
        asked = [Message("user", "the quick brown?")]
        assert engine.tokenize(engine.render(asked)) == prompt.prompt_ids(asked)
        assert "".join(delta.text for delta in engine.stream(asked, max_tokens=4, temperature=0.0, seed=0))
    for local, published in (
        ("gguf/model-q8_0.gguf", "tiny-Q8_0.gguf"),
        ("gguf/model-f16.gguf", "tiny-F16.gguf"),
        ("merged/model.safetensors", "model.safetensors"),
        ("adapter/adapter_model.safetensors", "adapter/adapter_model.safetensors"),
    ):
        assert sha256_file(snapshot / published) == sha256_file(exported / local)


def test_nothing_else_leaves_the_machine(exported: Path, hub: WritableHub) -> None:
    assert publish(exported) == 0
    files = hub.files(REPO)
    kinds = {"README.md", "Modelfile", "template", "params", "tiny-Q8_0.gguf", "tiny-F16.gguf"}
    merged = {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    adapter = {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert set(files) == kinds | merged | {"chat_template.jinja"} | {
        f"adapter/{n}" for n in {*adapter, "chat_template.jinja"}
    }
    private = exported.parent.name.encode()
    assert not [name for name, data in files.items() if private in data]
    assert not [name for name, data in files.items() if b"lorikeets sing" in data or b"row-3" in data]
    assert json.loads(files["adapter/adapter_config.json"])["base_model_name_or_path"] == "base"
    assert files["Modelfile"].startswith(b"FROM ./tiny-Q8_0.gguf\n")
    assert json.loads(files["params"])["stop"] == ["<|im_end|>"]


def test_killed_in_the_middle_and_run_again(exported: Path, hub: WritableHub) -> None:
    hub.pause_s = 0.15
    line, environment = command(exported, hub)
    process = subprocess.Popen(line, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while len([1 for name in hub.seen if "/store/verify/" in name]) < 2 or "/store/part/" not in hub.seen[-1]:
        assert time.monotonic() < deadline and process.poll() is None, process.stderr
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.stderr is not None
    process.stderr.close()
    assert not hub.commits
    arrived = {path.name for path in (hub.folder / "objects").iterdir() if path.is_file()}
    assert len(arrived) >= 2
    hub.pause_s = 0.0
    subprocess.run(line, env=environment, check=True, capture_output=True)
    assert set(hub.files(REPO)) >= {"tiny-Q8_0.gguf", "tiny-F16.gguf", "model.safetensors"}
    objects = {path.name: path.stat().st_size for path in (hub.folder / "objects").iterdir() if path.is_file()}
    sent_again = {
        oid: hub.received_bytes[oid] - size for oid, size in objects.items() if hub.received_bytes[oid] > size
    }
    assert not sent_again.keys() & arrived
    assert len(sent_again) <= 1  # the one file that was under way


def test_a_second_time_sends_nothing(exported: Path, hub: WritableHub, capsys: pytest.CaptureFixture[str]) -> None:
    assert publish(exported) == 0
    before = dict(hub.received_bytes)
    assert publish(exported) == 0
    assert dict(hub.received_bytes) == before and len(hub.commits) == 1
    assert "files are there already" in capsys.readouterr().err


def test_a_dry_run_asks_nobody(exported: Path, hub: WritableHub, capsys: pytest.CaptureFixture[str]) -> None:
    assert publish(exported, "--dry-run") == 0
    out = capsys.readouterr().out
    assert "model.safetensors" in out and "adapter/adapter_model.safetensors" in out and "tiny-Q8_0.gguf" in out
    assert hub.seen == []


def test_formats_and_a_private_repository(exported: Path, hub: WritableHub) -> None:
    assert publish(exported, "--formats", "adapter", "--private", repo="tiny") == 0
    assert {name.partition("/")[0] for name in hub.files(REPO)} == {"README.md", "adapter"}
    assert REPO in hub.private


def test_private_is_not_sent_to_a_public_repository(
    exported: Path, hub: WritableHub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert publish(exported, "--formats", "adapter") == 0
    assert publish(exported, "--private") == 2
    assert "is there already and public" in capsys.readouterr().err
    assert not any(name.endswith(".gguf") for name in hub.files(REPO))


@pytest.mark.parametrize("fault", ["missing", "failed", "changed", "added", "other"])
def test_no_certificate_no_upload(
    exported: Path, hub: WritableHub, tmp_path: Path, fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root = Path(shutil.copytree(exported, tmp_path / "run"))
    run = RunFolder.open(root)
    if fault == "missing":
        (root / "reports" / "parity.json").unlink()
    elif fault == "failed":
        certify(run, **{"pass": False, "checks": [{"name": "one_bos", "value": 2, "limit": 0, "pass": False}]})
    elif fault == "changed":
        data = bytearray((root / "gguf" / "model-q8_0.gguf").read_bytes())
        data[-1] ^= 1
        (root / "gguf" / "model-q8_0.gguf").write_bytes(data)
    elif fault == "added":
        (root / "merged" / "extra.bin").write_bytes(b"x")
    else:
        shutil.copyfile(root / "gguf" / "model-f16.gguf", root / "gguf" / "model-q8_0.gguf")
    assert publish(root) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "certificate" in error
    assert hub.seen == []


def test_a_changed_modelfile_is_refused(
    exported: Path, hub: WritableHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = Path(shutil.copytree(exported, tmp_path / "run"))
    (root / "Modelfile").write_text((root / "Modelfile").read_text() + "PARAMETER temperature 2\n")
    assert publish(root) == 2
    assert "is not the one that export wrote" in capsys.readouterr().err and hub.seen == []


@pytest.mark.parametrize(
    ("fault", "code", "said"),
    [
        (Fault("whoami", 401), 2, "does not accept the token"),
        (Fault("repos/create", 403, times=9), 2, "may not write to me/tiny"),
        (Fault("preupload", 404), 2, "has no me/tiny that this token may see"),
        (Fault("commit/main", 409), 2, "changed by somebody else"),
        (Fault("commit/main", 413), 2, "too large"),
        (Fault("repos/create", 429, {"Retry-After": "300"}), 3, "come back in 300 s"),
        (Fault("preupload", 429, {"Retry-After": "300"}, times=9), 3, "come back in 300 s"),
        (Fault("preupload", 503, times=99), 3, "fails (503)"),
        (Fault("store/", 500, times=99), 3, "fails (500)"),
        (Fault("commit/main", 400, body=b'{"error": "no such branch"}'), 2, "no such branch"),
    ],
)
def test_a_refusal_is_one_line(
    exported: Path,
    hub: WritableHub,
    naps: list[float],
    fault: Fault,
    code: int,
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    hub.faults.append(fault)
    assert publish(exported) == code
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("lorikeet: ")]
    assert len(lines) == 1 and said in lines[0], error
    assert "Traceback" not in error and TOKEN not in error and "Signature" not in error
    assert sum(naps) <= 30 and not hub.commits


@pytest.mark.parametrize(
    "fault",
    [
        Fault("store/part", 500, times=2),
        Fault("preupload", 429, {"Retry-After": "2"}),
        Fault("store/part", 0, after_bytes=1000),
        Fault("objects/batch", 502),
    ],
)
def test_a_passing_failure_is_got_over(exported: Path, hub: WritableHub, naps: list[float], fault: Fault) -> None:
    hub.faults.append(fault)
    assert publish(exported) == 0
    assert len(hub.commits) == 1 and naps
    assert hub.files(REPO)["model.safetensors"] == (exported / "merged" / "model.safetensors").read_bytes()


def test_no_signed_address_is_logged(exported: Path, hub: WritableHub, naps: list[float]) -> None:
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    logging.getLogger("huggingface_hub").addHandler(handler)
    hub.faults.append(Fault("store/part", 500))
    try:
        assert publish(exported) == 0
    finally:
        logging.getLogger("huggingface_hub").removeHandler(handler)
    assert "store/part" in written.getvalue() and "Signature" not in written.getvalue()


def test_what_arrives_damaged_is_not_committed(exported: Path, hub: WritableHub, naps: list[float]) -> None:
    hub.faults.append(Fault("store/complete", 400, body=b'{"error": "BadDigest"}', times=9))
    assert publish(exported) == 2
    assert not hub.commits


@pytest.mark.parametrize("repo", ["a/b/c", "me/with space", "me/-x", "", "me/..", "x" * 120])
def test_a_bad_name_is_refused(exported: Path, hub: WritableHub, repo: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert publish(exported, repo=repo) == 2
    assert "is no name of a repository" in capsys.readouterr().err
    assert hub.seen == []


def test_no_token_is_said(exported: Path, hub: WritableHub, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere/token")
    assert publish(exported) == 2
    assert "hf auth login" in capsys.readouterr().err and hub.seen == []


def test_no_hub_is_one_line(
    exported: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    began = time.monotonic()
    assert publish(exported) == 3
    error = capsys.readouterr().err
    assert "cannot reach the hub at http://127.0.0.1:9" in error and error.count("\n") == 1
    assert time.monotonic() - began < 10


def test_an_unproved_no_is_warned_of(exported: Path, hub: WritableHub, tmp_path: Path, capsys: Any) -> None:
    root = Path(shutil.copytree(exported, tmp_path / "run"))
    RunFolder.open(root).update(proof={"verdict": "do not ship", "quant": "q8_0"})
    assert publish(root, "--dry-run") == 0
    assert "do not ship" in capsys.readouterr().err


def test_the_session_is_put_back(exported: Path, hub: WritableHub) -> None:
    handlers = logging.getLogger("huggingface_hub").handlers
    before = (constants.HF_HUB_DISABLE_XET, [len(handler.filters) for handler in handlers])
    assert publish(exported, "--formats", "adapter") == 0
    assert (constants.HF_HUB_DISABLE_XET, [len(handler.filters) for handler in handlers]) == before
