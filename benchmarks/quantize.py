"""Quantised files beside the reference quantiser's: error of every tensor, KL to f16, time and memory.

    python benchmarks/quantize.py --reference VENV/lib/python3.11/site-packages/ik_llama_cpp/bin/llama-quantize

Both quantise one f16 model with one importance matrix into the same types. The models are the packaged one, whose rows
of 576 no block of 256 divides, and the same function widened to rows of 768: some inputs of every layer stand twice,
with their weights shared out, and the gains of the norms are multiplied into the weights (Net2Wider, arXiv 1511.05641).
Seconds and gigabytes are of whole processes; ours reads the Hugging Face folder, the reference a GGUF file in f16. The last
table is how KL falls with the conversations that the importance matrix is made from.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from gguf import GGUFReader, quants
from numpy.typing import NDArray
from report import ROOT, stamp, table
from safetensors.torch import load_file, save_file

from lorikeet.compare import ratio_interval
from lorikeet.config import PACKAGED_DATA, PACKAGED_MODEL, Quant
from lorikeet.data.load import load_conversations
from lorikeet.engine import LlamaEngine
from lorikeet.export.gguf import namer, write_gguf
from lorikeet.export.imatrix import Importance, collect
from lorikeet.export.mix import FILE_TYPES
from lorikeet.prompt import PromptFormat
from lorikeet.scoring import Scorer
from lorikeet.weights import quiet_transformers, resolve_model

CALIBRATION, HELD_OUT_TOKENS = 128, 2000
HEADS, KEY_HEADS, HEAD_WIDTH, WIDTH = 9, 3, 64, 576
QUANTS = tuple(quant for quant in reversed(get_args(Quant)) if quant != "f16")
MATRIX_CONVERSATIONS = (0, 16, 32, 64, 128)
RESAMPLES = 10_000
INSTALL = "the reference is in the package ik-llama-cpp-python: pip install it --no-deps into another environment"


def widen(source: Path, target: Path) -> None:
    """Write SmolLM2 with rows of 768, the same function: every third input of a layer twice, a fourth group of heads.

    A doubled input of the residual stream is the old one over sqrt(2), in and out, so that norms see the same sum of
    squares; the added heads are those of the last group again, and each of the two gives half of the output.
    """
    weights = {name: value.float() for name, value in load_file(source / "model.safetensors").items()}
    doubled = torch.arange(0, WIDTH, 3)
    place = torch.cat([torch.arange(WIDTH), doubled])
    share = torch.ones(WIDTH)
    share[doubled] = 0.5**0.5
    share = share[place]
    queries = torch.arange(HEADS * HEAD_WIDTH)
    again = queries[-HEADS // KEY_HEADS * HEAD_WIDTH :]
    heads, half = torch.cat([queries, again]), torch.ones(HEADS * HEAD_WIDTH)
    half[again] = 0.5
    keys = torch.arange(KEY_HEADS * HEAD_WIDTH)
    keys = torch.cat([keys, keys[-HEAD_WIDTH:]])
    stretch = (WIDTH / len(place)) ** 0.5
    wide: dict[str, torch.Tensor] = {
        "model.embed_tokens.weight": weights["model.embed_tokens.weight"][:, place] * share
    }
    gain = weights["model.norm.weight"]
    wide["lm_head.weight"] = (weights["model.embed_tokens.weight"] * gain)[:, place] * share
    wide["model.norm.weight"] = torch.full((len(place),), stretch)
    for name, value in weights.items():
        layer = name.rpartition("layers.")[2].split(".")[0]
        before = weights.get(f"model.layers.{layer}.input_layernorm.weight")
        after = weights.get(f"model.layers.{layer}.post_attention_layernorm.weight")
        if name.endswith("layernorm.weight"):
            wide[name] = torch.full((len(place),), stretch)
        elif "q_proj" in name or "k_proj" in name or "v_proj" in name:
            wide[name] = ((value * before)[:, place] * share)[heads if "q_proj" in name else keys]
        elif "o_proj" in name:
            wide[name] = ((value * half)[:, heads])[place] * share[:, None]
        elif "gate_proj" in name or "up_proj" in name:
            wide[name] = (value * after)[:, place] * share
        elif "down_proj" in name:
            wide[name] = value[place] * share[:, None]
    config = json.loads((source / "config.json").read_text())
    config |= {"hidden_size": len(place), "num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": HEAD_WIDTH}
    config |= {"tie_word_embeddings": False, "dtype": "float16", "rms_norm_eps": config["rms_norm_eps"] * stretch**2}
    target.mkdir()
    (target / "config.json").write_text(json.dumps(config))
    save_file({name: value.half().contiguous() for name, value in wide.items()}, target / "model.safetensors")
    for file in source.iterdir():
        if file.name.startswith(("tokenizer", "special_tokens", "chat_template", "vocab", "merges")):
            (target / file.name).write_bytes(file.read_bytes())


def save_legacy(importance: Importance, path: Path) -> None:
    """Write the matrix in the format that quantisers read before GGUF: means of squares, as of one call."""
    with path.open("wb") as file:
        file.write(struct.pack("<i", len(importance.sums)))
        for name in sorted(importance.sums):
            mean = importance.of(name)
            assert mean is not None
            file.write(struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", 1, len(mean)))
            file.write(mean.astype("<f4").tobytes())
        file.write(struct.pack("<ii", 1, 1) + b"c")


def run(command: Sequence[str | Path]) -> tuple[float, float]:
    """Return seconds and gigabytes at most of a command, start and end of the process included."""
    began, peak = time.monotonic(), 0
    with tempfile.TemporaryFile() as output:
        child = subprocess.Popen([str(part) for part in command], stdout=output, stderr=output)
        while child.poll() is None:
            peak = max(peak, _resident_peak(child.pid))
            time.sleep(0.02)
        if child.returncode:
            output.seek(0)
            raise SystemExit(f"{command[0]}: {output.read().decode(errors='replace')[-2000:]}")
    return time.monotonic() - began, peak / 1e9


def _resident_peak(pid: int) -> int:
    """Return the most memory that a process has held, in bytes; what wait4 says includes the parent it was forked from."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else 0


def compare(ours: Path, reference: Path, exact: Path, importance: Importance | None) -> dict[str, Any]:
    """Return the largest and the mean ratio of our error to the reference's over all tensors, and what differs."""
    files = [{t.name: t for t in GGUFReader(path).tensors} for path in (ours, reference, exact)]
    ratios: dict[str, dict[str, float]] = {"plain": {}, "weighted": {}}
    unlike = []
    for name, mine in files[0].items():
        other, true = files[1][name], files[2][name]
        if mine.tensor_type != other.tensor_type or mine.n_bytes != other.n_bytes:
            unlike.append(f"{name}: {mine.tensor_type.name} {other.tensor_type.name}")
            continue
        if mine.tensor_type.name in {"F32", "F16"}:
            continue
        target = quants.dequantize(true.data, true.tensor_type)
        errors = [np.square(quants.dequantize(t.data, t.tensor_type) - target) for t in (mine, other)]
        by_column = importance.of(name) if importance else None
        for kind, weights in (("plain", None), ("weighted", by_column)):
            if kind == "plain" or weights is not None:
                first, second = (float((e if weights is None else e * weights).mean()) ** 0.5 for e in errors)
                ratios[kind][name] = first / second if second else 1.0 + first
    found: dict[str, Any] = {"unlike": unlike, "tensors": len(ratios["plain"])}
    for kind, values in ratios.items():
        if values:
            worst = max(values, key=values.__getitem__)
            found[kind] = {"worst": values[worst], "worst_tensor": worst, "mean": float(np.mean(list(values.values())))}
            found[kind]["above"] = sum(value > 1.0 + 1e-6 for value in values.values())
    return found


def log_probabilities(file: Path, rows: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
    """Return ln p of every next token at every place of each row, by llama.cpp, shape (places, vocabulary) each."""
    found = []
    with LlamaEngine(file, scoring=True, context_tokens=2048) as engine:
        scorer = Scorer(engine)
        for ids in rows:
            logits = np.concatenate(list(scorer.logits(ids, np.arange(len(ids) - 1))))
            logits -= logits.max(axis=1, keepdims=True)
            found.append(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))
    return found


@dataclass(frozen=True)
class Divergence:
    """KL in nats of f16 to a file, at every place of each conversation, and whether both choose the same token."""

    kl: list[NDArray[np.float64]]
    same: list[NDArray[np.bool_]]

    @classmethod
    def of(cls, exact: Sequence[NDArray[np.float32]], file: Path, rows: Sequence[Sequence[int]]) -> Divergence:
        """Ask llama.cpp with `file`."""
        other = log_probabilities(file, rows)
        kl = [np.einsum("ij,ij->i", np.exp(p), p - q, dtype=np.float64) for p, q in zip(exact, other, strict=True)]
        return cls(kl, [p.argmax(axis=1) == q.argmax(axis=1) for p, q in zip(exact, other, strict=True)])

    def row(self) -> dict[str, float]:
        """Return mean, 99th percentile and largest KL, and how often the first choice is the same."""
        kl = np.concatenate(self.kl)
        same = float(np.concatenate(self.same).mean())
        return {"kl": float(kl.mean()), "kl_99": float(np.quantile(kl, 0.99)), "kl_max": float(kl.max()), "top_1": same}

    def minus(self, other: Divergence) -> dict[str, float]:
        """Return the difference of the mean KL from `other`'s, with its 95 % bootstrap interval over conversations."""
        sums = np.array([float((a - b).sum()) for a, b in zip(self.kl, other.kl, strict=True)])
        counts = np.array([len(a) for a in self.kl], dtype=np.int64)
        return asdict(ratio_interval(sums, counts, level=0.95, resamples=RESAMPLES, seed=0))


def measure(folder: Path, reference: Path, work: Path, label: str) -> Iterator[dict[str, Any]]:
    """Yield one result for each type of file, with and without the importance matrix where both are of use."""
    prompt = PromptFormat.load(folder)
    conversations = load_conversations(PACKAGED_DATA).conversations
    encoded = [prompt.encode(conversation).ids for conversation in conversations]
    rows = held_out(encoded)
    importance = collect(folder, encoded[:CALIBRATION], name_of=namer(folder), dtype="float32")
    matrix, legacy, exact = work / "imatrix.gguf", work / "imatrix.dat", work / "f16.gguf"
    importance.save(matrix, dataset=PACKAGED_DATA)
    save_legacy(importance, legacy)
    write_gguf(folder, exact, quant="f16", name=label)
    truth = log_probabilities(exact, rows)
    for quant in QUANTS:
        for with_matrix in (False, True) if FILE_TYPES[quant].four_bit else (False,):
            ours, theirs = work / "ours.gguf", work / "theirs.gguf"
            child = [sys.executable, Path(__file__), "--write", folder, ours, quant, *([matrix] if with_matrix else [])]
            mine = run(child)
            types = {t.name: t.tensor_type.name for t in GGUFReader(ours).tensors if len(t.shape) > 1}
            rules = ",".join(f"^{re.escape(name)}$={_reference_type(kind)}" for name, kind in types.items())
            options = ["--custom-q", rules, *(["--imatrix", legacy] if with_matrix else [])]
            its = run([reference, *options, exact, theirs, quant.upper(), str(os.cpu_count())])
            result = {"model": label, "quant": quant, "importance": with_matrix}
            result |= {
                "bytes": ours.stat().st_size,
                "bytes_reference": theirs.stat().st_size,
                "errors": compare(ours, theirs, exact, importance if with_matrix else None),
            }
            found = [Divergence.of(truth, file, rows) for file in (ours, theirs)]
            for who, used, kl in zip(("ours", "reference"), (mine, its), found, strict=True):
                result[who] = {"seconds": used[0], "gigabytes": used[1], **kl.row()}
            result["kl_minus_reference"] = found[0].minus(found[1])
            yield result


def measure_sizes(folder: Path, work: Path) -> Iterator[dict[str, Any]]:
    """Yield KL of our Q4_K_M by how many conversations its importance matrix is from; each beside none at all."""
    prompt = PromptFormat.load(folder)
    encoded = [prompt.encode(conversation).ids for conversation in load_conversations(PACKAGED_DATA).conversations]
    rows = held_out(encoded)
    exact, ours = work / "sizes-f16.gguf", work / "sizes.gguf"
    write_gguf(folder, exact, quant="f16", name="exact")
    truth = log_probabilities(exact, rows)
    none: Divergence | None = None
    for count in MATRIX_CONVERSATIONS:
        importance = collect(folder, encoded[:count], name_of=namer(folder), dtype="float32") if count else None
        write_gguf(folder, ours, quant="q4_k_m", name="ours", importance=importance)
        found = Divergence.of(truth, ours, rows)
        none = none or found
        tokens = importance.tokens if importance else 0
        taken = importance.conversations if importance else 0
        yield {"conversations": taken, "tokens": tokens, **found.row(), "kl_minus_none": found.minus(none)}


def held_out(encoded: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    """Return the first conversations after those of the matrix that have `HELD_OUT_TOKENS` together.

    The rule by which importance is weighed was picked on the last ones of the file.
    """
    return list(_up_to(encoded[CALIBRATION:], HELD_OUT_TOKENS))


def _reference_type(kind: str) -> str:
    return kind.lower().replace("_k", "_K")


def _up_to(rows: Any, tokens: int) -> Any:
    for row in rows:
        if tokens <= 0:
            return
        tokens -= len(row)
        yield row


def show(results: list[dict[str, Any]], sizes: list[dict[str, Any]]) -> str:
    """Return the tables for the README."""
    head = ["Model", "Type", "Matrix", "MB", "KL", "KL, reference", "Difference, 95 %", "Error, worst tensor"]
    head += ["Error, mean", "Same token", "s", "s, reference", "GB", "GB, reference"]
    lines = []
    for result in results:
        ours, other, errors = result["ours"], result["reference"], result["errors"]
        of = errors["weighted" if result["importance"] else "plain"]
        line = [result["model"], result["quant"], "yes" if result["importance"] else "no"]
        line += [f"{result['bytes'] / 1e6:.0f}", f"{ours['kl']:.4f}", f"{other['kl']:.4f}"]
        line += [_interval(result["kl_minus_reference"]), f"{of['worst']:.3f}", f"{of['mean']:.3f}"]
        line += [f"{ours['top_1']:.3f}", f"{ours['seconds']:.1f}", f"{other['seconds']:.1f}"]
        lines.append([*line, f"{ours['gigabytes']:.2f}", f"{other['gigabytes']:.2f}"])
    by_size = [
        [str(row["conversations"]), str(row["tokens"]), f"{row['kl']:.4f}", _interval(row["kl_minus_none"])]
        for row in sizes
    ]
    return f"{table(head, lines)}\n\n{table(['Conversations', 'Tokens', 'KL', 'Minus none, 95 %'], by_size)}"


def _interval(found: dict[str, float]) -> str:
    return f"{found['value']:+.4f} ({found['low']:+.4f} to {found['high']:+.4f})"


def main() -> None:
    """Measure both models, print the table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, help="path of llama-quantize")
    parser.add_argument("--write", nargs="+", metavar="FOLDER OUT TYPE [MATRIX]", help="quantise only; used by itself")
    options = parser.parse_args()
    quiet_transformers()
    if options.write:
        folder, out, quant, *matrix = options.write
        importance = Importance.load(Path(matrix[0])) if matrix else None
        write_gguf(Path(folder), Path(out), quant=quant, name="ours", importance=importance)
        return
    if options.reference is None or not options.reference.is_file():
        raise SystemExit(f"--reference names no file; {INSTALL}")
    results: list[dict[str, Any]] = []
    sizes: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        base = resolve_model(PACKAGED_MODEL)
        widen(base, work / "wide")
        for folder, label in ((base, "SmolLM2-135M, rows of 576"), (work / "wide", "the same, rows of 768")):
            for result in measure(folder, options.reference, work, label):
                results.append(result)
                print(json.dumps(result), file=sys.stderr, flush=True)
        for row in measure_sizes(base, work):
            sizes.append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
    held = {"held_out_tokens": HELD_OUT_TOKENS, "results": results, "matrix_sizes": sizes}
    stamp(ROOT / "benchmarks" / "results" / "quantize.json", held)
    print(show(results, sizes))


if __name__ == "__main__":
    main()
