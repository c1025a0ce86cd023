"""`reports/parity.html`: the certificate on one page that opens anywhere, with nothing loaded from elsewhere."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

from lorikeet.files import write_atomic

MEANINGS = {
    "readable": "Files that can be loaded",
    "recorded_files": "Files are those that run.json records",
    "template": "The chat template is the base's, its date frozen",
    "tokenizer": "The tokenizer is the base's",
    "system_prompt": "Answers are led by the system prompt of the conversations that tuning kept",
    "rendered_tokens": "Prompts have exactly the tokens that tuning saw",
    "one_bos": "A prompt begins with one BOS, or none where the base has none",
    "stop_token": "The token that ends a turn ends the answer",
    "tied_head": "Head and embedding are tied exactly where the base's are",
    "adapter_is_tuned": "The adapter is the best checkpoint's",
    "validation_loss": "Its validation loss is the one that tuning recorded (nats)",
    "adapter_scale": "The adapter counts once, at the run's strength",
    "merged_config": "Settings are the base's",
    "unadapted_weights": "Weights without an adapter are the base's",
    "merged_weights": "Weights are what PEFT makes, rounded once (worst error in steps of 16 bits)",
    "kl_mean": "Mean KL divergence of the next token (nats)",
    "kl_worst": "Worst KL divergence of any token (nats)",
    "top1_changed": "Share of tokens whose first choice changes",
    "header": "Settings and vocabulary are the base's",
    "weights": "Weights decode to the merged ones (worst row, share of its type's bound)",
    "blocks": "Blocks are those that rounding the merged weights gives (share that are not)",
    "tuning_lost": "Share of the adapter's change that is missing",
    "served_prompt": "The server reads as many tokens as tuning saw",
    "served_answers": "The server answers what the file answers",
    "greedy": "Greedy answers that differ by more than rounding explains",
}
"""What a check means, by its name without the artefact's."""

HEADLINES = {"kl_mean": "Mean KL", "kl_worst": "Worst KL", "top1_changed": "First choice kept"}


def write_page(certificate: dict[str, Any], manifest: dict[str, Any], reports: Path) -> None:
    """Write `parity.html` into the folder `reports`."""
    from jinja2 import Environment, StrictUndefined

    source = resources.files("lorikeet.export").joinpath("parity.html.jinja").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(source).render(
        certificate=certificate, run=manifest, groups=_groups(certificate["checks"]), table=_table(certificate)
    )
    write_atomic(reports / "parity.html", page)


def meaning(name: str) -> str:
    """Return what a check means in words."""
    stem = next((stem for stem in MEANINGS if name == stem or name.startswith(f"{stem}_")), name)
    return MEANINGS.get(stem, name)


def _groups(checks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the checks by what they are about, those of the whole run first."""
    order = {"run": 0, "adapter": 1, "merged": 2}
    artefacts = sorted({check["artefact"] for check in checks}, key=lambda name: (order.get(name, 3), name))
    return [
        {
            "artefact": "All files" if artefact == "run" else artefact,
            "checks": [{**c, "meaning": meaning(c["name"])} for c in checks if c["artefact"] == artefact],
        }
        for artefact in artefacts
    ]


def _table(certificate: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one row an artefact whose predictions were compared: mean and worst KL, first choices kept, answers."""
    by_name = {check["name"]: check for check in certificate["checks"]}
    rows = []
    for name in certificate["limits"]:
        found = [by_name.get(f"{stem}_{name}") for stem in HEADLINES]
        if all(check is not None and check["value"] is not None for check in found):
            mean, worst, changed = (check["value"] for check in found if check is not None)
            answers = certificate["answers"].get(name, [])
            same = sum(answer["kind"] == "same" for answer in answers)
            rows.append(
                {"name": name, "mean": mean, "worst": worst, "kept": 1 - changed, "same": same, "of": len(answers)}
            )
    return rows
