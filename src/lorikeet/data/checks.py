"""Was an instruction followed? The 25 verifiable instructions of IFEval (Zhou et al., 2023, arXiv 2311.07911).

    prompt = Instructed("Say hello. Use no commas.", (Instruction("punctuation:no_comma", {}),))
    followed(prompt, "Hello!")                # [True]: strict, one an instruction
    followed(prompt, "Hello!", loose=True)    # the best of eight variants of the answer, so that an opening line costs nothing

Ids and arguments are IFEval's, so its files can be read; the checks are our own. It does not know who answered.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from lorikeet.errors import InputError

_TITLES = {"mr", "mrs", "ms", "dr", "prof", "st", "mt", "jr", "sr", "vs", "etc", "inc", "ltd", "co", "no", "e.g", "i.e"}
"""Words whose full stop does not end a sentence; single letters do not either."""

_SENTENCE_END = re.compile(r"(?P<word>\S*?)(?P<mark>[.!?\u3002\uff01\uff1f\u0964]+)[\"'\u201d\u2019)\]*_]*(?=\s|$)")


@dataclass(frozen=True, slots=True)
class Instruction:
    """One verifiable instruction."""

    name: str
    """Its id, such as `punctuation:no_comma`."""
    arguments: Mapping[str, Any]
    """Its numbers and words by IFEval's names."""


@dataclass(frozen=True, slots=True)
class Instructed:
    """A prompt and the instructions in it."""

    prompt: str
    instructions: tuple[Instruction, ...]


def followed(prompt: Instructed, answer: str, *, loose: bool = False) -> list[bool]:
    """Return for each instruction of `prompt` whether `answer` follows it; an empty answer follows none.

    `loose` asks whether any of eight variants does: without the first line, the last, both, and each without asterisks.
    """
    variants = _variants(answer) if loose else [answer]
    return [any(v.strip() and _follows(i, v) for v in variants) for i in prompt.instructions]


def parse_instruction(name: str, arguments: Mapping[str, Any]) -> Instruction:
    """Return the instruction `name`; arguments that are None are left out. Raises InputError for what cannot be checked."""
    given = {key: value for key, value in arguments.items() if value is not None}
    instruction = Instruction(name, given)
    if name not in CHECKS:
        raise InputError(f"{name} is no instruction that can be checked; known are {', '.join(sorted(CHECKS))}")
    try:
        _follows(instruction, "probe")
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{name} cannot be checked with {given}: {error}") from error
    return instruction


def _follows(instruction: Instruction, answer: str) -> bool:
    return CHECKS[instruction.name](answer, **instruction.arguments)


def _variants(answer: str) -> list[str]:
    """Return the answer as it is and without its edges and asterisks, as IFEval's loose criterion has it."""
    lines = answer.split("\n")
    cut = [answer, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return [*cut, *(text.replace("*", "") for text in cut)]


def sentences(text: str) -> int:
    """Return how many sentences `text` has: ends at . ! ? before a space, but not after a title, an initial or a list number."""
    count, last = 0, 0
    for end in _SENTENCE_END.finditer(text):
        word = end["word"].lower().lstrip("\"'([*_\u201c")
        short = end["mark"] == "." and (word in _TITLES or (len(word) == 1 and word != "i" and word.isalpha()))
        line = text[text.rfind("\n", 0, end.start()) + 1 : end.start()]
        listed = end["mark"] == "." and word.isdigit() and not line.strip()
        if not short and not listed:
            count += 1
            last = end.end()
    return count + bool(re.search(r"\w", text[last:]))


def detect_language(text: str) -> str:
    """Return the two-letter code of the language that most of `text` is in."""
    found: str = _detector().classify(text.lower())[0]
    return found


@cache
def _detector() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE)


def _compare(count: int, wanted: int, relation: str) -> bool:
    if relation not in {"at least", "less than"}:
        raise ValueError(f'the relation "{relation}" is neither "at least" nor "less than"')
    return count >= wanted if relation == "at least" else count < wanted


def _occurrences(text: str, word: str) -> int:
    return text.lower().count(word.lower())


def _has_keywords(answer: str, *, keywords: Sequence[str]) -> bool:
    return all(_occurrences(answer, word) for word in keywords)


def _has_keyword_often(answer: str, *, keyword: str, frequency: int, relation: str) -> bool:
    return _compare(_occurrences(answer, keyword), frequency, relation)


def _lacks_words(answer: str, *, forbidden_words: Sequence[str]) -> bool:
    return not any(re.search(rf"\b{re.escape(word)}\b", answer, re.IGNORECASE) for word in forbidden_words)


def _has_letter_often(answer: str, *, letter: str, let_frequency: int, let_relation: str) -> bool:
    return _compare(_occurrences(answer, letter), let_frequency, let_relation)


def _is_in_language(answer: str, *, language: str) -> bool:
    return detect_language(answer) == language


def _has_sentences(answer: str, *, num_sentences: int, relation: str) -> bool:
    return _compare(sentences(answer), num_sentences, relation)


def _has_words(answer: str, *, num_words: int, relation: str) -> bool:
    return _compare(len(re.findall(r"\w+", answer)), num_words, relation)


def _has_paragraphs(answer: str, *, num_paragraphs: int) -> bool:
    """Paragraphs are what stands between dividers of three asterisks; only the first and last may be empty."""
    parts = [part.strip() for part in re.split(r"\s?\*\*\*\s?", answer)]
    return all(parts[1:-1]) and sum(map(bool, parts)) == num_paragraphs


def _paragraph_starts(answer: str, *, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Paragraphs are what stands between empty lines; the first word counts up to its first punctuation mark."""
    paragraphs = answer.split("\n\n")
    if sum(bool(p.strip()) for p in paragraphs) != num_paragraphs or nth_paragraph > num_paragraphs:
        return False
    words = paragraphs[nth_paragraph - 1].split()
    return bool(words) and re.split(r"[.,?!'\"]", words[0].lstrip("'\""))[0].lower() == first_word.lower()


def _has_placeholders(answer: str, *, num_placeholders: int) -> bool:
    return len(re.findall(r"\[.*?\]", answer)) >= num_placeholders


def _has_postscript(answer: str, *, postscript_marker: str) -> bool:
    letters = [re.escape(letter) for letter in postscript_marker.lower().replace(" ", "").split(".") if letter]
    ending = r"\." if postscript_marker.endswith(".") else ""
    return bool(re.search(r"\.\s?".join(letters) + ending, answer.lower()))


def _has_bullets(answer: str, *, num_bullets: int) -> bool:
    return len(re.findall(r"^\s*(?:\*[^*\n]|-)", answer, re.MULTILINE)) == num_bullets


def _is_one_of_three(answer: str) -> bool:
    return any(f"My answer is {word}." in answer for word in ("yes", "no", "maybe"))


def _has_highlights(answer: str, *, num_highlights: int) -> bool:
    double = re.findall(r"\*\*([^\n*]+)\*\*", answer)
    single = re.findall(r"\*([^\n*]+)\*", re.sub(r"\*\*[^\n*]+\*\*", " ", answer))
    return sum(bool(text.strip()) for text in (*double, *single)) >= num_highlights


def _has_sections(answer: str, *, section_spliter: str, num_sections: int) -> bool:
    return len(re.findall(rf"{re.escape(section_spliter)}\s?\d+", answer)) >= num_sections


def _is_json(answer: str) -> bool:
    bare = re.sub(r"^```(?:json)?|```$", "", answer.strip(), flags=re.IGNORECASE).strip()
    try:
        json.loads(bare)
    except (ValueError, RecursionError):
        return False
    return True


def _has_title(answer: str) -> bool:
    return any(title.strip("<> ") for title in re.findall(r"<<([^\n]+)>>", answer))


def _has_two_responses(answer: str) -> bool:
    parts = [part.strip() for part in answer.split("******")]
    filled = [part for part in parts if part]
    return all(parts[1:-1]) and len(filled) == 2 and filled[0] != filled[1]


def _repeats(answer: str, *, prompt_to_repeat: str) -> bool:
    return answer.strip().lower().startswith(prompt_to_repeat.strip().lower())


def _ends_with(answer: str, *, end_phrase: str) -> bool:
    return answer.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def _has_capital_words(answer: str, *, capital_frequency: int, capital_relation: str) -> bool:
    """A word with hyphens, an apostrophe or stops inside (`U.S.`) is one word."""
    words = re.findall(r"\w+(?:[-'\u2019.]\w+)*", answer)
    return _compare(sum(word.isupper() for word in words), capital_frequency, capital_relation)


def _is_english_capitals(answer: str) -> bool:
    return answer.isupper() and detect_language(answer) == "en"


def _is_english_lowercase(answer: str) -> bool:
    return answer.islower() and detect_language(answer) == "en"


def _lacks_commas(answer: str) -> bool:
    return "," not in answer


def _is_quoted(answer: str) -> bool:
    bare = answer.strip()
    return len(bare) > 1 and bare[0] == bare[-1] == '"'


CHECKS: dict[str, Callable[..., bool]] = {
    "change_case:capital_word_frequency": _has_capital_words,
    "change_case:english_capital": _is_english_capitals,
    "change_case:english_lowercase": _is_english_lowercase,
    "combination:repeat_prompt": _repeats,
    "combination:two_responses": _has_two_responses,
    "detectable_content:number_placeholders": _has_placeholders,
    "detectable_content:postscript": _has_postscript,
    "detectable_format:constrained_response": _is_one_of_three,
    "detectable_format:json_format": _is_json,
    "detectable_format:multiple_sections": _has_sections,
    "detectable_format:number_bullet_lists": _has_bullets,
    "detectable_format:number_highlighted_sections": _has_highlights,
    "detectable_format:title": _has_title,
    "keywords:existence": _has_keywords,
    "keywords:forbidden_words": _lacks_words,
    "keywords:frequency": _has_keyword_often,
    "keywords:letter_frequency": _has_letter_often,
    "language:response_language": _is_in_language,
    "length_constraints:nth_paragraph_first_word": _paragraph_starts,
    "length_constraints:number_paragraphs": _has_paragraphs,
    "length_constraints:number_sentences": _has_sentences,
    "length_constraints:number_words": _has_words,
    "punctuation:no_comma": _lacks_commas,
    "startend:end_checker": _ends_with,
    "startend:quotation": _is_quoted,
}
"""An instruction's id -> whether an answer follows it."""
