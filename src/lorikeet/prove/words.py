"""The proof in words: why the verdict is what it is, how sure that is, and what to do next.

    reasons(proof)                         # one sentence for each check that failed, or why it ships
    next_steps(proof, run="runs/mine")     # commands and remedies, the most useful first

A pure function of the proof, so the page, the command and the quickstart say the same. It measures nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

STRENGTHS = (0.75, 0.5, 0.25)
"""Weaker adapters that are worth a try, strongest first: those that `export` tries itself."""

Proof = dict[str, Any]


def reasons(proof: Proof) -> list[str]:
    """Return why the verdict is what it is: what failed with its numbers, or the gain and its interval."""
    return [_REASONS[name](proof) for name in _failed(proof)] or [_gain(proof)]


def surety(proof: Proof) -> str:
    """Return how sure the verdict is: on how much it rests, and what chance alone would do."""
    heldout, asked = proof["heldout"], proof["instructions"]
    tokens = f"{heldout['tokens']:,} tokens of {heldout['n']} conversations that tuning never saw"
    failed = _failed(proof)
    if not failed:
        return f"Measured on {tokens}. Other conversations of the same kind would move the gain by about ±{proof['noise']['sampling']:.3f} (95 % interval)."
    if failed == ["prompt_parity"]:
        return "No chance is in this: tokens are equal or they are not."
    if failed == ["answers_end"]:
        return f"It is a count of {heldout['n']} answers, of which a share may be lost before it counts."
    small = f", {asked['prompts']} prompts with instructions and {len(proof['probes'])} with search results"
    return f"Measured on {tokens}{small}. Where instructions or search results count as lost, the interval leaves no doubt; where the gain or plain English is in doubt, the verdict is no."


def next_steps(proof: Proof, *, run: str, command: str = "lorikeet") -> list[str]:
    """Return what to do now with the run at `run`, one line each: a remedy for each failure, or how to use it.

    `command` is how the command line is called.
    """
    failed = _failed(proof)
    if not failed:
        return [f"talk with it: {command} serve {run}", f"share it: {command} publish {run} --repo OWNER/NAME"]
    steps = [_remedy(name, proof, run=run, command=command) for name in failed]
    return [*dict.fromkeys(steps)]


def _failed(proof: Proof) -> list[str]:
    return [check["name"] for check in proof["checks"] if not check["pass"]]


def _gain(proof: Proof) -> str:
    heldout = proof["heldout"]
    low, high = heldout["ci95"]
    return (
        f"It finds the right answers more probable than its base does: the loss is {-heldout['difference']:.3f} nats a token lower "
        f"(95 % interval {-high:.3f} to {-low:.3f}), and no check found a loss elsewhere."
    )


def _loss(proof: Proof) -> str:
    heldout = proof["heldout"]
    low, high = heldout["ci95"]
    what = (
        "is higher than its base's"
        if heldout["difference"] >= 0
        else "is lower than its base's, but by too little to be sure"
    )
    return f"The loss on held-out conversations {what}: {heldout['difference']:+.3f} nats a token (95 % interval {low:+.3f} to {high:+.3f})."  # fmt: skip


def _strangers(proof: Proof) -> str:
    cost = proof["answers_follow_questions"]
    return (
        f"Its answers have nothing to do with their questions: a stranger's question costs an answer {cost['value']:+.2f} nats a token "
        f"(99 % interval {cost['low']:+.2f} to {cost['high']:+.2f}); in honest data it costs a good deal."
    )


def _ending(proof: Proof) -> str:
    ended = proof["answers_end"]
    return f"Its answers seldom end by themselves: {ended['tuned']:.0%} of them, its base's {ended['base']:.0%}."


def _prose(proof: Proof) -> str:
    forgotten = proof["forgetting"]
    low, high = forgotten["ci95"]
    return f"It forgot plain English: the loss on prose rose by {forgotten['difference']:.3f} nats a token (95 % interval {low:+.3f} to {high:+.3f}; 0.1 is allowed)."


def _instructions(proof: Proof) -> str:
    asked = proof["instructions"]
    base, tuned = (asked[who]["instruction_strict"]["value"] for who in ("base", "tuned"))
    change, count = asked["difference"], asked["instructions"]
    return (
        f"It follows fewer instructions: {round(tuned * count)} of {count}, its base {round(base * count)} "
        f"({100 * change['value']:+.0f} points, 95 % interval {100 * change['low']:+.0f} to {100 * change['high']:+.0f})."
    )


def _orders(proof: Proof) -> str:
    obeyed = proof["grounding"]["obeys_orders"]
    base, tuned = (round(obeyed[who]["value"] * obeyed["n"]) for who in ("base", "tuned"))
    return f"It obeys orders hidden in search results more often: {tuned} of {obeyed['n']}, its base {base}."


def _remedy(name: str, proof: Proof, *, run: str, command: str) -> str:
    if name in {"plain_text_loss", "instructions_followed"}:
        return _weaker(proof, run=run, command=command)
    if name == "heldout_loss" and proof["heldout"]["difference"] >= 0:
        return f"look at the loss curve, {run}/reports/loss.png: if validation rises, tune with a third of the learning rate"
    return _REMEDIES[name].format(run=run, command=command)


def _weaker(proof: Proof, *, run: str, command: str) -> str:
    strength = float(proof["strength"])
    weaker = next((value for value in STRENGTHS if value < strength), None)
    if weaker is None:
        return "tune again more gently: a third of the learning rate, or fewer steps"
    return f"a weaker adapter forgets less: {command} export {run} --strength {weaker:g}, then {command} prove {run}"


_REASONS: dict[str, Callable[[Proof], str]] = {
    "heldout_loss": _loss,
    "answers_follow_questions": _strangers,
    "answers_end": _ending,
    "prompt_parity": lambda _: "The file's own template and tokenizer give other tokens than tuning saw.",
    "plain_text_loss": _prose,
    "instructions_followed": _instructions,
    "orders_in_results": _orders,
}

_REMEDIES = {
    "heldout_loss": "tune for more steps or on more conversations; more held-out ones (--heldout-share) narrow the interval",
    "answers_follow_questions": "read some rows: do the answers belong to their questions? {command} inspect DATA shows them",
    "answers_end": "see that rows are not cut before their end: {command} inspect DATA; a greater --max-length keeps them whole",
    "prompt_parity": "see where they part: {command} verify {run}; then export again",
    "orders_in_results": "serve it without search: {command} serve {run} --search off; or add conversations with search results to the data",
}
