"""From raw replies to a three-valued verdict: the strict reader and the majority of several votes.

The reader accepts a reply only if *all* of it is one JSON object with exactly the two keys of the prompt (paper A.5),
``"Reasoning"`` (text) and ``"Final Answer"`` (``"Success"`` or ``"Failure"``). Anything else is INVALID with its reason.
Readers that salvage JSON from free text accept ``{"success": "false"}``, truncated objects or quoted instructions as
successes, and reinforcement learning exploits such errors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace

from rawdream_env.types import Outcome, Verdict

MAX_REPLY_CHARS = 20_000
MAX_REASON_CHARS = 500
KEYS = ("Reasoning", "Final Answer")
ANSWERS = {"Success": Outcome.SUCCESS, "Failure": Outcome.FAILURE}

_SPACE = r"[ \t\r\n]*+"
_STRING = r'"(?:[^"\\\x00-\x1f]|\\["\\/bfnrt]|\\u[0-9a-fA-F]{4})*+"'
_PAIR = rf"({_STRING}){_SPACE}:{_SPACE}({_STRING})"
# The schema is flat, so one linear pattern with possessive repeats reads it: no recursion, no number overflow and no
# duplicate keys that a parser resolves silently.
_OBJECT = re.compile(rf"{_SPACE}\{{{_SPACE}{_PAIR}{_SPACE},{_SPACE}{_PAIR}{_SPACE}\}}{_SPACE}")


def read_reply(reply: object) -> tuple[Outcome, str]:
    """Read one reply of a vision-language judge.

    Returns the outcome and a text: the model's reasoning (cut to 500 characters), or the reason for INVALID. Never
    raises.
    """
    if not isinstance(reply, str):
        return Outcome.INVALID, f"the reply is {type(reply).__name__}, expected text"
    if len(reply) > MAX_REPLY_CHARS:
        return Outcome.INVALID, f"the reply has {len(reply)} characters, at most {MAX_REPLY_CHARS} are read"
    if not reply.strip():
        return Outcome.INVALID, "the reply is empty"
    match = _OBJECT.fullmatch(reply)
    if match is None:
        return Outcome.INVALID, f"the reply is not one flat JSON object with exactly the text keys {KEYS}"
    first, first_value, second, second_value = (str(json.loads(token)) for token in match.groups())
    fields = {first: first_value, second: second_value}
    if set(fields) != set(KEYS):
        return Outcome.INVALID, _printable(f"the reply has the keys {first!r} and {second!r}, expected {KEYS}")
    answer = fields["Final Answer"]
    if answer not in ANSWERS:
        return Outcome.INVALID, _printable(f"the final answer is {answer[:40]!r}, expected 'Success' or 'Failure'")
    return ANSWERS[answer], _printable(fields["Reasoning"])


def combine_votes(votes: Sequence[Outcome], need: int = 4) -> Verdict:
    """Three-valued majority (paper section 3.2: n = 5 samples, success when at least 4 say so).

    SUCCESS when ``need`` votes say so; FAILURE when ``need`` could not have been reached even if every unreadable or
    missing vote had been a success; INVALID in between, so that an outage is never taken for a failure.
    """
    if need < 1:
        raise ValueError(f"need is {need}, at least one success must be asked for")
    yes = sum(vote == Outcome.SUCCESS for vote in votes)
    no = sum(vote == Outcome.FAILURE for vote in votes)
    unknown = len(votes) - yes - no + max(0, need - len(votes))
    tally = f"{yes} success, {no} failure, {unknown} unreadable or missing; {need} successes needed"
    if yes >= need:
        outcome = Outcome.SUCCESS
    elif yes + unknown < need:
        outcome = Outcome.FAILURE
    else:
        outcome = Outcome.INVALID
    readable = yes + no
    return Verdict(outcome, reason=tally, probability=yes / readable if readable else None, votes=tuple(votes))


def verdict_of(replies: Sequence[tuple[object, str]], votes: int, need: int, latency_s: float = 0.0) -> Verdict:
    """The verdict of raw replies to one question, each with its finish reason ("stop", "length", ...).

    Missing votes count as unreadable. The reason is the tally and the reasoning of the first vote that agrees with the
    verdict; for INVALID, the error of the first unreadable vote.
    """
    read = [read_reply(text) for text, _ in replies]
    outcomes = [outcome for outcome, _ in read] + [Outcome.INVALID] * (votes - len(read))
    verdict = combine_votes(outcomes, need)
    said = next((text for outcome, text in read if outcome == verdict.outcome), "")
    if verdict.outcome == Outcome.INVALID and any(end == "length" for _, end in replies):
        said += " (cut at the limit of tokens)"
    raw = tuple(_storable(text) for text, _ in replies)
    return replace(
        verdict, reason=f"{verdict.reason}; {said}" if said else verdict.reason, raw=raw, latency_s=latency_s
    )


def _storable(reply: object) -> str:
    """A raw reply as valid UTF-8 that reads to the same vote; characters beyond the limit are cut."""
    text = reply if isinstance(reply, str) else f"(not text but {type(reply).__name__})"
    return text[: MAX_REPLY_CHARS + 1].encode("utf-8", "replace").decode("utf-8")


def _printable(text: str) -> str:
    """Text for terminals, logs and JSON: no control characters, no lone surrogates, bounded length."""
    cut = text[:MAX_REASON_CHARS].encode("utf-8", "replace").decode("utf-8")
    return "".join(character if character.isprintable() else " " for character in cut)
