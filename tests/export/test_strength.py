"""The adapter's strength: chosen by the table, baked once, the same in adapter, merged weights and GGUF."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lorikeet import run as running
from lorikeet.config import ExportConfig, TuneConfig
from lorikeet.data.prose import MOST_FORGOTTEN
from lorikeet.errors import InputError, MachineError
from lorikeet.export import budget, strength, trained
from lorikeet.export.budget import Clock
from lorikeet.export.merge import load_adapter
from lorikeet.export.stage import export
from lorikeet.run import RunFolder
from lorikeet.tune import loop

from ..conftest import make_conversations, write_jsonl

ADAPTER_ONLY = ("adapter",)


def rows(*losses: tuple[float, float]) -> list[dict[str, Any]]:
    return [
        {"strength": s, "validation_loss": v, "prose_loss": p}
        for s, (v, p) in zip((0.0, *strength.STRENGTHS), losses, strict=True)
    ]


@pytest.mark.parametrize(
    ("table", "chosen"),
    [
        (rows((4, 3), (3.8, 3), (3.6, 3), (3.5, 3), (3.4, 3)), 1.0),
        (rows((4, 3), (3.8, 3), (3.5, 3), (3.6, 3), (3.9, 3)), 0.5),
        (rows((4, 3), (3.8, 3), (3.5, 3), (3.4995, 3), (3.4985, 3)), 0.5),
        (rows((4, 3), (3.8, 3.01), (3.6, 3.02), (3.5, 3.05), (3.4, 3 + MOST_FORGOTTEN)), 0.75),
        (rows((4, 3), (3.8, 3.2), (3.6, 3.4), (3.5, 3.5), (3.4, 3.6)), 0.25),
    ],
    ids=["full", "overfitted", "tie goes to the weaker", "forgetting", "all forget"],
)
def test_the_table_decides(table: list[dict[str, Any]], chosen: float) -> None:
    assert strength.choose(table) == chosen


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Callable[[str], Path]:
    """Give a short run of a kind, tuned once."""

    @cache
    def tune(kind: str) -> Path:
        root = tmp_path_factory.mktemp(kind)
        data = write_jsonl(root / "chats.jsonl", make_conversations(60))
        more: dict[str, Any] = {"rslora": {"use_rslora": True}, "pissa": {"init_lora_weights": "pissa"}}.get(kind, {})
        config = TuneConfig(
            model=str(tiny_model), data=str(data), max_steps=6, learning_rate=1e-2, dtype="float32", **more
        )
        return loop.tune(config, out=root / "run").root

    return tune


@pytest.fixture
def run(request: pytest.FixtureRequest, tuned: Callable[[str], Path], tmp_path: Path, monkeypatch: Any) -> RunFolder:
    """A copy of a run of the kind that the test names, plain LoRA by default."""
    monkeypatch.setenv("LORIKEET_CACHE", str(tmp_path / "cache"))
    kind = getattr(request, "param", "lora")
    return RunFolder.open(Path(shutil.copytree(tuned(kind), tmp_path / "run")))


EVERY_KIND = pytest.mark.parametrize("run", ["lora", "rslora", "pissa"], indirect=True)


def scale(run: RunFolder) -> float:
    return load_adapter(run.root / "adapter").scale


def settled(run: RunFolder, asked: str, **more: Any) -> dict[str, Any]:
    export(run.root, ExportConfig(formats=ADAPTER_ONLY, strength=asked, **more))
    run.verify("adapter")
    entry: dict[str, Any] = run.manifest()["strength"]
    return entry


@EVERY_KIND
def test_a_strength_is_applied_once_and_can_be_changed(run: RunFolder) -> None:
    full = scale(run)
    step = run.manifest()["artefacts"]["adapter"]["step"]
    for asked in ("0.5", "0.5", "0.25", "1"):
        entry = settled(run, asked)
        assert scale(run) == pytest.approx(full * float(asked)) and entry["strength"] == float(asked)
    assert run.manifest()["artefacts"]["adapter"]["step"] == step


@EVERY_KIND
def test_merged_weights_have_the_strength_too_and_are_made_again(run: RunFolder, tiny_model: Path) -> None:
    from safetensors.torch import load_file

    base = load_file(tiny_model / "model.safetensors")
    moved = {}
    for asked in ("1", "0.5"):
        export(run.root, ExportConfig(formats=("adapter", "merged"), strength=asked))
        merged = load_file(run.root / "merged" / "model.safetensors")
        moved[asked] = sum(float((merged[n].float() - w.float()).abs().sum()) for n, w in base.items() if "proj" in n)
    assert moved["0.5"] == pytest.approx(moved["1"] / 2, rel=0.1)


def test_auto_measures_each_strength_and_keeps_its_table(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = settled(run, "auto")
    assert [row["strength"] for row in entry["table"]] == [0.0, *strength.STRENGTHS]
    assert entry["strength"] == strength.choose(entry["table"])
    asked = [row["strength"] for row in entry["table"] if "instructions_followed" in row]
    assert asked == [0.0, entry["strength"]]
    losses = [row["validation_loss"] for row in entry["table"]]
    assert losses[4] < losses[0] and len(set(losses)) == 5
    monkeypatch.setattr(strength, "measure", lambda *_, **__: pytest.fail("measured again"))
    assert settled(run, "auto") == entry


@pytest.mark.parametrize(
    ("follows", "chosen", "asked"),
    [
        ({0.0: 12, 1.0: 11}, 1.0, [0.0, 1.0]),
        ({0.0: 12, 1.0: 2, 0.75: 4, 0.5: 11}, 0.5, [0.0, 0.5, 0.75, 1.0]),
        ({0.0: 12, 1.0: 2, 0.75: 2, 0.5: 2, 0.25: 2}, 0.25, [0.0, 0.5, 0.75, 1.0]),
    ],
    ids=["kept", "lost until a half", "never kept"],
)
def test_a_weaker_strength_is_taken_where_instructions_are_lost(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, follows: dict[float, int], chosen: float, asked: list[float]
) -> None:
    """The first so many of the prompts are followed; one fewer may be an accident, eight fewer are not."""
    monkeypatch.setattr(strength, "choose", lambda *_: 1.0)
    monkeypatch.setattr(
        strength,
        "_followed",
        lambda _model, _prompt, asked, *, factor: [n < follows[factor] for n in range(len(asked))],
    )
    entry = settled(run, "auto")
    assert entry["strength"] == chosen
    assert [row["strength"] for row in entry["table"] if "instructions_followed" in row] == asked
    assert ("fewer instructions" in entry["why"]) is (chosen < 1)


def test_the_table_is_that_of_peft(run: RunFolder, tiny_model: Path) -> None:
    """At full strength the loss is that of PEFT's own model; the order in which strengths were baked changes nothing."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from lorikeet.prompt import PromptFormat

    before = strength.measure(run, tiny_model, unit=1.0, clock=Clock(seconds=600)).table
    prompt = PromptFormat.load(run.root / "adapter")
    model: Any = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), str(run.root / "adapter")
    )
    total = count = 0.0
    for row in strength._validation_rows(prompt, run):
        with torch.no_grad():
            lost = torch.nn.functional.cross_entropy(
                model(torch.tensor([row.ids])).logits[0, :-1], torch.tensor(row.ids[1:]), reduction="none"
            )
        mask = torch.tensor(row.supervised[1:])
        total, count = total + float(lost[mask].sum()), count + float(mask.sum())
    assert before[4]["validation_loss"] == pytest.approx(total / count, abs=1e-4)
    settled(run, "0.5")
    after = strength.measure(run, tiny_model, unit=2.0, clock=Clock(seconds=600)).table
    assert after == before


@pytest.mark.parametrize("broken", ["write_atomic", "_record"])
def test_a_kill_between_the_steps_is_mended(run: RunFolder, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    full = scale(run)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(strength, broken, killed)
        with pytest.raises(KeyboardInterrupt):
            settled(run, "0.5")
    settled(run, "0.5")
    assert scale(run) == pytest.approx(full / 2)


def test_another_adapter_starts_anew(run: RunFolder) -> None:
    """A resumed run writes new weights with the alpha of tuning: the old entry says nothing of them."""
    from safetensors.torch import load_file, save_file

    full = scale(run)
    config = (run.root / "adapter" / strength.CONFIG).read_text()
    settled(run, "0.5")
    weights = run.root / "adapter" / strength.WEIGHTS
    changed = {name: tensor + 1 for name, tensor in load_file(weights).items()}
    save_file(changed, weights, metadata={"format": "pt"})
    (run.root / "adapter" / strength.CONFIG).write_text(config)
    run.record("adapter", run.root / "adapter", step=9)
    settled(run, "0.5")
    assert scale(run) == pytest.approx(full / 2)


@pytest.mark.parametrize("asked", ["0", "1.5", "-1", "half", "nan"])
def test_what_is_no_strength_is_refused(run: RunFolder, asked: str) -> None:
    before = (run.root / "adapter" / strength.CONFIG).read_text()
    with pytest.raises(InputError, match=f"--strength {asked} is neither auto"):
        settled(run, asked)
    assert (run.root / "adapter" / strength.CONFIG).read_text() == before


def test_dora_stays_whole(run: RunFolder) -> None:
    path = run.root / "adapter" / strength.CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_dora": True}))
    run.record("adapter", run.root / "adapter")
    with pytest.raises(InputError, match="DoRA adapter is not linear"):
        settled(run, "0.5")
    assert settled(run, "auto")["strength"] == 1.0


def test_a_run_without_validation_conversations_keeps_the_whole_adapter(run: RunFolder) -> None:
    full = scale(run)
    run.forget(strength.VALIDATION)
    entry = settled(run, "auto")
    assert entry["strength"] == 1.0 and "keeps no data/validation.jsonl" in entry["why"] and scale(run) == full


def test_memory_is_asked_for_where_strengths_are_measured_alone(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "free_bytes", lambda: 100_000)
    with pytest.raises(MachineError, match="choosing the adapter's strength takes"):
        settled(run, "auto")
    assert settled(run, "0.5")["strength"] == 0.5
    kept = run.manifest()["artefacts"]
    run.forget(strength.VALIDATION)
    assert "keeps no data/validation.jsonl" in settled(run, "auto")["why"]
    run.update(artefacts=kept, strength=None)
    path = run.root / "adapter" / strength.CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_dora": True}))
    run.record("adapter", run.root / "adapter")
    assert "DoRA" in settled(run, "auto")["why"]
    monkeypatch.setattr(strength, "measure", lambda *_, **__: pytest.fail("measured again"))
    assert settled(run, "auto")["strength"] == 1.0


class Slow:
    """A clock of a machine that computes so many tokens a second, whatever this one does."""

    def __init__(self, tokens_per_s: float) -> None:
        self.now_s, self.rate = 0.0, tokens_per_s

    def monotonic(self) -> float:
        return self.now_s

    def run(self, tokens: int) -> None:
        self.now_s += tokens / self.rate


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Slow:
    """A machine of a hundred tokens a second."""
    clock, losses = Slow(100.0), trained.TorchModel.losses
    monkeypatch.setattr(budget, "time", SimpleNamespace(monotonic=clock.monotonic))

    def counted(model: Any, rows: Any, *, done: Callable[[int], None] = lambda _: None) -> Any:
        def told(tokens: int) -> None:
            clock.run(tokens)
            done(tokens)

        return losses(model, rows, done=told)

    monkeypatch.setattr(trained.TorchModel, "losses", counted)
    return clock


def test_with_less_time_less_is_compared_and_more_time_compares_again(
    run: RunFolder, slow: Slow, capsys: pytest.CaptureFixture[str]
) -> None:
    many = write_jsonl(run.root / "data" / "validation.jsonl", make_conversations(40))
    run.record(strength.VALIDATION, many)
    cut = settled(run, "auto", budget_s=150)
    error = capsys.readouterr().err
    compared = int(re.search(r"on (\d+) validation conversations", cut["why"])[1])  # type: ignore[index]
    assert strength.LEAST_CONVERSATIONS <= compared < 40 and slow.now_s < 150
    assert f"5 strengths on {compared} conversations and plain prose, 100 tokens/s" in error
    assert f"  {compared} of 40 validation conversations were compared\n" in error
    assert settled(run, "auto", budget_s=150) == cut
    enough = float(re.search(r"--budget-s (\d+) leaves nothing out", error)[1])  # type: ignore[index]
    whole = settled(run, "auto", budget_s=enough)
    assert "on 40 validation conversations" in whole["why"] and "cut_at_s" not in whole
    assert "--budget-s" not in capsys.readouterr().err


def test_without_time_the_whole_adapter_is_kept_and_it_is_said(
    run: RunFolder, slow: Slow, capsys: pytest.CaptureFixture[str]
) -> None:
    full = scale(run)
    entry = settled(run, "auto", budget_s=10)
    assert (entry["strength"], entry["table"], scale(run)) == (1.0, [], full)
    error = capsys.readouterr().err
    assert "adapter strength 1 (not measured: the time given is too short)" in error
    needed = re.search(r"--budget-s (\d+) measures; --strength sets it", error)
    assert needed
    assert settled(run, "auto", budget_s=float(needed[1]))["table"]


def test_a_difference_within_the_noise_of_the_conversations_is_a_tie() -> None:
    losses = strength._Losses(None, [], [], unit=1.0, clock=Clock(seconds=1), progress=lambda *_: None)  # type: ignore[arg-type]
    losses._counts = np.full(8, 10)
    losses._sums = {1.0: np.full(8, 30.0), 0.75: np.array([25.0, 36] * 4), 0.5: np.array([31.0, 32] * 4)}
    rows = {s: {"strength": s, "validation_loss": sums.sum() / 80} for s, sums in losses._sums.items()}
    assert strength.is_dearer(rows[0.75], rows[1.0]) and not losses.are_dearer(rows[0.75], rows[1.0])
    assert losses.are_dearer(rows[0.5], rows[1.0])


@pytest.mark.parametrize("budget_s", [-1.0, float("nan")])
def test_what_is_no_time_is_refused(run: RunFolder, budget_s: float) -> None:
    with pytest.raises(InputError, match="--budget-s is"):
        settled(run, "auto", budget_s=budget_s)
