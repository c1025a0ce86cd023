"""The command line: one line and the right exit code for whatever is wrong, and recipes that hold."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import httpx
import pytest

from lorikeet import cli
from lorikeet.config import ServeConfig, TuneConfig
from lorikeet.export.gguf import write_gguf
from lorikeet.quickstart import RECIPE, summary
from lorikeet.run import RunFolder

from .conftest import make_conversations, write_jsonl

RECIPES = Path(__file__).resolve().parents[1] / "recipes"


def run(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = cli.run(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tune", "--learning-rat", "1"], "Did you mean --learning-rate?"),
        (["tune", "--max-length", "long"], '"long" is no whole number'),
        (["tune", "--lora-r", "8.5"], '"8.5" is no whole number'),
        (["tune", "--lora-r", "1.0e400"], '"1.0e400" is no whole number'),
        (["tune", "--on-long", "cut"], "Choose from"),
        (["tune", "--data", "nope.jsonl"], "nope.jsonl is not there"),
        (["tune", "--config", "nope.toml"], "--config nope.toml is not there"),
        (["tune", "--config"], "--config names no file"),
        (["tune", "--resume", "nope"], "nope is not a run folder"),
        (["tune", "--resume", "a", "--out", "b"], "takes the run's own settings"),
        (["tuna"], 'Did you mean "tune"?'),
        (["prove"], "--run"),
        (["prove", "nope"], "nope is not a run folder"),
        (["export", "nope"], "nope is not a run folder"),
        (["export", "nope", "--quant", "q8_0,q9"], '"q9" is not one of f16, q8_0, q6_k, q5_k_m, q4_k_m, q4_0'),
        (["chat", "nope.gguf"], "nope.gguf is not there"),
        (["chat", "."], "is a folder but neither a run nor a model"),
        (["serve", "nope"], "nope is not there"),
        (["serve", "n" * 400], "File name too long; name another path"),
        (["export", "n" * 400], "File name too long; name another path"),
        (["serve", "x", "--port", "http"], '"http" is no whole number'),
        (["quickstart", "--minutes", "0"], "--minutes is 0.0; it must be above 0"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, error = run(*arguments, capsys=capsys)
    assert code == 2
    assert message in error and error.startswith("lorikeet: ") and len(error.strip().splitlines()) == 1
    assert out == "" and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[tune]\nlearning_rat = 1", "[tune] has no learning_rat; did you mean learning_rate?"),
        ("[tun]\nseed = 1", "[tun] is no stage"),
        ("seed = 1", "[seed] is no stage"),
        ("[tune", "is no TOML file"),
        ("[tune]\nmax_length = 'x'", "max_length"),
    ],
)
def test_a_bad_recipe_is_one_line(text: str, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(text)
    code, _, error = run("tune", "--config", str(tmp_path / "r.toml"), capsys=capsys)
    assert code == 2 and message in error and len(error.strip().splitlines()) == 1


def test_flags_beat_the_recipe_which_beats_the_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lorikeet.tune import loop

    seen: list[TuneConfig] = []

    def note(config: TuneConfig, *, out: Path) -> RunFolder:
        seen.append(config)
        return RunFolder(out)

    monkeypatch.setattr(loop, "tune", note)
    (tmp_path / "r.toml").write_text("[tune]\nlora_r = 4\nseed = 7\ntarget_modules = ['q_proj']")
    code, *_ = run("tune", f"--config={tmp_path / 'r.toml'}", "--seed", "9", capsys=capsys)
    assert code == 0
    assert (seen[0].lora_r, seen[0].seed, seen[0].target_modules, seen[0].max_length) == (4, 9, ("q_proj",), 2048)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.name)
def test_the_recipes_are_whole(path: Path) -> None:
    recipe: dict[str, Any] = tomllib.loads(path.read_text())
    cli._check_recipe(path, recipe)
    values = recipe["tune"] | {"target_modules": tuple(recipe["tune"]["target_modules"])}
    config = TuneConfig(**values)
    if path.name == "quickstart.toml":
        assert config == RECIPE
    else:
        assert config == TuneConfig(), "the defaults are this recipe"


def test_a_folder_that_may_not_be_entered_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def shut(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_file", shut)
    code, out, err = run("chat", "/shut/model.gguf", capsys=capsys)
    assert (code, out) == (3, "")
    assert err == "lorikeet: /shut/model.gguf/run.json: Permission denied; fix its rights\n"


def test_the_weights_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run("weights", "--json", capsys=capsys)
    assert code == 0
    assert {row["name"] for row in json.loads(out)["packaged"]} == {
        "smollm2-135m-instruct",
        "whisper-tiny.en",
        "silero-vad",
        "hibari",
        "spoken",
    }
    assert "Apache-2.0" in run("weights", capsys=capsys)[1]


def lorikeet(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from lorikeet.cli import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=200, **options)


def test_the_loop_from_the_command_line(tiny_model: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "LORIKEET_CACHE": str(tmp_path / "cache")}
    write_jsonl(tmp_path / "chats.jsonl", make_conversations(80))
    flags = ["--model", str(tiny_model), "--data", "chats.jsonl", "--max-steps", "30", "--learning-rate", "0.01"]
    steps = [
        ["tune", *flags, "--dtype", "float32", "--out", "run"],
        ["export", "run", "--formats", "adapter,merged,gguf", "--quant", "q8_0"],
        ["prove", "run", "--json", "--answers", "2", "--max-answer-tokens", "8"],
    ]
    for step in steps:
        done = lorikeet(*step, cwd=tmp_path, env=environment)
        assert done.returncode == (0 if step[0] != "prove" else done.returncode), done.stderr
    proof = json.loads(done.stdout)
    assert done.returncode == (0 if proof["verdict"] == "ship" else 1)
    assert proof["heldout"]["ci95"][1] < 0
    whole = lorikeet("chat", str(tiny_model), "--max-tokens", "5", cwd=tmp_path, env=environment, input="hello there\n")
    assert whole.returncode == 0 and whole.stdout.strip(), whole.stderr
    talked = lorikeet(
        "chat", "run", "--max-tokens", "5", cwd=tmp_path, env=environment, input="hello there\n/new\nhello\n"
    )
    assert talked.returncode == 0 and len(talked.stdout.splitlines()) >= 2


def test_the_server_starts_answers_and_ends(tiny_model: Path, tmp_path: Path) -> None:
    gguf = tmp_path / "tiny.gguf"
    write_gguf(tiny_model, gguf, quant="q8_0", name="tiny")
    command = [sys.executable, "-c", "from lorikeet.cli import main; main()", "serve", str(gguf), "--port", "0"]
    process = subprocess.Popen([*command, "--search", "off"], stderr=subprocess.PIPE, text=True)
    assert process.stderr
    line = process.stderr.readline()
    while line and "ready" not in line:
        line = process.stderr.readline()
    url = "http" + line.partition("http")[2].split()[0]
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4, "seed": 1}
    answers = [httpx.post(f"{url}/v1/chat/completions", json=body).json()["choices"] for _ in range(2)]
    assert answers[0] == answers[1]
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 0 and time.monotonic() - began < 15


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--host", "0.0.0.0"], "give --api-key too"),
        (["--host", "0.0.0.0", "--api-key", " "], "--api-key is empty"),
        (["--port", "99999"], "--port 99999 is no port"),
        (["--host", "203.0.113.7", "--api-key", "long enough"], "--host 203.0.113.7 is no address of this machine"),
        (["--search", "bing"], "--search bing is not known"),
        (["--voice", "zeus", "--port", "0"], "--voice zeus is not known"),
    ],
)
def test_a_server_that_cannot_start_says_why(tiny_model: Path, tmp_path: Path, flags: list[str], message: str) -> None:
    gguf = tmp_path / "tiny.gguf"
    write_gguf(tiny_model, gguf, quant="q8_0", name="tiny")
    done = lorikeet("serve", str(gguf), *flags)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_taken_port_is_said(tiny_model: Path, tmp_path: Path) -> None:
    import socket

    gguf = tmp_path / "tiny.gguf"
    write_gguf(tiny_model, gguf, quant="q8_0", name="tiny")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = lorikeet("serve", str(gguf), "--port", str(taken.getsockname()[1]))
    assert done.returncode == 2 and "choose another with --port" in done.stderr
    assert ServeConfig().port == 7860


def test_the_summary_says_what_changed_and_what_to_type(tmp_path: Path) -> None:
    speech = {"speakable": 0.5, "mean_words": 70.0, "stumbles": 0.4}
    answer = {"text": "an answer", "ended": True, "speech": {"words": 2, "stumbles": []}}
    proof = {
        "verdict": "do not ship",
        "heldout": {"base_loss": 2.0, "tuned_loss": 1.5, "difference": -0.5, "ci95": [-0.6, -0.4], "n": 9},
        "checks": [{"name": "answers_end", "value": 0.1, "limit": "at least 0.5", "pass": False}],
        "answers_end": {"base": 0.75, "tuned": 0.1},
        "speakability": {"base": speech, "tuned": speech},
        "answers": [{"question": "why", "base": answer, "tuned": answer}],
    }
    text = summary(RunFolder(tmp_path), proof, seconds=90)
    for part in (
        "do not ship",
        "2.000 -> 1.500",
        "10% of them, its base's 75%",
        "--max-length",
        "asked    why",
        f"lorikeet serve {tmp_path}",
    ):
        assert part in text
