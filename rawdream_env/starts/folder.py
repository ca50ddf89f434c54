"""Starts from a folder of photographs with an instruction for each."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from rawdream_env.errors import DatasetError, shorten
from rawdream_env.files import read_json, require_regular
from rawdream_env.seeding import NoiseKey
from rawdream_env.starts.base import TaskLike
from rawdream_env.starts.memory import ListStarts
from rawdream_env.types import Start, UInt8Array

_KEYS = {"instruction", "task_id", "proprio", "seed"}


class FolderStarts:
    """Images of a folder that also holds an ``instructions.json``.

    The file maps image names to an instruction, or to an object with ``instruction`` and, optionally, ``task_id``
    (integer), ``proprio`` (list of numbers, SI units) and ``seed``::

        {"left.png": "put the spoon into the bowl",
         "right.jpg": {"instruction": "place the pot on the stove", "task_id": 1}}

    Images are turned as their orientation tag says, cropped around the centre to the aspect ratio of the frames, and
    resized. Instructions without a ``task_id`` are numbered in alphabetical order after the largest given number.
    """

    def __init__(self, folder: str | PathLike[str], *, frame_shape: tuple[int, int, int] = (64, 64, 3)) -> None:
        """Read the list and every image.

        Raises:
            DatasetError: the list or an image is missing or unreadable; the message names the file.
        """
        self.folder = Path(folder)
        listing = self.folder / "instructions.json"
        entries = read_json(listing, "it must map image names to instructions", DatasetError)
        if not entries:
            raise DatasetError(f"{listing} must be a JSON object with at least one image name.")
        parsed = {name: _parse_entry(listing, name, entry) for name, entry in sorted(entries.items())}
        ids = _number_tasks(parsed)
        self._list = ListStarts(
            [
                Start(
                    load_image(self.folder / name, frame_shape),
                    entry["instruction"],
                    entry.get("task_id", ids.get(entry["instruction"], -1)),
                    None if entry.get("proprio") is None else np.asarray(entry["proprio"], dtype=np.float32),
                    entry.get("seed"),
                )
                for name, entry in parsed.items()
            ]
        )

    @property
    def starts(self) -> tuple[Start, ...]:
        """Every start, in the order of the file names."""
        return self._list.starts

    @property
    def tasks(self) -> tuple[tuple[str, str], ...]:
        """(name, instruction) of every task; the name is the instruction."""
        return self._list.tasks

    def sample(self, key: NoiseKey, task: TaskLike = None) -> Start:
        """See :class:`StartSource`; ``task`` is an instruction or a task id."""
        return self._list.sample(key, task)


def load_image(path: Path, frame_shape: tuple[int, int, int]) -> UInt8Array:
    """An image file as uint8 (H, W, 3): upright, cropped around the centre to the aspect ratio, then resized.

    Raises:
        DatasetError: the file is missing or no image.
    """
    from PIL import Image, ImageOps

    height, width, _ = frame_shape
    try:
        require_regular(path)
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
            fitted = ImageOps.fit(upright, (width, height), Image.Resampling.BOX)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DatasetError(f"{path} cannot be read as an image ({error}).") from error
    return np.array(fitted, dtype=np.uint8)


def _parse_entry(listing: Path, name: str, entry: Any) -> dict[str, Any]:
    if Path(name).name != name:
        raise DatasetError(f"{listing}: {name!r} must be the plain name of a file in the same folder.")
    if isinstance(entry, str):
        entry = {"instruction": entry}
    if not isinstance(entry, dict) or not isinstance(entry.get("instruction"), str) or not entry["instruction"].strip():
        raise DatasetError(f"{listing}: {name!r} needs an instruction that is not empty.")
    unknown = set(entry) - _KEYS
    if unknown:
        raise DatasetError(
            f"{listing}: {name!r} has unknown keys {shorten(sorted(unknown))}; known are {sorted(_KEYS)}."
        )
    for key in ("task_id", "seed"):
        if entry.get(key) is not None and (isinstance(entry[key], bool) or not isinstance(entry[key], int)):
            raise DatasetError(f"{listing}: {key} of {name!r} must be an integer, not {shorten(entry[key])}.")
    proprio = entry.get("proprio")
    if proprio is not None:
        numbers = isinstance(proprio, list) and all(isinstance(x, int | float) for x in proprio)
        if not numbers or not np.isfinite(np.asarray(proprio, dtype=np.float64)).all():
            raise DatasetError(
                f"{listing}: proprio of {name!r} must be a list of finite numbers, not {shorten(proprio)}."
            )
    return {key: value for key, value in entry.items() if value is not None}


def _number_tasks(parsed: dict[str, dict[str, Any]]) -> dict[str, int]:
    given = {e["instruction"]: e["task_id"] for e in parsed.values() if "task_id" in e}
    first = max(given.values(), default=-1) + 1
    rest = sorted({e["instruction"] for e in parsed.values()} - set(given))
    return {**given, **{instruction: first + i for i, instruction in enumerate(rest)}}
