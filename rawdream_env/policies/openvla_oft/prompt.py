"""Instructions to token ids: "In: What action should the robot take to INSTRUCTION?", a new line, "Out:", and a blank.

The blank (id 29871) comes between "Out:" and the first action token in the training data. The tokenizer is read from
``tokenizer.json`` with the ``tokenizers`` library alone: a tokenizer class might change its rules between versions.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from rawdream_env.errors import CheckpointError, InvalidOptionError
from rawdream_env.text import clean_instruction

BOS, STOP, BLANK = 1, 2, 29871
_EXPECTED = {"<s>": BOS, "</s>": STOP, "▁": BLANK}
MAX_PROMPT_TOKENS = 512


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder.

    Raises:
        CheckpointError: there is none, or it is not Llama-2's.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; copy it from the checkpoint that {folder.name} was trained from.")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises Exception itself
        raise CheckpointError(f"{path} cannot be read ({error}); copy it again.") from error
    found = {token: tokenizer.token_to_id(token) for token in _EXPECTED}
    if found != _EXPECTED:
        raise CheckpointError(f"{path} is not Llama-2's tokenizer: it has ids {found}, expected {_EXPECTED}.")
    return tokenizer


def prompt_text(instruction: str) -> str:
    """The sentence around an instruction, as in training."""
    return f"In: What action should the robot take to {clean_instruction(instruction).lower()}?\nOut:"


def prompt_ids(tokenizer: Tokenizer, instruction: str) -> list[int]:
    """Ids from BOS to the blank.

    Raises:
        InvalidOptionError: the instruction is far too long.
    """
    ids = with_blank([BOS, *tokenizer.encode(prompt_text(instruction), add_special_tokens=False).ids])
    if len(ids) > MAX_PROMPT_TOKENS:
        raise InvalidOptionError(f"the instruction has {len(ids)} tokens, at most {MAX_PROMPT_TOKENS} fit; shorten it.")
    return ids


def with_blank(ids: Sequence[int]) -> list[int]:
    """``ids`` with the blank appended, unless it is the last already."""
    return [*ids] if ids[-1] == BLANK else [*ids, BLANK]
