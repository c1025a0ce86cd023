"""The model card: `RUN/README.md`, filled from `run.json` and `reports/*.json`.

    write_card(run)                          # after export, verify and prove: what is known by then
    text = card(run, repo="me/mine")         # what is published: the same, for readers who do not have the run folder

A pure function of the run folder, so every stage may call it and the last one to finish leaves the fullest card. A no of
the proof or of the parity certificate stands in its first lines. It names no path of the machine and quotes no data, and
whatever a user chose (names, prompts) is defused before it becomes Markdown.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

from lorikeet.config import PACKAGED_DATA, TuneConfig
from lorikeet.errors import InputError
from lorikeet.files import write_changed
from lorikeet.gguf_header import read_header
from lorikeet.run import RunFolder
from lorikeet.weights import PACKAGES

UNKNOWN_LICENCE = "unknown"
"""The hub's own identifier for a licence that nobody has stated."""

_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+!|~$])")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}
"""Unicode categories of characters that show nothing or turn the text around them."""


def write_card(run: RunFolder) -> Path:
    """Write `RUN/README.md` from what the run holds now and return its path."""
    path = run.root / "README.md"
    write_changed(path, card(run))
    return path


def card(run: RunFolder, *, repo: str = "") -> str:
    """Return the card as Markdown with the hub's front matter; with `repo`, for readers who find it there.

    Raises InputError if the run is not tuned yet.
    """
    from jinja2 import Environment, StrictUndefined

    manifest = run.manifest()
    if "base" not in manifest or "adapter" not in manifest["artefacts"]:
        raise InputError(
            f"{run.root} has no adapter to write a card of; tune it first: lorikeet tune --resume {run.root}"
        )
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)  # noqa: S701  # Markdown: `text` and `code` defuse
    environment.filters |= {"text": text, "code": code, "fence": fence, "number": number, "limit": limit}
    source = resources.files("lorikeet").joinpath("card.md.jinja").read_text(encoding="utf-8")
    facts = _facts(run, manifest, repo)
    body = re.sub(r"\n{3,}", "\n\n", environment.from_string(source).render(facts)).strip()
    return f"---\n{_front_matter(facts)}\n---\n\n{body}\n"


def text(value: object) -> str:
    """Return `value` on one line, as Markdown that shows just its characters, also inside a table."""
    flat = "".join(
        " " if c.isspace() else c for c in str(value) if c.isspace() or unicodedata.category(c) not in _HIDDEN
    )
    escaped = _MARKDOWN.sub(r"\\\1", " ".join(flat.split()))
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def code(value: object) -> str:
    """Return `value` on one line as a code span that nothing in it can end, also inside a table."""
    flat = " ".join("".join(" " if unicodedata.category(c) in _HIDDEN else c for c in str(value)).split())
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", flat)), default=0))
    pad = " " if flat.startswith("`") or flat.endswith("`") else ""
    return f"{ticks}{pad}{flat}{pad}{ticks}".replace("|", "\\|")


def fence(value: str, language: str = "") -> str:
    """Return `value` as a fenced block that nothing in it can end."""
    ticks = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", value)), default=0))
    return f"{ticks}{language}\n{value}\n{ticks}"


def number(value: object) -> str:
    """Return a measured value as people read it: four digits, thousands apart, a share or a word as it is."""
    if value is None:
        return "no number"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return text(value)
    if isinstance(value, int) or value == int(value):
        return f"{int(value):,}" if math.isfinite(value) else text(value)
    return f"{value:.4g}"


def limit(value: object) -> str:
    """Return a check's limit in words; a bare number is the most that the value may be."""
    return f"at most {number(value)}" if isinstance(value, int | float) else text(value)


def public_name(name: str) -> str:
    """Return a name of a model or of data that tells nothing of the machine: of a path its last part alone."""
    bare = name.replace("\\", "/").rstrip("/")
    return bare.rpartition("/")[2] or "data"


def _facts(run: RunFolder, manifest: dict[str, Any], repo: str) -> dict[str, Any]:
    """Return everything that the template shows."""
    artefacts = {name: entry for name, entry in manifest["artefacts"].items() if entry.get("complete")}
    quants = [name.removeprefix("gguf/model-").removesuffix(".gguf") for name in artefacts if name.startswith("gguf/")]
    proof = run.report("proof")
    parity = run.report("parity")
    base = public_base(manifest["base"])
    data = _data(manifest["data"])
    return {
        "name": repo.rpartition("/")[2] or run.root.resolve().name,
        "repo": repo,
        "run": manifest,
        "base": base,
        "data": data,
        "merged": "merged" in artefacts,
        "quants": sorted(quants, key=lambda quant: (quant != "q8_0", quant)),
        "proof": proof,
        "comparison": list(_comparison(proof)) if proof else [],
        "parity": parity,
        "failed": {
            "proof": [check for check in proof["checks"] if not check["pass"]] if proof else [],
            "parity": [check for check in parity["checks"] if not check["pass"]] if parity else [],
        },
        "changed": list(_settings(manifest, changed=True)),
        "unchanged": list(_settings(manifest, changed=False)),
        "parameters": _parameters(run, quants),
        "modelfile": manifest.get("modelfile", {}),
    }


def public_base(base: dict[str, str]) -> dict[str, str]:
    """Return the base as the public knows it: name, hub id or '', licence or '', what else there is to say."""
    package = PACKAGES.get(base["id"])
    if package:
        origin = f"as the 4-bit file inside {package.distribution} {package.version}, dequantised"
        return {**base, "name": base["id"], "hub": package.upstream, "licence": package.licence, "origin": origin}
    if base.get("revision") and _HUB_ID.fullmatch(base["id"]):
        origin = f"revision {base['revision']}"
        return {**base, "name": base["id"], "hub": base["id"], "licence": base.get("licence", ""), "origin": origin}
    return {
        **base,
        "name": public_name(base["id"]),
        "hub": "",
        "licence": base.get("licence", ""),
        "origin": "a folder of the person who tuned it",
    }


def _data(data: dict[str, Any]) -> dict[str, Any]:
    """Return the data as the public may know it: name, hub id or '', licence or '', and its counts."""
    if data["name"] == PACKAGED_DATA:
        about = {"name": PACKAGED_DATA, "hub": "", "licence": "Apache-2.0", "origin": "packaged with Lorikeet"}
    elif data.get("revision") and _HUB_ID.fullmatch(hub := data["name"].partition("@")[0]):
        about = {"name": hub, "hub": hub, "licence": data.get("licence", ""), "origin": f"revision {data['revision']}"}
    else:
        name = public_name(data["name"])
        about = {"name": name, "hub": "", "licence": "", "origin": "not published by this card"}
    counted = {"broken", "duplicates", "truncated", "dropped"}
    return {**data, **about, "left_out": {name: data[name] for name in sorted(counted & data.keys())}}


def _settings(manifest: dict[str, Any], *, changed: bool) -> Iterator[tuple[str, str, str]]:
    """Yield (setting, value, default) of tuning for the settings that differ from their defaults, or do not."""
    defaults = asdict(TuneConfig())
    for name, value in manifest["config"].get("tune", {}).items():
        default = defaults.get(name)
        same = value == default or (isinstance(default, tuple) and list(default) == value)
        if name in {"model", "data"}:
            continue  # said above, without their paths
        if same != changed:
            yield name, _shown(value), _shown(default)


def _shown(value: object) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(str(item) for item in value) or "none"
    return str(value) if value != "" else "none"


def _comparison(proof: dict[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """Yield (what, base, tuned, difference) for everything that was measured on both."""
    heldout = proof.get("heldout")
    if heldout:
        low, high = heldout["ci95"]
        yield (
            "Held-out loss, nats a token",
            f"{heldout['base_loss']:.3f}",
            f"{heldout['tuned_loss']:.3f}",
            f"{heldout['difference']:+.3f} ({low:+.3f} to {high:+.3f})",
        )
    if prose := proof.get("forgetting"):
        low, high = prose["ci95"]
        yield (
            "Loss on plain prose, nats a token",
            f"{prose['base_loss']:.3f}",
            f"{prose['tuned_loss']:.3f}",
            f"{prose['difference']:+.3f} ({low:+.3f} to {high:+.3f})",
        )
    if asked := proof.get("instructions"):
        rates = {who: asked[who]["instruction_strict"] for who in ("base", "tuned")}
        yield _rates(f"Instructions followed, of {asked['instructions']}", rates, asked["difference"])
    if orders := proof.get("grounding", {}).get("obeys_orders"):
        yield _rates(
            f"Orders in search results obeyed, of {orders['n']} (fewer is better)", orders, orders["difference"]
        )
    ended, spoken = proof.get("answers_end"), proof.get("speakability")
    if ended:
        yield "Answers that end by themselves", f"{ended['base']:.0%}", f"{ended['tuned']:.0%}", ""
    if spoken:
        base, tuned = spoken["base"], spoken["tuned"]
        yield "Answers that can be spoken", f"{base['speakable']:.0%}", f"{tuned['speakable']:.0%}", ""
        yield "Words in an answer, mean", number(base["mean_words"]), number(tuned["mean_words"]), ""


def _rates(what: str, rates: dict[str, Any], difference: dict[str, float]) -> tuple[str, str, str, str]:
    """Return a row of two shares, and the difference with its interval in points of a hundred."""
    change, low, high = (f"{100 * difference[key]:+.0f}" for key in ("value", "low", "high"))
    base, tuned = (f"{rates[who]['value']:.0%}" for who in ("base", "tuned"))
    return what, base, tuned, f"{change} points ({low} to {high})"


def _parameters(run: RunFolder, quants: list[str]) -> int:
    """Return how many weights the exported model has; 0 if no GGUF says so."""
    for quant in quants:
        try:
            header = read_header(run.root / "gguf" / f"model-{quant}.gguf")
        except InputError:
            continue
        return sum(math.prod(shape) for shape in header.tensors.values())
    return 0


def _licence(name: str) -> dict[str, str]:
    """Return a licence as the hub's metadata states it: its identifier, or `other` with a name."""
    identifier = (name or UNKNOWN_LICENCE).lower()
    if re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", identifier):
        return {"license": identifier}
    return {"license": "other", "license_name": re.sub(r"[^a-z0-9]+", "-", identifier).strip("-") or UNKNOWN_LICENCE}


def _front_matter(facts: dict[str, Any]) -> str:
    """Return the hub's metadata as YAML, every key one that it knows; what is not known is left out."""
    from huggingface_hub import EvalResult, ModelCardData

    base, data, proof = facts["base"], facts["data"], facts["proof"]
    tags = ["lorikeet", "lora", *(["gguf"] if facts["quants"] else []), "conversational"]
    known: dict[str, Any] = {
        **_licence(base["licence"]),
        "library_name": "transformers" if facts["merged"] else "peft",
        "pipeline_tag": "text-generation",
        "tags": tags,
    }
    if base["hub"]:
        known |= {"base_model": base["hub"], "base_model_relation": "finetune" if facts["merged"] else "adapter"}
    if data["hub"]:
        known["datasets"] = [data["hub"]]
    if data["name"] == PACKAGED_DATA and not data["hub"]:
        known["language"] = ["en"]
    if proof and proof.get("heldout"):
        known |= {
            "model_name": facts["name"],
            "eval_results": [
                EvalResult(
                    task_type="text-generation",
                    dataset_type=data["hub"] or "conversations",
                    dataset_name=" ".join(f"{data['name']}, held-out conversations".split()),
                    metric_type="loss",
                    metric_name=f"Held-out loss, {proof['quant']} GGUF, nats a token",
                    metric_value=round(proof["heldout"]["tuned_loss"], 4),
                )
            ],
        }
    return str(ModelCardData(**known).to_yaml())
