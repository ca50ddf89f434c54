"""Frames of any size to the size a model wants, and pictures kept as PNG or JPEG inside Parquet files.

Shape letters: F frames, H W image size, RGB channels last, uint8.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rawdream_env.errors import DatasetError
from rawdream_env.media import read_picture
from rawdream_env.types import UInt8Array

if TYPE_CHECKING:
    import pyarrow as pa


def resize_frames(frames: UInt8Array, size: tuple[int, int]) -> UInt8Array:
    """Frames uint8 (F, H, W, 3) as (F, *size, 3): bilinear, with antialiasing where it makes them smaller.

    The whole picture is kept: another aspect ratio is squeezed, not cut, since the cut-off border may hold the object
    that the task is about. Frames that have the size already come back as they are, without a copy.
    """
    from PIL import Image

    height, width = size
    if frames.shape[1:3] == (height, width):
        return frames
    out = np.empty((len(frames), height, width, 3), np.uint8)
    for target, frame in zip(out, frames, strict=True):
        # PIL widens the filter when it shrinks a picture: that is the antialiasing.
        target[:] = np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BILINEAR))
    return out


def decode_pictures(column: pa.ChunkedArray, root: Path) -> UInt8Array:
    """Frames (F, H, W, 3) of a column of ``dtype: image``: cells with ``bytes``, or with a ``path`` below ``root``.

    Raises:
        DatasetError: a picture is missing or damaged, or not of its neighbours' size.
    """
    pictures = []
    for row, cell in enumerate(column.to_pylist()):
        source = io.BytesIO(cell["bytes"]) if cell["bytes"] is not None else root / str(cell["path"])
        try:
            pictures.append(read_picture(source))
        except (OSError, ValueError) as error:
            raise DatasetError(
                f"{root}: the picture of row {row} of an episode cannot be read ({error}). Copy the data file again."
            ) from error
        if pictures[-1].shape != pictures[0].shape:
            raise DatasetError(
                f"{root}: the picture of row {row} is {pictures[-1].shape[:2]}, those before it {pictures[0].shape[:2]}. "
                "The frames of an episode must have one size: convert the data set again."
            )
    return np.stack(pictures)
