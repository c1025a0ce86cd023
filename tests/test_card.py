"""The model card: what it says, when it says no, what it never says, and that nothing a user chose breaks out of it."""

from __future__ import annotations

import html
import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from lorikeet.card import card, code, fence, text, write_card
from lorikeet.config import TuneConfig
from lorikeet.errors import InputError
from lorikeet.run import RunFolder

HOSTILE = "a|b`c``d <script>alert(1)</script> ](http://x) *_#$ \u202e {{ 7919*7 }} </details>\n---\n# Owned"

PROOF = {
    "verdict": "ship",
    "quant": "q8_0",
    "heldout": {
        "n": 40,
        "tokens": 2345,
        "base_loss": 3.86,
        "tuned_loss": 3.27,
        "difference": -0.59,
        "ci95": [-0.651, -0.533],
    },
    "checks": [
        {"name": "heldout_loss", "value": -0.533, "limit": "below 0", "pass": True},
        {"name": "answers_end", "value": 0.91, "limit": "at least 0.7", "pass": True},
    ],
    "answers_end": {"base": 0.83, "tuned": 0.91},
    "speakability": {"base": {"speakable": 0.58, "mean_words": 51.2}, "tuned": {"speakable": 1.0, "mean_words": 20.0}},
    "answers": [{"question": "a secret question", "wanted": "a secret answer"}],
    "per_conversation": [{"id": "/srv/private/mine.jsonl:3", "base": 1.0, "tuned": 0.5}],
    "files": {"tuned": "gguf/model-q8_0.gguf", "tuned_sha256": {"model-q8_0.gguf": "9a" * 32}},
}
PARITY = {
    "pass": True,
    "checks": [{"name": "stop_token", "value": 1.0, "limit": 1, "pass": True, "artefact": "merged"}],
    "artefacts": {"adapter": {"adapter_model.safetensors": "db" * 32}},
    "not_checked": ["answers of more than 64 tokens"],
}


def make_run(
    root: Path, *, base: dict[str, str] | None = None, data: dict[str, Any] | None = None, **settings: Any
) -> RunFolder:
    """Return a run folder as tune and export leave it, without its weights."""
    config = json.loads(json.dumps(asdict(TuneConfig(model="smollm2-135m-instruct", data="spoken", **settings))))
    run = RunFolder.create(root, config={"tune": config})
    counts = {"train": 340, "validation": 20, "heldout": 40, "broken": 2, "duplicates": 5, "truncated": 1, "dropped": 0}
    run.update(
        base=base or {"id": "smollm2-135m-instruct", "revision": "", "sha256": "1b" * 32},
        data={"name": "spoken", "layout": "messages", "sha256": {"daily.jsonl": "43" * 32}, **counts} | (data or {}),
        template={"sha256": "87" * 32, "date": "2026-11-25"},
        system_prompt="Answer briefly.",
        dtype="bfloat16",
        tuned={
            "steps": 24,
            "best_step": 20,
            "first_val_loss": 3.88,
            "best_val_loss": 3.62,
            "elapsed_s": 62.0,
            "tokens_per_s": 505.9,
            "peak_rss_bytes": 3242242048,
        },
    )
    manifest = run.manifest()
    for name, files in {
        "adapter": {"adapter_model.safetensors": "db" * 32},
        "merged": {"model.safetensors": "e2" * 32},
        "gguf/model-f16.gguf": {"model-f16.gguf": "e7" * 32},
        "gguf/model-q8_0.gguf": {"model-q8_0.gguf": "9a" * 32},
    }.items():
        manifest["artefacts"][name] = {"complete": True, "sha256": files}
    run.update(artefacts=manifest["artefacts"])
    return run


def report(run: RunFolder, name: str, content: dict[str, Any]) -> None:
    """Leave a report in the run, as its stage would."""
    run.reports.mkdir(exist_ok=True)
    (run.reports / f"{name}.json").write_text(json.dumps(content))


def front_matter(written: str) -> dict[str, Any]:
    """Return the YAML at the top of a card."""
    return dict(yaml.safe_load(written.split("---\n")[1]))


def sections(written: str) -> dict[str, str]:
    """Return the text below each heading of the second level."""
    pieces = re.split(r"^## (.*)$", written, flags=re.MULTILINE)
    return dict(zip(pieces[1::2], pieces[2::2], strict=True))


def lead(written: str) -> str:
    """Return what stands before the first section, without the front matter."""
    return written.split("---\n")[2].split("\n## ")[0]


def test_the_hub_can_read_the_front_matter(tmp_path: Path) -> None:
    run = make_run(tmp_path / "mine")
    report(run, "proof", PROOF)
    read = ModelCard(card(run))
    assert read.data.license == "apache-2.0"
    assert read.data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert read.data.library_name == "transformers" and read.data.pipeline_tag == "text-generation"
    assert {"lora", "gguf", "lorikeet"} <= set(read.data.tags or [])
    assert front_matter(card(run))["base_model_relation"] == "finetune"
    assert read.data.eval_results is not None
    assert read.data.eval_results[0].metric_value == 3.27 and read.data.eval_results[0].metric_type == "loss"


def test_everything_that_decides_is_compared_with_its_interval(tmp_path: Path) -> None:
    """And a verdict of no says why in its first lines, whatever is in the words."""
    run = make_run(tmp_path / "mine")
    rates = {who: {"instruction_strict": {"value": value}} for who, value in (("base", 0.4167), ("tuned", 0.1944))}
    orders = {"n": 16, "base": {"value": 0.0}, "tuned": {"value": 0.125}}
    more = {
        "verdict": "do not ship",
        "checks": [{"name": "instructions_followed", "value": -0.028, "limit": "at least 0", "pass": False}],
        "reasons": ["It follows fewer instructions: 7 of 36.", HOSTILE],
        "forgetting": {"base_loss": 3.573, "tuned_loss": 3.397, "difference": -0.176, "ci95": [-0.234, -0.113]},
        "instructions": {
            **rates,
            "instructions": 36,
            "difference": {"value": -0.2222, "low": -0.4118, "high": -0.0278},
        },
        "grounding": {"obeys_orders": {**orders, "difference": {"value": 0.125, "low": 0.0, "high": 0.3125}}},
    }
    report(run, "proof", {**PROOF, **more})
    table = sections(card(run))["Before and after"]
    assert "| Loss on plain prose, nats a token | 3.573 | 3.397 | -0.176 (-0.234 to -0.113) |" in table
    assert "| Instructions followed, of 36 | 42% | 19% | -22 points (-41 to -3) |" in table
    assert "| Orders in search results obeyed, of 16 (fewer is better) | 0% | 12% | +12 points (+0 to +31) |" in table
    assert "> It follows fewer instructions: 7 of 36." in lead(card(run))
    assert "<script>" not in card(run)


def test_before_and_after_with_intervals(tmp_path: Path) -> None:
    run = make_run(tmp_path / "mine", learning_rate=1e-3)
    report(run, "proof", PROOF)
    report(run, "parity", PARITY)
    path = write_card(run)
    assert path == tmp_path / "mine" / "README.md"
    parts = sections(path.read_text(encoding="utf-8"))
    assert "| Held-out loss, nats a token | 3.860 | 3.270 | -0.590 (-0.651 to -0.533) |" in parts["Before and after"]
    assert "| Answers that can be spoken | 58% | 100% |  |" in parts["Before and after"]
    assert "| `stop_token` | `merged` | 1 | at most 1 | passed |" in parts["Is the file the model?"]
    assert "2 broken, 0 dropped, 5 duplicates, 1 truncated" in parts["Data"] and "43" * 32 in parts["Data"]
    assert "| `learning_rate` | `0.001` | `0.0003` |" in parts["Recipe"].partition("<details>")[0]
    assert "`lora_r`" not in parts["Recipe"].partition("<details>")[0]
    assert "f16 was not compared with the base" in parts["Limits"]
    assert "invents facts" in parts["Limits"]
    assert "- Not checked by the certificate: answers of more than 64 tokens." in parts["Limits"]
    assert "Apache-2.0" in parts["Licences"] and "unknown" not in parts["Licences"]


def test_a_no_stands_in_the_first_lines(tmp_path: Path) -> None:
    run = make_run(tmp_path / "mine")
    failed = {"name": "heldout_loss", "value": 0.021, "limit": "below 0", "pass": False}
    report(run, "proof", {**PROOF, "verdict": "do not ship", "checks": [failed, PROOF["checks"][1]]})
    bos = {"name": "one_bos", "value": 2, "limit": 0, "pass": False, "artefact": "gguf/model-q8_0.gguf"}
    report(run, "parity", {**PARITY, "pass": False, "checks": [bos, PARITY["checks"][0]]})
    lines = [line for line in lead(card(run)).splitlines() if line]
    assert lines[1].startswith("> **Do not ship.**") and "`heldout_loss` (0.021, must be below 0)" in lines[1]
    assert lines[2].startswith("> **No parity.**") and "`one_bos` (2, must be at most 0)" in lines[2]
    assert "answers_end" not in lines[1] and "stop_token" not in lines[2]


def test_what_was_not_measured_is_said_so(tmp_path: Path) -> None:
    written = card(make_run(tmp_path / "mine"))
    assert "It has not been compared with its base" in lead(written)
    assert "no parity certificate yet" in lead(written)
    assert "Before and after" not in sections(written) and "Is the file the model?" not in sections(written)
    assert "model-index" not in front_matter(written)


def test_reports_about_other_files_do_not_count(tmp_path: Path) -> None:
    run = make_run(tmp_path / "mine")
    other = {"tuned": "gguf/model-q8_0.gguf", "tuned_sha256": {"model-q8_0.gguf": "00" * 32}}
    report(run, "proof", {**PROOF, "files": other})
    report(run, "parity", {**PARITY, "artefacts": {"adapter": {"adapter_model.safetensors": "00" * 32}}})
    assert "It has not been compared with its base" in lead(card(run))
    assert "no parity certificate yet" in lead(card(run))


def test_no_path_and_no_data_get_out(tmp_path: Path) -> None:
    run = make_run(
        tmp_path / "mine",
        base={"id": "/srv/private/models/Llama-1B", "revision": "", "sha256": "1b" * 32},
        data={"name": "/srv/private/clients.jsonl"},
    )
    manifest = run.manifest()
    manifest["config"]["tune"] |= {"model": "/srv/private/models/Llama-1B", "data": "/srv/private/clients.jsonl"}
    run.update(config=manifest["config"])
    report(run, "proof", PROOF)
    written = card(run, repo="me/mine")
    assert "private" not in written and str(tmp_path) not in written and "secret" not in written
    assert "`Llama-1B`" in written and "`clients.jsonl`" in written
    assert front_matter(written)["license"] == "unknown" and "base_model" not in front_matter(written)
    assert written.count("unknown: check before you share it") == 2


def test_a_hub_base_and_hub_data_are_named_with_their_licences(tmp_path: Path) -> None:
    base = {"id": "unsloth/Llama-3.2-1B-Instruct", "revision": "ab12", "sha256": "1b" * 32, "licence": "llama3.2"}
    data = {"name": "mlabonne/FineTome-100k@c234", "revision": "c234", "licence": ""}
    written = card(make_run(tmp_path / "mine", base=base, data=data))
    assert front_matter(written)["license"] == "llama3.2"
    assert front_matter(written)["base_model"] == "unsloth/Llama-3.2-1B-Instruct"
    assert front_matter(written)["datasets"] == ["mlabonne/FineTome-100k"]
    assert written.count("unknown: check before you share it") == 1


def test_how_to_run_it_depends_on_the_reader(tmp_path: Path) -> None:
    run = make_run(tmp_path / "mine")
    run.update(modelfile={"complete": True})
    here, there = card(run), card(run, repo="me/mine")
    assert "llama-server -m gguf/model-q8_0.gguf" in here and "ollama create" in here
    assert "llama-server -hf me/mine:Q8_0" in there and "ollama run hf.co/me/mine:Q8_0" in there
    assert 'from_pretrained("me/mine")' in there and '"me/mine", subfolder="adapter"' in there
    for language, block in re.findall(r"```(\w+)\n(.*?)```", here + there, flags=re.DOTALL):
        if language == "python":
            compile(block, "card", "exec")


def test_no_section_is_empty(tmp_path: Path) -> None:
    bare, full = make_run(tmp_path / "bare"), make_run(tmp_path / "full", lora_r=8)
    report(full, "proof", PROOF)
    report(full, "parity", PARITY)
    for run in (bare, full):
        for heading, body in sections(card(run)).items():
            assert len(body.split()) > 5, heading
        assert not re.search(r"\b(None|TODO|TBD|nan|undefined)\b", card(run).replace("`None`", ""))


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    run = make_run(
        tmp_path / "mine",
        base={"id": HOSTILE, "revision": "r|r", "sha256": "1b" * 32, "licence": HOSTILE},
        data={"name": HOSTILE, "sha256": {HOSTILE: "43" * 32}},
        system_prompt=HOSTILE,
    )
    run.update(system_prompt="```\n# Owned\n" + HOSTILE.replace("\u202e", ""))
    harmless = make_run(tmp_path / "harmless", system_prompt="x")
    parse = MarkdownIt("commonmark", {"html": True}).enable("table").parse
    written = card(run)
    kinds = [token.type for token in parse(written.split("---\n", 2)[2])]
    headings = [line for line in kinds if line == "heading_open"]
    assert len(headings) == len([t for t in parse(card(harmless).split("---\n", 2)[2]) if t.type == "heading_open"])
    page = MarkdownIt("commonmark", {"html": True}).enable("table").render(written.split("---\n", 2)[2])
    assert "<script" not in page and "<h1>Owned" not in page and "\u202e" not in page
    assert "<a " not in page and "55433" not in page
    assert yaml.safe_load(written.split("---\n")[1])["license"]


@given(st.text(max_size=60))
@example("<b>x</b> &amp; <!-- a -->")
def test_text_shows_its_characters(value: str) -> None:
    shown = MarkdownIt("commonmark", {"html": True}).enable("table").render(f"| a |\n| --- |\n| x{text(value)}x |\n")
    cell = re.findall(r"<td>(.*?)</td>", shown, flags=re.DOTALL)
    assert len(cell) == 1 and "<" not in cell[0]
    plain = html.unescape(cell[0])
    visible = "".join(value.split())
    assert "".join(plain.split()) == f"x{''.join(c for c in visible if c in plain)}x"


@given(st.text(max_size=60))
def test_code_stays_code(value: str) -> None:
    shown = (
        MarkdownIt("commonmark", {"html": True}).enable("table").render(f"| a |\n| --- |\n| {code('x' + value)} |\n")
    )
    assert len(re.findall(r"<td><code>[^<]*</code></td>", shown)) == 1


@given(st.text(alphabet="`~\n a#", max_size=40))
def test_a_fence_is_not_ended(value: str) -> None:
    kinds = [token.type for token in MarkdownIt().parse(fence(value, "text"))]
    assert kinds == ["fence"]


def test_a_run_without_an_adapter_has_no_card(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="tune it first"):
        card(RunFolder.create(tmp_path / "new", config={}))
