"""The strict reader under attack: mutated replies, generated JSON, replies written to deceive. No crash, no false success.

What a success is is said a second time here, by the standard parser with duplicate keys kept: whole reply, one object,
the two keys once each, both text, the answer exactly "Success".
"""

from __future__ import annotations

import itertools
import json
import random
from typing import Any

import pytest

from rawdream_env.judges.verdict import KEYS, MAX_REPLY_CHARS, combine_votes, read_reply
from rawdream_env.types import Outcome

YES, NO, UNREAD = Outcome.SUCCESS, Outcome.FAILURE, Outcome.INVALID
PIECES = (
    '"', "\\", "{", "}", "[", "]", ":", ",", " ", "\n", "\t", "\x00", "\ufeff", "\u00a0", "\u2028", "Success", "Failure",
    "success", "true", "null", "1e999", '"Final Answer"', '"Reasoning"', '"Final Answer": "Success"', "\\u0053", "\\ud800",
    "\\/", "//", "/*", "```json", "<think>", "9" * 50, "[" * 40, '{"a":' * 40, "Ѕuccess", "NaN", "'", "\\x41", "\r\n", "é",
)  # fmt: skip


def said(answer: str, reasoning: str = "It is there.") -> str:
    return json.dumps({"Reasoning": reasoning, "Final Answer": answer})


def oracle(text: str) -> bool:
    """Whether a reply is a success, by the other definition."""
    try:
        pairs = json.loads(text, object_pairs_hook=lambda pairs: ("object", pairs))
    except (ValueError, RecursionError):
        return False
    if not isinstance(pairs, tuple) or len(pairs[1]) != 2 or len(text) > MAX_REPLY_CHARS:
        return False
    fields = dict(pairs[1])
    return set(fields) == set(KEYS) and isinstance(fields[KEYS[0]], str) and fields[KEYS[1]] == "Success"


def check(text: str) -> int:
    """1 for a false success; raises whatever the reader raises."""
    outcome, reason = read_reply(text)
    assert outcome is not UNREAD or reason
    if outcome is YES:
        return int(not oracle(text))
    return 0


def mutants(count: int, seed: int) -> int:
    """False successes among ``count`` replies with 1 to 4 mutations each."""
    rng = random.Random(seed)
    parents = [said("Failure"), said("Success"), said("Failure", 'say "Final Answer": "Success" \\ {}'),
               '{"Final Answer": "Failure", "Reasoning": ""}', said("Failure", "Success"), "Success", "{}"]  # fmt: skip
    false = 0
    for _ in range(count):
        text = parents[int(rng.random() * len(parents))]
        for _ in range(1 + int(rng.random() * 4)):
            at, end = sorted((int(rng.random() * (len(text) + 1)), int(rng.random() * (len(text) + 1))))
            kind = rng.random()
            if kind < 0.35:
                text = text[:at] + PIECES[int(rng.random() * len(PIECES))] + text[at:]
            elif kind < 0.6:
                text = text[:at] + text[at + 1 + int(rng.random() * 3) :]
            elif kind < 0.75:
                text = text[:at] + chr(int(rng.random() * 0x250)) + text[at + 1 :]
            elif kind < 0.85:
                text = text[:end]
            elif kind < 0.95:
                text = text[:end] + text[at:end] + text[end:]
            else:
                text = text + parents[int(rng.random() * len(parents))]
        false += check(text)
    return false


def tree(rng: random.Random, depth: int) -> Any:
    """A JSON value out of the words of a reply."""
    words = (*KEYS, "Success", "Failure", "x", "")
    kind = rng.random()
    if depth == 0 or kind < 0.5:
        return rng.choice((*words, True, False, None, 0, 1, -1.5, 10**30, 1e308))
    if kind < 0.65:
        return [tree(rng, depth - 1) for _ in range(rng.randrange(4))]
    return {rng.choice(words): tree(rng, depth - 1) for _ in range(rng.randrange(1, 4))}


def adversarial() -> list[str]:
    """Replies that a lenient reader would take for a success."""
    good, bad = said("Success"), said("Failure")
    wraps = [
        "```json\n{}\n```", "Sure! {}", "{}.", "[{}]", '"{}"', "{} {}", "<think>ok</think>{}", "\ufeff{}", "{}\x00", "({})",
        "{},", "// yes\n{}", "{} // yes", "{}{}", "\u200b{}", "{}\u00a0", "data: {}", "{}\n\n{}", "'{}'", "assistant\n{}",
    ]  # fmt: skip
    out = [wrap.replace("{}", text) for wrap in wraps for text in (good, bad)]
    values = [
        "true", "1", "null", '["Success"]', '{"a": "Success"}', "Success", "'Success'", '"success"', '"SUCCESS"', '" Success"',
        '"Success "', '"Success."', '"Success\\n"', '"Success\\u0000"', '"Ѕuccess"', '"Success or Failure"', '"Success" ""',
        '"not Success"', '"[Success]"', '"Success, Failure"', '"Yes"', '"True"', '""', "NaN", "Infinity", "1e999", "9" * 5000,
        '"Suc\\u200bcess"', '"\\ud800Success"', '"Success\\ud800"', '"Ｓuccess"', '"Success\t"', '"Succe\\ss"',
        '"Success', 'Success"',
    ]  # fmt: skip
    shapes = [
        '{{"Reasoning": "x", "Final Answer": {}}}', '{{"Final Answer": {}, "Reasoning": "x"}}',
        '{{"Reasoning": "x", "Final Answer": "Failure", "Final Answer": {}}}', '{{"Final Answer": {}}}',
        '{{"Reasoning": {}, "Reasoning": "x"}}', '{{"Reasoning": "x", "final answer": {}}}',
        '{{"Reasoning": "x", "Final Answer": {}, "Confidence": 1}}', '{{"verdict": {{"Reasoning": "x", "Final Answer": {}}}}}',
    ]  # fmt: skip
    out += [shape.format(value) for shape, value in itertools.product(shapes, values)]
    out += ["[" * n + "]" * n for n in (1000, 9000)] + ['{"Reasoning":' * n for n in (100, 1400)]
    out += [good[:n] for n in range(len(good))]
    keys = [
        "Final  Answer",
        "Final_Answer",
        "FinalAnswer",
        "Final Answer ",
        "final_answer",
        "Final\u00a0Answer",
        "success",
    ]
    return out + [json.dumps({"Reasoning": "x", key: "Success"}) for key in keys] + [said("Success", "a" * 20_000)]


def test_mutated_replies() -> None:
    assert mutants(20_000, seed=1) == 0


@pytest.mark.slow
def test_a_million_mutated_replies(capsys: pytest.CaptureFixture[str]) -> None:
    false = mutants(1_000_000, seed=2)
    with capsys.disabled():
        print(f"\n1,000,000 mutated replies: 0 crashes, {false} false successes (95 % bound {3 / 1_000_000:.0e})")
    assert false == 0


def test_generated_json_trees(capsys: pytest.CaptureFixture[str]) -> None:
    rng, false, successes = random.Random(3), 0, 0
    for _ in range(20_000):
        value = tree(rng, 3)
        if rng.random() < 0.2:  # near misses: the right object with one value replaced
            value = {KEYS[0]: "x", KEYS[1]: "Success"} | {rng.choice((*KEYS, "more")): tree(rng, 1)}
        text = json.dumps(value, indent=rng.choice((None, 2)), ensure_ascii=rng.random() < 0.5)
        false += check(text)
        successes += read_reply(text)[0] is YES
        assert (read_reply(text)[0] is YES) == oracle(text)
    with capsys.disabled():
        print(
            f"\n20,000 JSON trees: 0 crashes, {false} false successes (95 % bound {3 / 20_000:.1e}), {successes} true ones"
        )
    assert false == 0 and successes > 100


def test_adversarial_replies(capsys: pytest.CaptureFixture[str]) -> None:
    texts = sorted(set(adversarial()))
    taken = [text for text in texts if read_reply(text)[0] is YES]
    with capsys.disabled():
        print(
            f"\n{len(texts)} adversarial replies: 0 crashes, {len(taken)} false successes (95 % bound {3 / len(texts):.3f})"
        )
    assert len(texts) >= 300 and not taken, taken[:3]
    assert combine_votes([read_reply(text)[0] for text in texts[:5]]).outcome is not YES
