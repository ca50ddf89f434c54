"""Frames of any size resized for a model, and pictures stored as PNG or JPEG inside Parquet files.

Shape letters: F frames, H W image size, RGB channels last, uint8.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from rawdream_env.data.metadata import inside
from rawdream_env.errors import DatasetError, shorten
from rawdream_env.files import require_regular
from rawdream_env.media import read_picture
from rawdream_env.types import UInt8Array

if TYPE_CHECKING:
    import pyarrow as pa


def resize_frames(frames: UInt8Array, size: tuple[int, int]) -> UInt8Array:
    """Frames uint8 (F, H, W, 3) as (F, *size, 3): bilinear, with antialiasing where it makes them smaller.

    The whole picture is kept: another aspect ratio is squeezed, not cropped, since the cropped border may hold the object
    that the task is about. Frames that already have the size are returned without a copy.
    """
    height, width = size
    if frames.shape[1:3] == (height, width):
        return frames
    out = np.empty((len(frames), height, width, 3), np.uint8)
    for target, frame in zip(out, frames, strict=True):
        # Pillow widens the filter when it shrinks a picture, which is the antialiasing.
        target[:] = np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BILINEAR))
    return out


def decode_pictures(column: pa.ChunkedArray, root: Path) -> UInt8Array:
    """Frames (F, H, W, 3) of a column of ``dtype: image``: cells with ``bytes``, or with a ``path`` below ``root``.

    Raises:
        DatasetError: a picture is missing or damaged, or has another size than those before it.
    """
    pictures = []
    for row, cell in enumerate(column.to_pylist()):
        if not isinstance(cell, dict) or cell.keys() < {"bytes", "path"}:
            raise DatasetError(f"{root}: the picture of row {row} is {shorten(cell)}, expected bytes or a path.")
        source = io.BytesIO(cell["bytes"]) if cell["bytes"] is not None else inside(root, cell["path"])
        try:
            if isinstance(source, Path):
                require_regular(source)
            pictures.append(read_picture(source))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # as Pillow's formats do
            raise DatasetError(
                f"{root}: the picture of row {row} of an episode cannot be read ({error}). Copy the data file again."
            ) from error
        if pictures[-1].shape != pictures[0].shape:
            raise DatasetError(
                f"{root}: the picture of row {row} is {pictures[-1].shape[:2]}, those before it {pictures[0].shape[:2]}. "
                "The frames of an episode must have one size: convert the data set again."
            )
    return np.stack(pictures)
