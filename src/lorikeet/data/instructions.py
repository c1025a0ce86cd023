"""Prompts with verifiable instructions: two packaged sets, or any file in IFEval's layout.

    prompts = load_prompts(None)                     # packaged; or load_prompts(Path("ifeval-541.jsonl"))

`prove` asks the thirty-two of `instructions.jsonl`. `export` chooses the adapter's strength with twenty-four others, so that
what is proved was not chosen on what proves it. `checks` says what follows an instruction.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from lorikeet.data.checks import Instructed, followed, parse_instruction
from lorikeet.errors import InputError


def load_prompts(file: Path | None) -> list[Instructed]:
    """Return the prompts of `file`, or the packaged ones. Raises InputError, naming the line, for what cannot be checked."""
    if file is None:
        return _parse(_packaged("instructions.jsonl"), "the packaged prompts")
    if not file.is_file():
        raise InputError(f"--ifeval {file} is not there; give a JSONL file in IFEval's layout")
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--ifeval {file} cannot be read: {error}; give a JSONL file in IFEval's layout") from error
    prompts = _parse(text, str(file))
    if not prompts:
        raise InputError(f"{file} holds no prompts; give a JSONL file in IFEval's layout")
    return prompts


def prompts_for_choice() -> list[Instructed]:
    """Return the packaged prompts that `export` chooses the adapter's strength with; `prove` asks others."""
    return _parse(_packaged("instructions_for_choice.jsonl"), "the packaged prompts")


def count_followed(prompts: Sequence[Instructed], answers: Sequence[str]) -> list[int]:
    """Return how many of each prompt's instructions its answer follows, strictly."""
    return [sum(followed(prompt, answer)) for prompt, answer in zip(prompts, answers, strict=True)]


def _packaged(name: str) -> str:
    return resources.files("lorikeet.data").joinpath(name).read_text(encoding="utf-8")


def _parse(text: str, origin: str) -> list[Instructed]:
    return [_prompt(line, f"{origin}:{n}") for n, line in enumerate(text.split("\n"), start=1) if line.strip()]


def _prompt(line: str, origin: str) -> Instructed:
    try:
        row = json.loads(line)
        pairs = list(zip(row["instruction_id_list"], row["kwargs"], strict=True))
        return Instructed(str(row["prompt"]), tuple(parse_instruction(name, values) for name, values in pairs))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{origin} is no row in IFEval's layout (prompt, instruction_id_list, kwargs): {error}"
        ) from error
    except InputError as error:
        raise InputError(f"{origin}: {error}") from error
