"""Instructions as short rows of integers, shared by the embedded judge and policy.

A word is hashed rather than looked up, so there is no vocabulary file to ship and a new word needs no new table:
id = 2 + crc32(word) % 1022, with 0 for padding and 1 free for a model's own use. Two words may collide (1022 slots);
the words of this package's own grammar do not: "stove" would fall on "bowl" and is hashed with a suffix instead.
"""

from __future__ import annotations

import re
import unicodedata
import zlib

import numpy as np
from numpy.typing import NDArray

VOCAB_SIZE = 1024
"""Ids are in [0, VOCAB_SIZE)."""

PAD_ID = 0
"""Fills the row after the last word."""

MAX_INSTRUCTION_LENGTH = 200
"""Characters kept by ``clean_instruction``."""

_REHASHED = {"stove": "stove#2"}
_WORD = re.compile(r"[^\W_]+")


def clean_instruction(instruction: str) -> str:
    """Make external text safe for logs, prompts and tokenization.

    Control and formatting characters become spaces, runs of white space become one space, and the result is cut to
    ``MAX_INSTRUCTION_LENGTH`` characters. Case is kept.
    """
    visible = (" " if unicodedata.category(c)[0] in "CZ" else c for c in instruction[: 8 * MAX_INSTRUCTION_LENGTH])
    return " ".join("".join(visible).split())[:MAX_INSTRUCTION_LENGTH].rstrip()


def word_id(word: str) -> int:
    """The id of one word, case-insensitive, in [2, VOCAB_SIZE)."""
    word = word.lower()
    return 2 + zlib.crc32(_REHASHED.get(word, word).encode()) % (VOCAB_SIZE - 2)


def tokenize(instruction: str, max_len: int = 16) -> NDArray[np.int64]:
    """Lower-case words as ids, int64 (max_len,): cut after ``max_len`` words, padded with ``PAD_ID``.

    Punctuation separates words and is dropped, so "Put the cup, please." and "put the cup please" are the same row.
    """
    row = np.full(max_len, PAD_ID, dtype=np.int64)
    words = _WORD.findall(clean_instruction(instruction).lower())[:max_len]
    row[: len(words)] = [word_id(word) for word in words]
    return row
