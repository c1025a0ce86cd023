"""The parity certificate: adapter on base = merged weights = each GGUF file = what the served route answers.

    certificate = verify(Path("runs/mine"), VerifyConfig())
    certificate["pass"]                                # written to reports/parity.json and reports/parity.html

The reference is the adapter on its base in torch, as PEFT applies it, asked with the base's own tokenizer and template.
Every check is a number that must be at most its limit. Hashes can be consistent while contents are wrong, so what is
compared is what the files hold and what they answer. The limits are explained in docs/concept/parity.md.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorikeet.card import write_card
from lorikeet.compare import ratio_interval
from lorikeet.config import VerifyConfig, require_positive
from lorikeet.data.encode import encode_all
from lorikeet.data.load import load_conversations
from lorikeet.engine import LlamaEngine
from lorikeet.errors import EngineError, InputError, LorikeetError, MissingExtraError, is_out_of_memory
from lorikeet.export import contents, imatrix, served
from lorikeet.export.checks import Checks
from lorikeet.export.contents import Model
from lorikeet.export.imatrix import Importance
from lorikeet.export.page import write_page
from lorikeet.export.probes import Probes, choose_probes
from lorikeet.export.trained import AdapterModel, Greedy, TorchModel, pick_dtype
from lorikeet.export.vocabulary import end_of_turn
from lorikeet.files import sha256_file, sha256_text, sha256_tree, write_atomic
from lorikeet.gguf_header import Header, read_header
from lorikeet.messages import Conversation, Message
from lorikeet.prompt import PromptFormat, freeze_dates
from lorikeet.run import RunFolder, free_bytes
from lorikeet.weights import base_gguf_path, base_name, model_identity, resolve_model

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Limits:
    """How far an artefact may be from what it was made from."""

    kl_mean: float
    """Mean KL divergence of the next token, in nats."""
    kl_worst: float
    """Largest one of any token compared."""
    top1: float
    """Share of tokens whose most probable choice differs."""
    tie: float
    """A greedy answer may take another token where full precision prefers its own by no more than this, in nats."""
    lost: float
    """Share of the adapter's change that may be missing from the weights, or too much."""


LIMITS = {
    "merged": Limits(kl_mean=0.002, kl_worst=0.05, top1=0.02, tie=0.2, lost=0.02),
    "f16": Limits(kl_mean=0.002, kl_worst=0.05, top1=0.02, tie=0.2, lost=0.02),
    "q8_0": Limits(kl_mean=0.03, kl_worst=0.5, top1=0.12, tie=0.75, lost=0.1),
    "q6_k": Limits(kl_mean=0.15, kl_worst=2.0, top1=0.25, tie=1.0, lost=0.2),
    "q5_k_m": Limits(kl_mean=0.25, kl_worst=3.0, top1=0.3, tie=1.5, lost=0.6),
    "q4_k_m": Limits(kl_mean=0.6, kl_worst=5.0, top1=0.4, tie=2.0, lost=0.6),
    "q4_0": Limits(kl_mean=1.5, kl_worst=10.0, top1=0.55, tie=3.0, lost=0.6),
}
"""By artefact; measured values are in docs/concept/parity.md."""

BFLOAT16_LIMITS = Limits(kl_mean=0.03, kl_worst=0.5, top1=0.12, tie=0.75, lost=0.02)
"""Of `merged` and `f16` where torch computes in bfloat16 because float32 does not fit the memory."""

VALIDATION_LIMIT = 0.05
"""In nats: how far the validation loss, computed here, may be from the one that tuning recorded."""

VALIDATION_TOKENS = 20_000
"""Of the validation part, no more than about this are computed again: all would take minutes."""

FEWEST_ROWS = 8
"""Validation conversations that are computed again however long they are: fewer say nothing of the others."""

FEW_TOKENS = 2
"""Tokens whose first choice may change besides the share allowed: of fifty, one is two per cent."""

USUAL_SHARE = 0.75
"""Share of the kept conversations that have one system prompt above which the run's is that one: tuning took the one that more
than half of all had."""

BLOCKS_LIMIT = 0.01
"""Share of a file's blocks that may be others than rounding the merged weights gives; it is none, or nearly all."""

SCALE_LIMIT = 0.02
"""How far from 1 the number of times that the adapter is in the merged weights may be."""

Say = Callable[[str], None]


@dataclass(slots=True)
class Subject:
    """A run and everything that its certificate is about."""

    run: RunFolder
    manifest: dict[str, Any]
    base: Model
    merged: Model | None
    prompt: PromptFormat
    """The base's own tokenizer, with its template and the run's date: the reference of all tokens."""
    end_of_turn: int
    """The token that ends an answer."""
    probes: Probes
    config: VerifyConfig
    checks: Checks = field(default_factory=Checks)
    headers: dict[str, Header] = field(default_factory=dict)
    """GGUF files that can be read, by their type's name."""
    not_checked: list[str] = field(default_factory=list)
    answers: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    weights: dict[str, dict[str, Any]] = field(default_factory=dict)

    def path(self, quant: str) -> Path:
        """Return where the GGUF file of a type lies."""
        return self.run.root / gguf_name(quant)


@dataclass(frozen=True, slots=True)
class Reference:
    """What the trained model says, in torch."""

    log_probs: list[Floats]
    """Of `probes.rows`, from the adapter; from the merged weights once they are compared."""
    tuned: list[Greedy]
    """Greedy answers of adapter on base."""
    untuned: list[Greedy]
    """Greedy answers of the base alone."""
    adapted: set[str]
    """Weights that the adapter changes."""
    exact: bool
    """Whether torch computed in float32."""


def verify(root: Path, config: VerifyConfig) -> dict[str, Any]:
    """Compare everything that was exported with what was trained; write the reports and return the certificate.

    Raises InputError if there is no run, no adapter or no held-out part, if the base cannot be found, or for settings that
    compare nothing.
    """
    require_positive(config, "conversations", "answers", "answer_tokens")
    began = time.monotonic()
    subject = _open(RunFolder.open(root), config)
    hashes = {name: sha256_tree(root / name) for name in subject.run.certifiable()}
    with _progress(subject) as say:
        _check_records(subject, hashes)
        _check_system_prompt(subject)
        _check_files(subject)
        say("adapter on base, in torch")
        reference = _check_adapter(subject, say)
        if reference is None:
            subject.not_checked.append("merged and GGUF files: there is no adapter to compare them with")
        else:
            if subject.merged is not None:
                say("merged, in torch")
                reference = _check_merged(subject, subject.merged, reference, say)
            for quant in subject.headers:
                _check_gguf(subject, quant, reference, say)
    certificate = _certificate(subject, hashes, reference, seconds=time.monotonic() - began)
    write_atomic(subject.run.reports / "parity.json", json.dumps(certificate, indent=2) + "\n")
    write_page(certificate, subject.manifest, subject.run.reports)
    write_card(subject.run)
    return certificate


def describe(certificate: dict[str, Any]) -> list[str]:
    """Return a certificate in words: its verdict, what failed and why, what was not checked."""
    failed = [check for check in certificate["checks"] if not check["pass"]]
    count, seconds = len(certificate["checks"]), certificate["seconds"]
    lines = [
        f"parity: {f'{len(failed)} of {count} checks FAILED' if failed else f'all {count} checks passed'} in {seconds:.0f} s"
    ]
    for check in failed:
        why = f"; {check['notes'][0]}" if check["notes"] else ""
        lines.append(
            f"  FAILED  {check['name']} ({check['artefact']}): {check['value']}, at most {check['limit']}{why}"
        )
    return [*lines, *(f"  not checked: {line}" for line in certificate["not_checked"])]


def gguf_name(quant: str) -> str:
    """Return the artefact's name of a GGUF type."""
    return f"gguf/model-{quant}.gguf"


# ------------------------------------------------------------------------------------------------------------ opening


def _open(run: RunFolder, config: VerifyConfig) -> Subject:
    manifest = run.manifest()
    run.require("adapter", command="lorikeet tune --resume")
    heldout = run.require("data/heldout.jsonl", command="lorikeet tune")
    base_folder = resolve_model(base_name(manifest["base"]))
    base = Model.open(base_folder)
    prompt = PromptFormat.load(base_folder)
    prompt.template = freeze_dates(prompt.template, date.fromisoformat(manifest["template"]["date"]))
    conversations = load_conversations(str(heldout)).conversations
    probes = choose_probes(conversations, prompt, config, system_prompt=str(manifest.get("system_prompt", "")))
    subject = Subject(run, manifest, base, None, prompt, end_of_turn(prompt), probes, config)
    for name in (
        *("recorded_files", "template", "tokenizer", "rendered_tokens", "one_bos", "stop_token", "tied_head"),
        *("adapter_is_tuned", "merged_config", "unadapted_weights", "system_prompt"),
    ):
        subject.checks.begin(name, artefact="run")
    _find_merged(subject)
    _find_ggufs(subject)
    return subject


def _find_merged(subject: Subject) -> None:
    folder = subject.run.root / "merged"
    if folder.is_dir():
        with _reading(subject, "merged"):
            subject.merged = Model.open(folder)
    elif "merged" in subject.manifest["artefacts"]:
        subject.checks.fault("recorded_files", "merged is in run.json and not here; export again")
    else:
        subject.not_checked.append("merged: it is not here")


def _find_ggufs(subject: Subject) -> None:
    for path in sorted((subject.run.root / "gguf").glob("model-*.gguf"), key=lambda p: -p.stat().st_size):
        quant = path.stem.removeprefix("model-")
        if quant not in LIMITS:
            subject.not_checked.append(f"gguf/{path.name}: its type has no limits here")
            continue
        with _reading(subject, f"gguf/{path.name}"):
            subject.headers[quant] = read_header(path)
    if not subject.headers:
        subject.not_checked.append("GGUF files and the served route: there is none that can be read")


@contextmanager
def _reading(subject: Subject, artefact: str) -> Iterator[None]:
    """Enter whatever is raised in the block under the check `readable`: a file of unknown contents can break a library anywhere.

    Memory that runs out and packages that are missing are the machine's fault and pass through.
    """
    try:
        yield
    except MissingExtraError:
        raise
    except Exception as error:  # the libraries that read have no exception in common
        if is_out_of_memory(error):
            raise
        subject.checks.fault("readable", _line(error), artefact=artefact)


# -------------------------------------------------------------------------------------------------------------- files


def _check_records(subject: Subject, hashes: dict[str, dict[str, str]]) -> None:
    """Compare the files with run.json, and what run.json says of the base with the base."""
    recorded = subject.manifest["artefacts"]
    adapter = recorded["adapter"]["sha256"].get("adapter_model.safetensors")
    for name, found in hashes.items():
        if found != recorded[name]["sha256"]:
            subject.checks.fault("recorded_files", f"{name} is not what run.json records")
        if recorded[name].get("adapter_sha256", adapter) != adapter:
            subject.checks.fault("recorded_files", f"{name} was made from another adapter, says run.json")
        if recorded[name].get("strength", _strength(subject)) != _strength(subject):
            subject.checks.fault("recorded_files", f"{name} was made at another strength, says run.json; export again")
    for quant in subject.headers:
        if gguf_name(quant) not in recorded:
            what = f"{gguf_name(quant)} is not in run.json; remove it, or export it again"
            subject.checks.fault("recorded_files", what)
    base = subject.manifest["base"]
    if model_identity(base["id"], subject.base.folder)["sha256"] != base["sha256"]:
        subject.checks.fault("recorded_files", "the base's weights are not those that were tuned")
    if sha256_text(subject.prompt.template) != subject.manifest["template"]["sha256"]:
        subject.checks.fault("template", "run.json records another template than the base's")


def _check_system_prompt(subject: Subject) -> None:
    """Compare the system prompt that answers are led by with those of the conversations which tuning kept."""
    led_by = str(subject.manifest.get("system_prompt", ""))
    kept: Counter[str] = Counter()
    for name in ("data/calibration.jsonl", "data/validation.jsonl", "data/heldout.jsonl"):
        path = subject.run.root / name
        for conversation in load_conversations(str(path)).conversations if path.is_file() else ():
            first = conversation.messages[0]
            kept[first.content if first.role == "system" else ""] += 1
    if not kept:
        return
    usual, count = kept.most_common(1)[0]
    if led_by and led_by not in kept:
        what = f"run.json says {led_by[:60]!r}, which leads none of the conversations that tuning kept"
        subject.checks.fault("system_prompt", what)
    elif led_by != usual and count > USUAL_SHARE * kept.total():
        what = f"run.json says {led_by[:60]!r}; {count} of {kept.total()} kept conversations say {usual[:60]!r}"
        subject.checks.fault("system_prompt", what)


def _check_files(subject: Subject) -> None:
    """Compare tokenizers, templates, stop tokens, heads and configurations, without running anything."""
    checks, prompt = subject.checks, subject.prompt
    for name in ("adapter", *(["merged"] if subject.merged else [])):
        with _reading(subject, name):
            _check_tokenizer_folder(subject, name)
    for quant, header in subject.headers.items():
        artefact = gguf_name(quant)
        if header.metadata.get("tokenizer.chat_template") != prompt.template:
            checks.fault("template", f"{artefact}: its chat template is not the base's")
        if bool(header.metadata.get("tokenizer.ggml.add_bos_token")) != (prompt.bos_id is not None):
            checks.fault(
                "one_bos", f"{artefact}: add_bos_token is {header.metadata.get('tokenizer.ggml.add_bos_token')}"
            )
        stops = {header.metadata.get(f"tokenizer.ggml.{role}_token_id") for role in ("eos", "eot", "eom")}
        if subject.end_of_turn not in stops:
            checks.fault("stop_token", f"{artefact}: {_token(subject)} is not its end of text or of turn")
    merged = subject.merged
    if merged is not None:
        with _reading(subject, "merged"):
            if subject.end_of_turn not in merged.stop_ids() and merged.stop_ids() != subject.base.stop_ids():
                checks.fault("stop_token", f"merged: {_token(subject)} is not in its eos_token_id")
            for fault in contents.changed_settings(subject.base.folder, merged.folder):
                checks.fault("merged_config", fault)
    for fault in contents.head_faults(subject.base, merged, {gguf_name(q): h for q, h in subject.headers.items()}):
        checks.fault("tied_head", fault)


def _check_tokenizer_folder(subject: Subject, name: str) -> None:
    """Compare the tokenizer and template of `adapter` or `merged` with the base's, by what they do."""
    checks, wanted = subject.checks, subject.prompt
    try:
        found = PromptFormat.load(subject.run.root / name)
    except InputError as error:
        checks.fault("tokenizer", f"{name}: {_line(error)}")
        return
    if found.template != wanted.template:
        checks.fault("template", f"{name}: its chat template is not the base's")
    if found.tokenizer.get_vocab() != wanted.tokenizer.get_vocab():
        checks.fault("tokenizer", f"{name}: its vocabulary is not the base's")
    for role in ("bos_token_id", "pad_token_id", "unk_token_id"):
        if getattr(found.tokenizer, role) != getattr(wanted.tokenizer, role):
            checks.fault("tokenizer", f"{name}: {role} is {getattr(found.tokenizer, role)}")
    if found.tokenizer.eos_token_id != wanted.tokenizer.eos_token_id:
        checks.fault("stop_token", f"{name}: eos_token_id is {found.tokenizer.eos_token_id}")
    if found.bos_id != wanted.bos_id:
        checks.fault("one_bos", f"{name}: its tokenizer {'adds' if found.bos_id is not None else 'does not add'} a BOS")
    for messages in subject.probes.prompts:
        _compare_tokens(subject, name, messages, found.prompt_ids(messages))


def _compare_tokens(subject: Subject, artefact: str, messages: Sequence[Message], ids: list[int]) -> None:
    """Compare the tokens of a prompt with the reference's, and count the BOS that it begins with."""
    wanted = subject.prompt.prompt_ids(messages)
    if ids != wanted:
        place = next(
            (i for i, (a, b) in enumerate(zip(ids, wanted, strict=False)) if a != b), min(len(ids), len(wanted))
        )
        subject.checks.fault("rendered_tokens", f"{artefact}: {messages[-1].content[:40]!r} differs from token {place}")
    bos = subject.prompt.tokenizer.bos_token_id
    if bos is not None and _leading(ids, bos) != min(1, _leading(wanted, bos)):
        subject.checks.fault("one_bos", f"{artefact}: a prompt begins with {_leading(ids, bos)} BOS")


def _leading(ids: Sequence[int], token: int) -> int:
    return next((count for count, index in enumerate(ids) if index != token), len(ids))


# -------------------------------------------------------------------------------------------------------------- torch


def _check_adapter(subject: Subject, say: Say) -> Reference | None:
    """Ask the adapter on its base, and compare the merged weights with what PEFT makes of them; None if it cannot be asked."""
    run, config, probes = subject.run, subject.config, subject.probes
    dtype = pick_dtype(subject.base.weights, free_bytes())
    prompts = [subject.prompt.prompt_ids(_led(subject, question)) for question in probes.questions]
    greedy: dict[str, Any] = {"stop_ids": {subject.end_of_turn}, "most_tokens": config.answer_tokens}
    reference = None
    with _reading(subject, "adapter"):
        _check_scale_setting(subject)
        _check_adapter_is_tuned(subject)
        with AdapterModel.on(subject.base.folder, run.root / "adapter", dtype) as model:
            log_probs = model.log_probs(probes.rows)
            say("the adapter's validation loss")
            _check_validation_loss(subject, model)
            say("greedy answers of adapter and base")
            tuned, untuned = model.answer(prompts, **greedy), model.base_answer(prompts, **greedy)
            reference = Reference(log_probs, tuned, untuned, model.adapted(), str(dtype) == "torch.float32")
            if subject.merged is not None:
                say("merged weights against PEFT's")
                with _reading(subject, "merged"):
                    _check_merged_weights(subject, model, subject.merged)
    return reference


def _check_adapter_is_tuned(subject: Subject) -> None:
    """Compare the adapter with the checkpoint that it came from, and its hash with the one that tuning left."""
    run, tuned = subject.run, subject.manifest.get("tuned", {})
    adapter = run.root / "adapter" / "adapter_model.safetensors"
    if tuned.get("adapter_sha256", found := sha256_file(adapter)) != found:
        subject.checks.fault("adapter_is_tuned", "adapter: its weights are not those that tuning recorded at its end")
    checkpoint = run.root / "checkpoints" / f"step-{tuned.get('best_step', 0):06d}" / "adapter.safetensors"
    if not checkpoint.is_file():
        subject.not_checked.append("adapter against its checkpoint: it is gone")
        return
    grown = subject.manifest["config"]["tune"].get("init_lora_weights") == "pissa"
    for fault in contents.checkpoint_faults(checkpoint, adapter, grown=grown):
        subject.checks.fault("adapter_is_tuned", fault)


def _check_validation_loss(subject: Subject, model: AdapterModel) -> None:
    """Compare the validation loss with the one that tuning recorded, on the first `VALIDATION_TOKENS` where there are more."""
    validation = subject.run.root / "data" / "validation.jsonl"
    recorded = subject.manifest.get("tuned", {}).get("best_val_loss")
    if not validation.is_file() or not isinstance(recorded, float) or not math.isfinite(recorded):
        subject.not_checked.append("the adapter's validation loss: tuning recorded none")
        return
    settings = subject.manifest["config"]["tune"]
    encoding = encode_all(
        subject.prompt,
        [c.with_system(settings["system_prompt"]) for c in load_conversations(str(validation)).conversations],
        max_length=settings["max_length"],
        on_long=settings["on_long"],
    )
    ends = np.cumsum([len(row.ids) for row in encoding.rows])
    rows = encoding.rows[: max(FEWEST_ROWS, int((ends <= VALIDATION_TOKENS).sum()))]
    with model.at_strength(1 / _strength(subject)):
        sums, counts = model.losses(rows)
    found = float(sums.sum() / counts.sum())
    notes, limit = [f"tuning recorded {recorded:.4f}, here it is {found:.4f}"], VALIDATION_LIMIT
    if len(rows) < len(encoding.rows):
        drawn = ratio_interval(sums, counts, level=0.99, resamples=10_000, seed=0)
        limit = round(limit + (drawn.high - drawn.low) / 2, 4)
        notes.append(
            f"on {len(rows)} of {len(encoding.rows)} conversations, so the limit has the noise of the draw in it"
        )
    subject.checks.add("validation_loss", abs(found - recorded), limit, artefact="adapter", notes=notes)


def _check_scale_setting(subject: Subject) -> None:
    """Compare the strength that the adapter's own configuration gives it with the run's."""
    found = json.loads((subject.run.root / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    wanted = subject.manifest["config"]["tune"]
    scale, expected = (
        c["lora_alpha"] / (math.sqrt(c[rank]) if c["use_rslora"] else c[rank])
        for c, rank in ((found, "r"), (wanted, "lora_r"))
    )
    expected *= _strength(subject)
    note = f"alpha / r is {scale:g} in adapter_config.json, {expected:g} by run.json"
    subject.checks.add("adapter_scale", abs(scale / expected - 1), SCALE_LIMIT, artefact="adapter", notes=[note])


def _check_merged_weights(subject: Subject, model: AdapterModel, merged: Model) -> None:
    checks = subject.checks
    found = model.compare_merged(merged.weights)
    notes = [*found.faults, f"worst in {found.worst_tensor}"] if found.worst_tensor else found.faults
    worst = math.inf if found.faults else found.worst
    checks.add("merged_weights", worst, 1.0, artefact="merged", notes=notes)
    if math.isfinite(found.scale):
        note = f"the adapter is in the merged weights {found.scale:.4f} times"
        checks.add("adapter_scale", abs(found.scale - 1), SCALE_LIMIT, artefact="merged", notes=[note])
    for fault in contents.changed_weights(subject.base.weights, merged.weights, found.names):
        checks.fault("unadapted_weights", fault)


def _check_merged(subject: Subject, merged: Model, reference: Reference, say: Say) -> Reference:
    """Compare the merged model's predictions with the adapter's, and make them the reference of the GGUF files."""
    dtype = "float32" if reference.exact else "bfloat16"
    limits = LIMITS["merged"] if reference.exact else BFLOAT16_LIMITS
    with _reading(subject, "merged"):
        with TorchModel.load(merged.folder, dtype) as model:
            found = model.log_probs(subject.probes.rows)
        if _compare_predictions(subject, "merged", "merged", reference.log_probs, found, limits):
            reference = replace(reference, log_probs=found)
    say("merged compared")
    return reference


def _compare_predictions(
    subject: Subject, name: str, artefact: str, wanted: Iterable[Floats], found: Iterable[Floats], limits: Limits
) -> bool:
    """Add mean and worst KL divergence and top-1 changes; return whether there are as many tokens to choose from."""
    divergences: list[NDArray[np.float64]] = []
    changes: list[NDArray[np.bool_]] = []
    worst_place = ("", 0)
    for origin, row, p, q in zip(subject.probes.origins, subject.probes.rows, wanted, found, strict=True):
        if p.shape != q.shape:
            note = f"it has {q.shape[1]} tokens to choose from, the tuned model {p.shape[1]}"
            subject.checks.add(f"kl_mean_{name}", math.inf, limits.kl_mean, artefact=artefact, notes=[note])
            return False
        kl = divergence(p, q)
        if kl.size and (not divergences or not kl.max() <= max(part.max() for part in divergences)):
            worst_place = (origin, int(row.places[int(kl.argmax())]) + 1)
        divergences.append(kl)
        changes.append(p.argmax(axis=1) != q.argmax(axis=1))
    kl, changed = np.concatenate(divergences), np.concatenate(changes)
    where = [f"worst at token {worst_place[1]} of {worst_place[0]}"]
    count = [f"{int(changed.sum())} of {len(changed)} tokens"]
    subject.checks.add(f"kl_mean_{name}", float(kl.mean()), limits.kl_mean, artefact=artefact)
    subject.checks.add(f"kl_worst_{name}", float(kl.max()), limits.kl_worst, artefact=artefact, notes=where)
    top1 = round(limits.top1 + FEW_TOKENS / len(changed), 4)
    subject.checks.add(f"top1_changed_{name}", float(changed.mean()), top1, artefact=artefact, notes=count)
    return True


def divergence(wanted: Floats, found: Floats) -> NDArray[np.float64]:
    """Return KL(wanted || found) of each row of ln p, in nats, shape (rows,) (Kullback and Leibler, 1951)."""
    kl = np.einsum("ij,ij->i", np.exp(wanted), wanted - found, dtype=np.float64)
    return np.asarray(np.maximum(kl, 0.0))


# --------------------------------------------------------------------------------------------------------------- GGUF


def _check_gguf(subject: Subject, quant: str, reference: Reference, say: Say) -> None:
    """Compare a GGUF file's contents, its predictions, its tokens and its answers, alone and served."""
    artefact, path = gguf_name(quant), subject.path(quant)
    limits = LIMITS[quant]
    if quant == "f16" and not reference.exact:
        limits = BFLOAT16_LIMITS
    say(f"{artefact}: contents")
    with _reading(subject, artefact):
        _check_gguf_contents(subject, quant, limits, reference)
    say(f"{artefact}: predictions")
    with _reading(subject, artefact):
        found = served.log_probs(path, subject.probes.rows)
        _compare_predictions(subject, quant, artefact, reference.log_probs, found, limits)
        say(f"{artefact}: tokens and answers")
        alone = _check_engine(subject, quant)
        say(f"{artefact}: answers of the server")
        _check_route(subject, quant, alone)
        _check_greedy(subject, quant, alone, reference, limits)


def _check_gguf_contents(subject: Subject, quant: str, limits: Limits, reference: Reference) -> None:
    artefact, checks, header = gguf_name(quant), subject.checks, subject.headers[quant]
    checks.begin(f"header_{quant}", artefact=artefact)
    for fault in (
        *contents.header_faults(header, subject.base, quant),
        *contents.vocabulary_faults(header, subject.prompt),
    ):
        checks.fault(f"header_{quant}", fault, artefact=artefact)
    if subject.merged is None:
        note = "there is no merged that can be read to compare it with; export again"
        checks.add(f"weights_{quant}", math.inf, 1.0, artefact=artefact, notes=[note])
        return
    _check_blocks(subject, quant, subject.merged, reference)
    found = contents.compare_weights(subject.path(quant), subject.base, subject.merged, reference.adapted)
    subject.weights[quant] = found.by_type
    worst = math.inf if found.faults else found.worst
    checks.add(f"weights_{quant}", worst, 1.0, artefact=artefact, notes=[*found.faults, found.worst_tensor])
    if math.isfinite(found.kept):
        limit = round(limits.lost + 4 * found.kept_error, 4)
        note = f"the file holds {found.kept:.4f} of what the adapter changed (rounding alone: +-{found.kept_error:.4f})"
        checks.add(f"tuning_lost_{quant}", abs(1 - found.kept), limit, artefact=artefact, notes=[note])


def _check_blocks(subject: Subject, quant: str, merged: Model, reference: Reference) -> None:
    """Round the merged weights again and compare with what the file holds: no other run's give the same."""
    artefact, importance = gguf_name(quant), None
    if "quantize.imatrix.file" in subject.headers[quant].metadata:
        importance = Importance.load(subject.run.root / "data" / imatrix.FILE)
    found = contents.changed_blocks(subject.path(quant), merged, reference.adapted, importance)
    if not math.isnan(found):
        note = f"{found:.1%} of the blocks compared are not what rounding merged gives; remove the file, export again"
        subject.checks.add(f"blocks_{quant}", found, BLOCKS_LIMIT, artefact=artefact, notes=[note])


def _check_engine(subject: Subject, quant: str) -> list[served.Answer]:
    """Compare the tokens that the file's own template and tokenizer give; return its answers to the reference's tokens."""
    checks, artefact, probes = subject.checks, gguf_name(quant), subject.probes
    longest = max(len(subject.prompt.prompt_ids(p)) for p in (*probes.prompts, *probes.questions))
    with LlamaEngine(subject.path(quant), context_tokens=longest + subject.config.answer_tokens + 64) as engine:
        for messages in probes.prompts:
            _compare_tokens(subject, artefact, messages, engine.tokenize(engine.render(messages)))
        question = subject.prompt.prompt_ids(_led(subject, probes.questions[0]))
        if not served.stops_at(engine, question, subject.end_of_turn):
            checks.fault("stop_token", f"{artefact}: generation goes on after {_token(subject)}")
        return [
            served.answer_alone(
                engine, subject.prompt.prompt_ids(_led(subject, q)), most_tokens=subject.config.answer_tokens
            )
            for q in probes.questions
        ]


def _check_route(subject: Subject, quant: str, alone: list[served.Answer]) -> None:
    """Ask the real server, from outside, and compare with what the engine answers to the reference's tokens."""
    checks, artefact = subject.checks, gguf_name(quant)
    for name in (f"served_prompt_{quant}", f"served_answers_{quant}"):
        checks.begin(name, artefact=artefact)
    try:
        with served.serving(subject.run.root, quant) as url:
            routed = [served.ask(url, q, most_tokens=subject.config.answer_tokens) for q in subject.probes.questions]
    except EngineError as error:
        checks.fault(f"served_answers_{quant}", _line(error), artefact=artefact)
        return
    for question, engine, route in zip(subject.probes.questions, alone, routed, strict=True):
        asked = repr(question[-1].content[:60])
        if route.prompt_tokens != engine.prompt_tokens:
            what = f"{asked}: the server read {route.prompt_tokens} tokens, not {engine.prompt_tokens}"
            checks.fault(f"served_prompt_{quant}", what, artefact=artefact)
        if _whole(route.text) != _whole(engine.text):
            what = f"{asked}: the server says {route.text[:80]!r}, the file {engine.text[:80]!r}"
            checks.fault(f"served_answers_{quant}", what, artefact=artefact)
        if engine.ended and not route.ended:
            checks.fault("stop_token", f"{artefact}: the server did not stop where the model ended ({asked})")


def _check_greedy(
    subject: Subject, quant: str, alone: list[served.Answer], reference: Reference, limits: Limits
) -> None:
    """Compare the file's greedy answers with the trained model's, and say what each difference is."""
    rows = []
    for index, (question, tuned, found) in enumerate(
        zip(subject.probes.questions, reference.tuned, alone, strict=True)
    ):
        gap = gap_at_difference(tuned, found)
        row = {
            "question": question[-1].content,
            "trained": _text(subject, tuned.ids),
            "served": found.text,
            "gap": None if gap is None else round(gap, 4),
            "kind": "same" if gap is None else "near tie" if gap <= limits.tie else "divergence",
        }
        if row["kind"] == "divergence":
            row |= _base_flip(subject, quant, question, reference.untuned[index], limits)
        rows.append(row)
    subject.answers[quant] = rows
    notes = [_greedy_note(row) for row in rows if row["kind"] != "same"]
    diverged = sum(row["kind"] == "divergence" for row in rows)
    subject.checks.add(f"greedy_{quant}", diverged, 0, artefact=gguf_name(quant), notes=notes)


def gap_at_difference(trained: Greedy, found: served.Answer) -> float | None:
    """Return by how many nats the trained model prefers its own token where the answers part; None if they do not.

    One answer may be cut by the limit where the other goes on: what both have is compared.
    """
    own = trained.ids
    for place, index in enumerate(own):
        if place < len(found.ids):
            other = found.ids[place]
        elif found.ended and not (trained.ended and place == len(own) - 1):
            return float(np.ptp(trained.logits[place]))  # it ended where the trained model goes on
        else:
            return None
        if other != index:
            return float(trained.logits[place][index] - trained.logits[place][other])
    return None


def _base_flip(
    subject: Subject, quant: str, question: tuple[Message, ...], untuned: Greedy, limits: Limits
) -> dict[str, Any]:
    """Ask the untuned base, written as the same type, the same question: does it leave its own full precision too?"""
    path = base_gguf_path(subject.manifest, quant)
    if quant == "f16" or not path.is_file():
        return {}
    prompt = subject.prompt.prompt_ids(_led(subject, question))
    with LlamaEngine(path, context_tokens=len(prompt) + subject.config.answer_tokens + 64) as engine:
        found = served.answer_alone(engine, prompt, most_tokens=subject.config.answer_tokens)
    gap = gap_at_difference(untuned, found)
    if gap is None or gap <= limits.tie:
        return {"base_gap": gap}
    return {
        "kind": "the base's own",
        "base_gap": round(gap, 4),
        "base_trained": _text(subject, untuned.ids),
        "base_served": found.text,
    }


def _greedy_note(row: dict[str, Any]) -> str:
    what = {
        "near tie": "a near tie that rounding turns",
        "the base's own": "the untuned base, written as the same type, leaves its own answer here too",
        "divergence": "more than rounding explains",
    }[row["kind"]]
    return f"{row['question'][:60]!r}: {what}; full precision prefers its own token by {row['gap']:.2f} nats"


# ------------------------------------------------------------------------------------------------------------- result


def _certificate(
    subject: Subject, hashes: dict[str, dict[str, str]], reference: Reference | None, *, seconds: float
) -> dict[str, Any]:
    checks = subject.checks.all()
    return {
        "pass": all(check.passed for check in checks),
        "checks": [check.row() for check in checks],
        "not_checked": subject.not_checked,
        "artefacts": hashes,
        "compared": {
            "conversations": len(subject.probes.rows),
            "tokens": sum(len(row.places) for row in subject.probes.rows),
            "prompts": len(subject.probes.prompts),
            "answers": len(subject.probes.questions),
            "arithmetic": "float32" if reference is None or reference.exact else "bfloat16",
        },
        "answers": subject.answers,
        "weights": subject.weights,
        "limits": {name: asdict(LIMITS[name]) for name in ("merged", *subject.headers)},
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": round(seconds, 1),
    }


def _led(subject: Subject, messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """Return the turns as the server leads them: with the run's system prompt where they have none."""
    return Conversation(messages).with_system(str(subject.manifest.get("system_prompt", ""))).messages


def _whole(text: str) -> str:
    """Return an answer up to bytes that are no character: a stream holds them back, an answer at once shows them."""
    return text.partition("\ufffd")[0].strip()


def _strength(subject: Subject) -> float:
    """Return how much of the tuned adapter is exported, by run.json; the adapter's alpha has it in it."""
    return float((subject.manifest.get("strength") or {}).get("strength", 1.0))


def _token(subject: Subject) -> str:
    return str(subject.prompt.tokenizer.convert_ids_to_tokens(subject.end_of_turn))


def _text(subject: Subject, ids: list[int]) -> str:
    return str(subject.prompt.tokenizer.decode(ids, skip_special_tokens=True))


def _line(error: Exception) -> str:
    """Return an error on one line, led by its name if it is a library's: a KeyError says nothing without."""
    text = " ".join(str(error).split())[:200]
    return text if isinstance(error, LorikeetError) else f"{type(error).__name__}: {text}"


@contextmanager
def _progress(subject: Subject) -> Iterator[Say]:
    """Show what is being compared and the time left on a terminal; a line for each part otherwise."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    total = 4 + 2 * (subject.merged is not None) + 4 * len(subject.headers)
    columns = (TextColumn("verifying"), BarColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("files", total=total)

        def say(part: str) -> None:
            bar.update(task, advance=1, description=part)
            if not console.is_terminal:
                print(f"verifying {part}", file=sys.stderr, flush=True)

        yield say
