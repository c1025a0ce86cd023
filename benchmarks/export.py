"""A model of one billion weights exported and verified within a limit of memory: phases, time and peak of each.

    python benchmarks/export.py --limit-gb 8

The base is a random Llama in the shape of Llama-3.2-1B, with a byte-level BPE tokenizer learned from the packaged
conversations and padded to its vocabulary. `lorikeet tune` takes one step at a learning rate that moves every weight of the
adapter; then `lorikeet export` and `lorikeet verify` run as processes of their own, the address space of each process
limited (RLIMIT_AS), as a container would limit its memory. It needs about 20 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from convert import LLAMA3
from report import ROOT, stamp, table
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from lorikeet.config import PACKAGED_DATA
from lorikeet.data.load import load_conversations

VOCABULARY, HIDDEN, FEED_FORWARD, LAYERS, HEADS, KEY_HEADS, HEAD_WIDTH = 128_256, 2048, 8192, 16, 32, 8, 64
QUANTS = "f16,q8_0,q4_k_m"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PHASE = re.compile(r"^(.*?): \d+ MB in [\d.]+ s$|^(adapter strength .*)$|^verifying (.*)$")
BUDGET = re.compile(r"^(choosing the strength|importance matrix|adapter strength| {2})")
"""What `export` says of what fits into its time."""
SAMPLE_S = 0.05


@dataclass
class Watched:
    """A process and its children, sampled."""

    seconds: float = 0.0
    peak_bytes: int = 0
    code: int = 0
    phases: list[dict[str, Any]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)


def make_tokenizer() -> Any:
    """Return a byte-level BPE with ChatML's tokens, as large as Llama 3's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=8000,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [m.content for c in load_conversations(PACKAGED_DATA).conversations for m in c.messages]
    tokenizer.train_from_iterator(texts, trainer)
    missing = VOCABULARY - tokenizer.get_vocab_size()
    tokenizer.add_special_tokens([AddedToken(f"<|reserved_{number}|>", special=True) for number in range(missing)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = CHATML
    return fast


def make_base(folder: Path) -> Path:
    """Write the random model, bfloat16, head tied, to the new `folder`."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=FEED_FORWARD,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        head_dim=HEAD_WIDTH,
        max_position_embeddings=131_072,
        rms_norm_eps=1e-5,
        rope_parameters=LLAMA3,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    tokenizer = make_tokenizer()
    config.eos_token_id, config.pad_token_id, config.bos_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id, None
    config.architectures = ["LlamaForCausalLM"]
    tokenizer.save_pretrained(folder)
    config.save_pretrained(folder)
    chance = torch.Generator().manual_seed(1)

    def random(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=chance) * 0.02).bfloat16()

    keys = KEY_HEADS * HEAD_WIDTH
    weights = {"model.embed_tokens.weight": random(VOCABULARY, HIDDEN), "model.norm.weight": _ones()}
    for layer in range(LAYERS):
        name = f"model.layers.{layer}."
        weights[name + "input_layernorm.weight"] = _ones()
        weights[name + "post_attention_layernorm.weight"] = _ones()
        weights[name + "self_attn.q_proj.weight"] = random(HIDDEN, HIDDEN)
        weights[name + "self_attn.k_proj.weight"] = random(keys, HIDDEN)
        weights[name + "self_attn.v_proj.weight"] = random(keys, HIDDEN)
        weights[name + "self_attn.o_proj.weight"] = random(HIDDEN, HIDDEN)
        weights[name + "mlp.gate_proj.weight"] = random(FEED_FORWARD, HIDDEN)
        weights[name + "mlp.up_proj.weight"] = random(FEED_FORWARD, HIDDEN)
        weights[name + "mlp.down_proj.weight"] = random(HIDDEN, FEED_FORWARD)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _ones() -> torch.Tensor:
    return torch.ones(HIDDEN, dtype=torch.bfloat16)


def watch(arguments: Sequence[str | Path], *, limit_bytes: int, cache: Path) -> Watched:
    """Run `lorikeet` with `arguments`; a phase ends where it says on stderr that something is done."""
    command = [sys.executable, "-c", "from lorikeet.cli import main; main()", *map(str, arguments)]
    limit: Callable[[], None] | None = None
    if limit_bytes:
        limit = lambda: resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, limit_bytes))  # noqa: E731  # runs in the child
    found = Watched()
    began = last = time.monotonic()
    peak = 0
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=limit,
        env={**os.environ, "LORIKEET_CACHE": str(cache)},
    )
    assert process.stderr is not None
    lines: list[tuple[float, str]] = []
    reader = threading.Thread(target=lambda: lines.extend((time.monotonic(), line.rstrip()) for line in process.stderr))
    reader.start()
    seen = 0
    while process.poll() is None:
        peak = max(peak, tree_bytes(process.pid))
        found.peak_bytes = max(found.peak_bytes, peak)
        for at, line in lines[seen:]:
            seen += 1
            if match := PHASE.match(line):
                what = next(group for group in match.groups() if group)
                found.phases.append({"what": Path(what).name, "seconds": at - last, "gigabytes": peak / 1e9})
                last, peak = at, 0
        time.sleep(SAMPLE_S)
    reader.join()
    found.lines = [line for _, line in lines]
    found.code, found.seconds = process.returncode, time.monotonic() - began
    found.phases.append({"what": "to the end", "seconds": time.monotonic() - last, "gigabytes": peak / 1e9})
    return found


def tree_bytes(pid: int) -> int:
    """Return the memory that a process and all below it hold now, pages of mapped files included."""
    total, waiting = 0, [pid]
    while waiting:
        process = waiting.pop()
        try:
            status = Path(f"/proc/{process}/status").read_text()
            for task in Path(f"/proc/{process}/task").iterdir():
                waiting += map(int, (task / "children").read_text().split())
        except OSError:
            continue  # it has ended
        resident = re.search(r"VmRSS:\s+(\d+) kB", status)
        total += int(resident[1]) * 1024 if resident else 0
    return total


def main() -> None:
    """Make the model, export and verify it, print the table, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit-gb", type=float, default=8.0, help="address space of every process; 0 for no limit")
    parser.add_argument("--work", type=Path, help="where the model and the run lie; kept, and used again")
    parser.add_argument("--skip-verify", action="store_true", help="export alone")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = options.work or Path(scratch)
        limit = int(options.limit_gb * 1e9)
        cache, base, run = work / "cache", work / "base", work / "run"
        if not (base / "model.safetensors").is_file():
            make_base(base)
        if not (run / "adapter").is_dir():
            tune = ["tune", "--model", base, "--data", PACKAGED_DATA, "--out", run, "--max-steps", "1"]
            tune += ["--batch-size", "1", "--gradient-accumulation-steps", "1", "--learning-rate", "0.01"]
            tune += ["--max-length", "256", "--torch-compile", "off"]
            _must(watch(tune, limit_bytes=0, cache=cache), "tune")
        commands = {
            "export": ["export", run, "--formats", "adapter,merged,gguf", "--quant", QUANTS, "--no-verify"],
            "verify": ["verify", run],
        }
        if options.skip_verify:
            del commands["verify"]
        results: dict[str, Any] = {"limit_gigabytes": options.limit_gb, "commands": {}}
        rows = []
        for name, arguments in commands.items():
            found = watch(arguments, limit_bytes=limit, cache=cache)
            for line in found.lines:
                print(line, file=sys.stderr)
            results["commands"][name] = {
                "exit_code": found.code,
                "seconds": round(found.seconds, 1),
                "peak_gigabytes": round(found.peak_bytes / 1e9, 2),
                "phases": found.phases,
                "budget": [line for line in found.lines if BUDGET.match(line)],
            }
            rows += [
                [name, phase["what"], f"{phase['seconds']:.1f}", f"{phase['gigabytes']:.2f}"] for phase in found.phases
            ]
            rows.append([name, "**in all**", f"{found.seconds:.1f}", f"{found.peak_bytes / 1e9:.2f}"])
            # A random model prefers nothing: four bits change most of its first choices, and verify may rightly say no.
            _must(found, name, accepted=(0, 1) if name == "verify" else (0,))
        report = run / "reports" / "parity.json"
        if report.is_file():
            certificate = json.loads(report.read_text(encoding="utf-8"))
            failed = [check["name"] for check in certificate["checks"] if not check["pass"]]
            results["certificate"] = {"checks": len(certificate["checks"]), "failed": failed}
        results["files_bytes"] = {
            str(file.relative_to(run)): file.stat().st_size
            for file in sorted([*run.glob("gguf/*.gguf"), *run.glob("merged/*.safetensors")])
        }
        print(table(["Command", "Phase", "s", "GB, at most"], rows))
        stamp(ROOT / "benchmarks" / "results" / "export.json", results)


def _must(found: Watched, name: str, *, accepted: Sequence[int] = (0,)) -> None:
    if found.code not in accepted:
        raise SystemExit(f"lorikeet {name} exits {found.code}:\n" + "\n".join(found.lines[-20:]))


if __name__ == "__main__":
    main()
