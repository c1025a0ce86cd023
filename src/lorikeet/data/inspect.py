"""The X-ray of a dataset: what is in it, what tuning would do with it, and what it repeats or gives away.

    report = inspect_data(TuneConfig(data="mine.jsonl", model="smollm2-135m-instruct"))
    write_page(report, Path("inspect.html"))
    print_report(report)

It reads, and changes nothing. Tuning makes the same split and the same rows, so what is shown is what is trained on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from lorikeet.config import TuneConfig
from lorikeet.data.clean import Split, deduplicate, split
from lorikeet.data.encode import Encoding, encode_all, shared_start
from lorikeet.data.load import Loaded, load_conversations
from lorikeet.data.near import THRESHOLD, NearIndex
from lorikeet.errors import InputError, printable
from lorikeet.files import write_atomic
from lorikeet.grounding import is_grounded
from lorikeet.messages import Conversation
from lorikeet.prompt import Encoded, PromptFormat, defuse
from lorikeet.weights import resolve_model

SAMPLES = 3
"""Conversations whose mask is shown."""

EXAMPLES = 5
"""Examples of each kind that a report names."""

BUCKETS = 12
"""Bars of the histogram of tokens."""

SHOWN_TOKENS = 400
"""Tokens of a sample that are shown."""


def inspect_data(config: TuneConfig, *, against: Sequence[str] = ()) -> dict[str, Any]:
    """Return the report on `config.data` as tuning with these settings would see it, ready for JSON.

    Where `on_long` is `error`, what is too long is shown as truncated all the same. `against` names files of evaluation
    prompts that should not be in the data. Raises InputError if data, model or one of these files cannot be read at all;
    broken rows are counted and named instead.
    """
    loaded = load_conversations(config.data, strict=False)
    if not loaded.conversations and not loaded.broken:
        raise InputError(f"{config.data} holds no rows; a row holds messages, conversations or instruction and output")
    conversations = [c.with_system(config.system_prompt) for c in loaded.conversations]
    prompt = PromptFormat.load(resolve_model(config.model))
    distinct = deduplicate(conversations)
    on_long = "drop" if config.on_long == "drop" else "truncate"
    encoding = encode_all(prompt, distinct, max_length=config.max_length, on_long=on_long)
    parts, why_not = _parts(distinct, config)
    near = _near_pairs(distinct)
    return {
        "data": config.data,
        "model": config.model,
        "max_length": config.max_length,
        "layout": loaded.layout,
        "files": [{"name": file.name, "bytes": file.stat().st_size} for file in loaded.files],
        "conversations": len(conversations),
        "broken": _broken(loaded),
        "turns": _turns(conversations),
        "exact_duplicates": len(conversations) - len(distinct),
        "near_duplicates": {
            "threshold": THRESHOLD,
            "conversations": len({b for _, b in near}),
            "examples": [[distinct[a].origin, distinct[b].origin] for a, b in near[:EXAMPLES]],
        },
        "split": _split_report(parts, why_not, distinct, near),
        "against": [_overlap(distinct, name) for name in against],
        "tokens": _tokens(encoding),
        "truncated": {"conversations": encoding.truncated, "tokens": encoding.cut_tokens},
        "left_out": {
            "conversations": encoding.dropped,
            "reasons": encoding.reasons,
            "examples": [{"origin": e.origin, "why": e.why} for e in encoding.left_out[:EXAMPLES]],
        },
        "defused": sum(_is_defused(c, prompt) for c in distinct),
        "samples": [_sample(prompt, encoding.rows[n], distinct[encoding.kept[n]]) for n in _chosen(encoding.rows)],
    }


def _broken(loaded: Loaded) -> dict[str, Any]:
    total = len(loaded.conversations) + len(loaded.broken)
    return {
        "rows": len(loaded.broken),
        "share": len(loaded.broken) / total,
        "reasons": dict(Counter(b.why for b in loaded.broken).most_common(EXAMPLES)),
        "examples": [{"where": b.where, "why": b.why} for b in loaded.broken[:EXAMPLES]],
    }


def _turns(conversations: Sequence[Conversation]) -> dict[str, Any]:
    roles = Counter(m.role for c in conversations for m in c.messages)
    return {
        **{role: roles[role] for role in ("system", "user", "assistant")},
        "system_prompts": len({c.messages[0].content for c in conversations if c.messages[0].role == "system"}),
        "several_questions": sum(sum(m.role == "user" for m in c.messages) > 1 for c in conversations),
        "grounded": sum(any(is_grounded(m.content) for m in c.messages) for c in conversations),
    }


def _text(conversation: Conversation) -> str:
    """Return what is compared: all turns but the system's, which many share."""
    return "\n".join(m.content for m in conversation.messages if m.role != "system")


def _near_pairs(distinct: Sequence[Conversation]) -> list[tuple[int, int]]:
    """Return (earlier, later) places of conversations that are nearly the same, each later one with its first."""
    console = Console(stderr=True)
    quiet = not console.is_terminal or len(distinct) < 2000
    index = NearIndex()
    pairs = []
    shown = track(distinct, "looking for near duplicates", console=console, transient=True, disable=quiet)
    for place, conversation in enumerate(shown):
        text = _text(conversation)
        alike = index.alike(text)
        if alike:
            pairs.append((int(alike[0]), place))
        index.add(f"{place:09d}", text)
    return pairs


def _parts(distinct: Sequence[Conversation], config: TuneConfig) -> tuple[Split | None, str]:
    """Return the split that tuning makes, or why it makes none."""
    try:
        return split(
            distinct, validation_share=config.validation_share, heldout_share=config.heldout_share, seed=config.seed
        ), ""
    except InputError as error:
        return None, str(error)


def _split_report(
    parts: Split | None, why_not: str, distinct: Sequence[Conversation], near: Sequence[tuple[int, int]]
) -> dict[str, Any]:
    """Return the sizes of the parts, and how many near duplicates stand in two of them."""
    if parts is None:
        return {"possible": False, "why_not": why_not}
    named = {"train": parts.train, "validation": parts.validation, "heldout": parts.heldout}
    home = {id(conversation): name for name, part in named.items() for conversation in part}
    crossing = Counter(
        "/".join(sorted((home[id(distinct[a])], home[id(distinct[b])])))
        for a, b in near
        if home[id(distinct[a])] != home[id(distinct[b])]
    )
    questions = {name: {_question(c) for c in part} for name, part in named.items()}
    shared = sum(len(questions[a] & questions[b]) for a, b in pairwise([*questions, "train"]))
    return {
        "possible": True,
        **{name: len(part) for name, part in named.items()},
        "same_question_in_two_parts": shared,
        "near_duplicates_in_two_parts": dict(crossing),
    }


def _question(conversation: Conversation) -> str:
    first = next((m.content for m in conversation.messages if m.role == "user"), "")
    return " ".join(first.casefold().split())


def _overlap(distinct: Sequence[Conversation], name: str) -> dict[str, Any]:
    """Return how many prompts of the file `name` are, nearly or exactly, questions of the data."""
    prompts = _prompts(name)
    index = NearIndex()
    exact: set[str] = set()
    for place, conversation in enumerate(distinct):
        for turn, message in enumerate(conversation.messages):
            if message.role == "user":
                index.add(f"{place:09d}.{turn}", message.content)
                exact.add(" ".join(message.content.casefold().split()))
    same = [p for p in prompts if " ".join(p.casefold().split()) in exact]
    near = [p for p in prompts if p not in same and index.alike(p)]
    return {
        "file": name,
        "prompts": len(prompts),
        "same": len(same),
        "near": len(near),
        "examples": [p[:120] for p in (same + near)[:EXAMPLES]],
    }


def _prompts(name: str) -> list[str]:
    """Return the prompts of an evaluation file: a `prompt` or `question` field, or the users' turns."""
    import json

    try:
        text = Path(name).read_text(encoding="utf-8-sig")
        rows = (
            json.loads(text)
            if text.lstrip()[:1] == "["
            else [json.loads(line) for line in text.split("\n") if line.strip()]
        )
        found = [row.get("prompt", row.get("question")) for row in rows]
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise InputError(f"{name} cannot be read as JSON or JSON lines of evaluation prompts: {error}") from error
    if all(isinstance(prompt, str) for prompt in found):
        return [prompt.encode("utf-8", "replace").decode() for prompt in found]
    loaded = load_conversations(name, strict=False)
    prompts = [m.content for c in loaded.conversations for m in c.messages if m.role == "user"]
    if not prompts:
        raise InputError(f"{name} holds no prompts; its rows need a field `prompt` or conversations")
    return prompts


def _tokens(encoding: Encoding) -> dict[str, Any]:
    """Return the lengths of the rows as they would be trained on."""
    lengths = sorted(len(row.ids) for row in encoding.rows)
    if not lengths:
        return {"total": 0, "supervised": 0, "share_supervised": 0.0, "shared_start": 0, "histogram": []}
    width = max(1, -(-lengths[-1] // BUCKETS))
    counts = Counter((length - 1) // width for length in lengths)
    return {
        "total": encoding.tokens,
        "supervised": encoding.supervised_tokens,
        "share_supervised": encoding.supervised_tokens / encoding.tokens,
        "shared_start": shared_start(encoding.rows),
        **{name: lengths[int(at * (len(lengths) - 1))] for name, at in QUANTILES.items()},
        "histogram": [
            {"from": bucket * width + 1, "to": (bucket + 1) * width, "conversations": counts[bucket]}
            for bucket in range(max(counts) + 1)
        ],
    }


QUANTILES = {"shortest": 0.0, "median": 0.5, "p90": 0.9, "p99": 0.99, "longest": 1.0}
"""Names of the lengths that are told, and the share of rows that are no longer."""


def _is_defused(conversation: Conversation, prompt: PromptFormat) -> bool:
    return any(defuse(m.content, prompt.specials) != m.content for m in conversation.messages)


def _chosen(rows: Sequence[Encoded]) -> list[int]:
    """Return the places of the rows that are shown: the first ones, and those that can be shown whole before others."""
    return sorted(range(len(rows)), key=lambda place: len(rows[place].ids) > SHOWN_TOKENS)[:SAMPLES]


def _sample(prompt: PromptFormat, row: Encoded, conversation: Conversation) -> dict[str, Any]:
    """Return a row as runs of text, each supervised or not; the text of a run is decoded whole.

    Of a long row the start is shown, or, where nothing in it is supervised, what leads to the first supervised token.
    """
    runs: list[dict[str, Any]] = []
    pending: list[int] = []
    first = row.supervised.index(True)
    start = first - SHOWN_TOKENS // 2 if first >= SHOWN_TOKENS else 0
    ids, supervised = (part[start : start + SHOWN_TOKENS] for part in (row.ids, row.supervised))
    for place, (token, counted) in enumerate(zip(ids, supervised, strict=True)):
        pending.append(token)
        if place + 1 == len(ids) or supervised[place + 1] != counted:
            text = str(prompt.tokenizer.decode(pending, skip_special_tokens=False))
            runs.append({"text": text, "supervised": counted, "tokens": len(pending)})
            pending = []
    return {
        "origin": conversation.origin,
        "tokens": len(row.ids),
        "supervised": sum(row.supervised),
        "runs": runs,
        "shown_from": start,
        "shown_tokens": len(ids),
    }


def write_page(report: dict[str, Any], path: Path) -> None:
    """Write the report as one page that needs nothing else; what the data holds is shown as text, never as markup."""
    import jinja2

    source = (resources.files("lorikeet.data") / "inspect.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    page = environment.from_string(source).render(report=report, facts=facts(report))
    write_atomic(path, page.encode("utf-8", "replace"))  # a file's name need not be text


def facts(report: dict[str, Any]) -> list[tuple[str, str, bool]]:
    """Return (what, value, whether it deserves a look) of everything a person should see, in reading order."""
    tokens, broken, near, parts = report["tokens"], report["broken"], report["near_duplicates"], report["split"]
    truncated, left_out, turns = report["truncated"], report["left_out"], report["turns"]
    rows = [
        ("format", report["layout"] or "none that is known", not report["layout"]),
        ("conversations", f"{report['conversations']}", False),
        ("broken rows", f"{broken['rows']} ({broken['share']:.1%}; tuning takes up to 1 %)", broken["rows"] > 0),
        ("turns", f"{turns['user']} user, {turns['assistant']} assistant, {turns['system']} system", False),
        ("different system prompts", f"{turns['system_prompts']}", False),
        ("with several questions", f"{turns['several_questions']}", False),
        ("with search results", f"{turns['grounded']}", False),
        ("exact duplicates", f"{report['exact_duplicates']}, left out", report["exact_duplicates"] > 0),
        (
            "near duplicates",
            f"{near['conversations']} (similarity {near['threshold']} or more), kept",
            near["conversations"] > 0,
        ),
    ]
    if parts["possible"]:
        crossing = sum(parts["near_duplicates_in_two_parts"].values())
        rows += [
            ("split", f"{parts['train']} train, {parts['validation']} validation, {parts['heldout']} held out", False),
            ("same question in two parts", f"{parts['same_question_in_two_parts']}", False),
            ("near duplicates in two parts", f"{crossing}", crossing > 0),
        ]
    else:
        rows.append(("split", parts["why_not"], True))
    for overlap in report["against"]:
        found = overlap["same"] + overlap["near"]
        rows.append((f"prompts of {Path(overlap['file']).name} in it", f"{found} of {overlap['prompts']}", found > 0))
    rows += [
        ("tokens", f"{tokens['total']}, {tokens['share_supervised']:.0%} of them supervised", not tokens["supervised"]),
        ("all start with the same", f"{tokens['shared_start']} tokens, computed once in a step", False),
        (
            f"truncated to {report['max_length']} tokens",
            f"{truncated['conversations']} ({truncated['tokens']} tokens cut)",
            truncated["conversations"] > 0,
        ),
        ("left out", f"{left_out['conversations']}", left_out["conversations"] > 0),
        ("special tokens in messages, defused", f"{report['defused']}", report["defused"] > 0),
    ]
    return rows


def _shown(sample: dict[str, Any]) -> str:
    """Return which tokens of a sample are shown; '' for all."""
    start, count = sample["shown_from"], sample["shown_tokens"]
    return f"; {start + 1} to {start + count} are shown" if count < sample["tokens"] else ""


def print_report(report: dict[str, Any], console: Console) -> None:
    """Show the report in a terminal: facts, histogram, and the mask of the samples in colour."""
    title = Text(f"{report['data']}, as {report['model']} would be tuned on it")
    table = Table(title=title, show_header=False, title_justify="left")
    for what, value, notable in facts(report):
        table.add_row(what, Text(value, style="yellow" if notable else ""))
    console.print(table)
    for kind in ("broken", "left_out"):
        for entry in report[kind]["examples"]:
            console.print(Text(f"  {entry.get('where', entry.get('origin'))}: {entry['why']}", style="yellow"))
    buckets = report["tokens"]["histogram"]
    most = max((bucket["conversations"] for bucket in buckets), default=1)
    for bucket in buckets:
        bar = "█" * round(40 * bucket["conversations"] / most)
        console.print(Text(f"{bucket['from']:>6} to {bucket['to']:<6} {bucket['conversations']:>6} {bar}"))
    for sample in report["samples"]:
        console.print(
            Text(
                f"\n{sample['origin']}: {sample['supervised']} of {sample['tokens']} tokens supervised (green){_shown(sample)}",
                "bold",
            )
        )
        shown = Text()
        for run in sample["runs"]:
            shown.append(printable(run["text"]), style="black on green" if run["supervised"] else "dim")
        console.print(shown)
