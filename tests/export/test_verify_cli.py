"""`lorikeet verify` and the end of `lorikeet export`: exit codes, one JSON document, one line for what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorikeet import cli
from lorikeet.config import TuneConfig
from lorikeet.export import parity
from lorikeet.run import RunFolder
from lorikeet.tune import loop

from ..conftest import make_conversations, make_model, write_jsonl

QUICK = ("--conversations", "4", "--answers", "2", "--answer-tokens", "6")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A tuned run that is not exported. The served route has its tests elsewhere; starting it takes long."""
    monkeypatch.setenv("LORIKEET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(parity, "_check_route", lambda *_: None)
    data = write_jsonl(tmp_path / "chats.jsonl", make_conversations())
    model = make_model(tmp_path / "base")
    config = TuneConfig(model=str(model), data=str(data), max_steps=6, learning_rate=1e-2, dtype="float32")
    return loop.tune(config, out=tmp_path / "run")


def test_verify_says_yes_then_no_and_exits_accordingly(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    root = str(run.root)
    assert cli.run(["export", root, "--quant", "q8_0"]) == 0
    assert "checks passed" in capsys.readouterr().err
    assert cli.run(["verify", root, "--json", *QUICK]) == 0
    out = capsys.readouterr().out
    certificate = json.loads(out)
    assert certificate["pass"] is True and certificate["compared"]["answers"] == 2
    assert {frozenset(check) >= {"name", "value", "limit", "pass"} for check in certificate["checks"]} == {True}
    header = run.root / "gguf" / "model-q8_0.gguf"
    header.write_bytes(header.read_bytes().replace(b"<|im_start|>' + message", b"<|im_start|>'  +message"))
    assert cli.run(["verify", root, *QUICK]) == 1
    out = capsys.readouterr().out
    assert "FAILED  template (run): 1, at most 0; gguf/model-q8_0.gguf: its chat template is not the base's" in out
    assert "FAILED  recorded_files" in out


def test_no_verify_leaves_the_certificate_out(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["export", str(run.root), "--quant", "q8_0", "--no-verify"]) == 0
    assert not (run.reports / "parity.json").exists()
    assert cli.run(["verify", str(run.root / "nothing")]) == 2
    error = capsys.readouterr().err
    assert "nothing is not a run folder" in error.splitlines()[-1]
    for flag in ("--conversations", "--answers", "--answer-tokens"):
        assert cli.run(["verify", str(run.root), flag, "0"]) == 2
        assert capsys.readouterr().err == f"lorikeet: {flag} is 0; it must be 1 or more\n"
