"""LoRA on two CPU cores: Lorikeet beside TRL + PEFT, in one run, on the same conversations in the same order.

    .venv/bin/python benchmarks/tuning.py [--steps 3] [--curve 12] [--json PATH]     # about 35 minutes

Every configuration runs in a process of its own: the recipe (r 16, alpha 16, dropout 0.05, seven projections, 4 x 2
conversations a step, learning rate 3e-4) on SmolLM2-135M. TRL's configurations are swept in a few steps. Then Lorikeet and
TRL's fastest two run in turn, as many steps each, twice; means are compared, and the faster of the two is the one to beat.
The first step, in which caches fill and compilers work, is timed in none. Speed counts tokens of conversations, never
padding. The machine's rate of bf16 products is measured before each round and at the end.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from report import SHARED, stamp, table

DATA = SHARED / "chat" / "instruct-2k.jsonl"
BATCH, ACCUMULATION, RATE = 4, 2, 3e-4
BEST = "Lorikeet"
OURS = {
    BEST: {"compiled": True, "share": True},
    "Lorikeet, not compiled": {"compiled": False, "share": True},
    "Lorikeet, nothing shared": {"compiled": True, "share": False},
}
"""Lorikeet as it is, as it is in short runs or without a compiler, and as if no conversation began as another does."""
TRL = {
    "fp32, padded": {},
    "fp32, grouped by length": {"group": True},
    "fp32, packed": {"packing": True},
    "fp32, padding-free": {"padding_free": True},
    "fp32, compiled": {"torch_compile": True},
    "fp32, packed, compiled": {"packing": True, "torch_compile": True},
    "bf16 weights, padded": {"bf16": True},
    "bf16 weights, packed": {"bf16": True, "packing": True},
    "bf16 weights, packed, compiled": {"bf16": True, "packing": True, "torch_compile": True},
    "bf16 autocast, packed": {"autocast": True, "packing": True},
}
"""TRL's configurations; `bf16` loads the weights in it, `autocast` is what the trainer's bf16 flag does."""

ROUNDS = 2
"""How often Lorikeet and TRL's fastest two run in turn: the machine is shared and noisy, and what one run meets its neighbour
in time meets too."""

LOSSES = 10
"""Steps whose losses are put side by side, where TRL's configuration for it is not one of its two fastest."""

STEP_LIMIT_S = 60
"""A configuration whose steps take longer on average, start included, is stopped: it is several times too slow to be the fastest."""


def encoded(steps: int) -> list[list[Any]]:
    """Return the conversations of each step, as tokens, in the order that both see."""
    import torch

    from lorikeet.data.encode import encode_all
    from lorikeet.data.load import load_conversations
    from lorikeet.prompt import PromptFormat
    from lorikeet.weights import resolve_model

    prompt = PromptFormat.load(resolve_model("smollm2-135m-instruct"))
    conversations = load_conversations(str(DATA)).conversations
    order = torch.randperm(len(conversations), generator=torch.Generator().manual_seed(7)).tolist()
    per_step = BATCH * ACCUMULATION
    chosen = [conversations[i] for i in order[: steps * per_step]]
    rows = encode_all(prompt, chosen, max_length=2048, on_long="truncate").rows
    return [rows[i : i + per_step] for i in range(0, len(rows), per_step)]


def gemm_rate(seconds: float = 3.0) -> float:
    """Return the bf16 rate of this machine, in FLOP/s: the model's own widest product, at 2048 tokens."""
    import torch

    x, w = torch.randn(2048, 576).bfloat16(), torch.randn(1536, 576).bfloat16()
    best, until = 0.0, time.monotonic() + seconds
    while time.monotonic() < until:
        began = time.perf_counter()
        for _ in range(20):
            x @ w.t()
        best = max(best, 20 * 2 * 2048 * 576 * 1536 / (time.perf_counter() - began))
    return best


def flops_per_token(rows: list[list[Any]]) -> float:
    """Return the floating-point operations of matrix products that Lorikeet executes for a token of `rows`.

    What the conversations of a step start with is counted once, as it is computed once; what no loss depends on, never. Frozen weights are multiplied twice (forward, and backward for the input), the adapter's three times, the head
    twice where a token is supervised, attention's four products of each document six times over, halved as causal.
    """
    from lorikeet.data.encode import shared_start
    from lorikeet.tune.batches import read_tokens

    hidden, inner, layers, keys, vocabulary, rank = 576, 1536, 30, 192, 49152, 16
    shapes = [(hidden, hidden), (hidden, keys), (hidden, keys), (hidden, hidden)]
    shapes += [(hidden, inner), (hidden, inner), (inner, hidden)]
    frozen = layers * sum(a * b for a, b in shapes)
    adapter = layers * rank * sum(a + b for a, b in shapes)
    every = [row for step in rows for row in step]
    tokens, supervised = sum(len(r.ids) for r in every), sum(r.supervised_tokens for r in every)
    skipped = sum((len(step) - 1) * shared_start(step) for step in rows)
    skipped += sum(len(row.ids) - read_tokens(row) for row in every)
    again = sum((len(step) - 1) * shared_start(step) ** 2 for step in rows)
    attention = layers * hidden * (sum(read_tokens(r) ** 2 for r in every) - again) / tokens / 2
    per_token = (2 * frozen + 3 * adapter) * (1 - skipped / tokens)
    return 2 * (per_token + 2 * hidden * vocabulary * supervised / tokens + 6 * attention)


def ours(rows: list[list[Any]], *, compiled: bool, share: bool) -> tuple[list[float], list[float]]:
    """Return the loss and the seconds of every step of Lorikeet's learner."""
    from lorikeet.config import TuneConfig
    from lorikeet.tune.batches import pack_all
    from lorikeet.tune.learner import Learner
    from lorikeet.weights import resolve_model

    config = TuneConfig(learning_rate=RATE, weight_decay=0.0, seed=7)
    learner = Learner.load(config, resolve_model("smollm2-135m-instruct"))
    share = share and learner.scorer.shares
    first = pack_all(rows[0], max_tokens=config.max_length, share=share)
    if compiled and (why := learner.scorer.compile(first[-1])):
        raise SystemExit(why)
    learner.model.train()
    losses, seconds = [], []
    for step in rows:
        began = time.perf_counter()
        losses.append(learner.step(pack_all(step, max_tokens=config.max_length, share=share), rate=RATE))
        seconds.append(time.perf_counter() - began)
    return losses, seconds


def theirs(rows: list[list[Any]], setting: dict[str, Any], folder: str) -> tuple[list[float], list[float], list[int]]:
    """Return the loss, the seconds and the tokens of every step of TRL's trainer."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from lorikeet.weights import resolve_model

    torch.manual_seed(7)
    base = resolve_model("smollm2-135m-instruct")
    dtype = torch.bfloat16 if setting.get("bf16") else torch.float32
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    flat = [row for step in rows for row in (sorted(step, key=lambda r: len(r.ids)) if setting.get("group") else step)]
    data = Dataset.from_list(
        [{"input_ids": list(row.ids), "completion_mask": [int(kept) for kept in row.supervised]} for row in flat]
    )
    per_step = BATCH * ACCUMULATION
    together = {"packing": 1, "padding_free": per_step}  # packing counts windows, of as many tokens as a step has
    batch = next((count for name, count in together.items() if setting.get(name)), BATCH)
    config = SFTConfig(
        output_dir=folder,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=ACCUMULATION if batch == BATCH else 1,
        max_length=_max_length(rows, setting),
        max_steps=len(rows),
        learning_rate=RATE,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        bf16=bool(setting.get("autocast")),
        packing=bool(setting.get("packing")),
        padding_free=bool(setting.get("padding_free")),
        torch_compile=bool(setting.get("torch_compile")),
        gradient_checkpointing=False,
        completion_only_loss=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        weight_decay=0.0,
        seed=7,
    )
    lora = LoraConfig(
        r=16,
        lora_alpha=16,
        lora_dropout=0.05,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        task_type="CAUSAL_LM",
    )
    ends: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]  # transformers ships no types
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    class InOrder(SFTTrainer):  # type: ignore[misc]  # transformers ships no types
        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return SequentialSampler(dataset if dataset is not None else self.train_dataset)

    tokenizer = AutoTokenizer.from_pretrained(base)
    trainer = InOrder(
        model=model, args=config, train_dataset=data, processing_class=tokenizer, peft_config=lora, callbacks=[Clock()]
    )
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    tokens = [b - a for a, b in itertools.pairwise([0, *(int(entry["num_tokens"]) for entry in logged)])]
    return [entry["loss"] for entry in logged], [b - a for a, b in itertools.pairwise(ends)], tokens


def _max_length(rows: list[list[Any]], setting: dict[str, Any]) -> int | None:
    """Return TRL's max_length: a window of the tokens of a mean step where it packs; none where it may not cut."""
    if setting.get("packing"):
        return sum(len(row.ids) for step in rows for row in step) // len(rows)
    return None if setting.get("padding_free") else 2048


def child(name: str, steps: int) -> None:
    """Run one configuration and print one JSON line: losses, tokens/s without the first step, peak memory."""
    warnings.filterwarnings("ignore")
    from lorikeet.run import resident_bytes

    rows = encoded(steps)
    tokens = [sum(len(row.ids) for row in step) for step in rows]
    if name in OURS:
        losses, seconds = ours(rows, **OURS[name])
    else:
        with tempfile.TemporaryDirectory() as folder:
            losses, seconds, tokens = theirs(rows, TRL[name], folder)
    result = {
        "losses": losses,
        "tokens_per_s": sum(tokens[1:]) / sum(seconds[1:]),
        "peak_bytes": resident_bytes(peak=True),
        "flops_per_token": flops_per_token(rows),
    }
    print("RESULT " + json.dumps(result))


def measure(name: str, steps: int) -> dict[str, Any]:
    """Run a configuration in a process of its own and return what it measured; an empty dict if it fails or takes too long."""
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(
            [sys.executable, __file__, "--child", name, "--steps", str(steps)],
            capture_output=True,
            text=True,
            check=False,
            env=environment,
            timeout=STEP_LIMIT_S * steps,
        )
    except subprocess.TimeoutExpired:
        print(f"{name:28} stopped: its {steps} steps take more than {STEP_LIMIT_S * steps} s", flush=True)
        return {}
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            result: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
            print(f"{name:28} {result['tokens_per_s']:6.0f} tokens/s {result['peak_bytes'] / 1e9:5.1f} GB", flush=True)
            return result
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    print(f"{name:28} failed: {last}", flush=True)
    return {}


def mean_of(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return runs of one configuration as one: the mean speed, the largest memory, what each run gave, the first's losses."""
    speeds = [run["tokens_per_s"] for run in runs]
    peak = max(run["peak_bytes"] for run in runs)
    return {**runs[0], "tokens_per_s": sum(speeds) / len(speeds), "peak_bytes": peak, "runs": speeds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3, help="steps of each TRL configuration, the first not timed")
    parser.add_argument(
        "--curve", type=int, default=12, help="steps of Lorikeet and of TRL's two fastest, in each round"
    )
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/tuning.json"))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.steps)
        return
    mine = {name: measure(name, options.curve) for name in OURS if name != BEST}
    swept = {name: result for name in TRL if (result := measure(name, options.steps))}
    leaders = sorted(swept, key=lambda name: swept[name]["tokens_per_s"], reverse=True)[:2]
    rates, turns = [gemm_rate()], list[dict[str, dict[str, Any]]]()
    for _ in range(ROUNDS):
        turns.append({name: measure(name, options.curve) for name in (BEST, *leaders)})
        rates.append(gemm_rate())
    means = {name: mean_of([turn[name] for turn in turns]) for name in (BEST, *leaders)}
    best, rate = means.pop(BEST), max(rates)
    mine = {BEST: best, **mine}
    swept |= means
    fastest = max(leaders, key=lambda name: swept[name]["tokens_per_s"])
    # Packing puts other conversations into a step; losses are compared where both see the same ones.
    alike = max((n for n in swept if not TRL[n].get("packing")), key=lambda name: swept[name]["tokens_per_s"])
    curve = means.get(alike) or measure(alike, min(LOSSES, options.curve))
    trl = swept[fastest]["tokens_per_s"]
    result = {
        "ours_tokens_per_s": best["tokens_per_s"],
        "trl_tokens_per_s": trl,
        "ratio": best["tokens_per_s"] / trl,
        "ours_peak_bytes": best["peak_bytes"],
        "trl_peak_bytes": swept[fastest]["peak_bytes"],
        "memory_share": best["peak_bytes"] / swept[fastest]["peak_bytes"],
        "gemm_fraction": best["tokens_per_s"] * best["flops_per_token"] / rate,
        "gemm_flops_per_s": rate,
        "flops_per_token": best["flops_per_token"],
        "ours": {name: {k: v for k, v in r.items() if k != "losses"} for name, r in mine.items()},
        "trl_fastest": fastest,
        "trl": {name: {k: v for k, v in r.items() if k != "losses"} for name, r in swept.items()},
        "losses": {BEST: best["losses"], alike: curve["losses"]},
    }
    rows = [(n, f"{r['tokens_per_s']:.0f}", f"{r['peak_bytes'] / 1e9:.1f}") for n, r in mine.items()]
    rows += [(f"TRL, {n}", f"{r['tokens_per_s']:.0f}", f"{r['peak_bytes'] / 1e9:.1f}") for n, r in swept.items()]
    print("\n" + table(("What", "tokens/s", "GB at most"), rows))
    print(
        f"\n{result['ratio']:.1f} times TRL's fastest ({fastest}) at {result['memory_share']:.0%} of its memory, "
        f"{result['gemm_fraction']:.0%} of the bf16 GEMM rate"
    )
    print(
        "\n"
        + table(
            ("Step", "Lorikeet", f"TRL, {alike}"),
            [
                (str(n), f"{a:.4f}", f"{b:.4f}")
                for n, (a, b) in enumerate(zip(best["losses"], curve["losses"], strict=False), start=1)
            ],
        )
    )
    stamp(options.json, result)


if __name__ == "__main__":
    main()
