"""The JPEG round trip of TensorFlow's ``encode_jpeg`` and ``decode_image``: quality 95, halved colour resolution.

TensorFlow decodes with libjpeg's fast integer transform, which is up to 11 grey levels from the accurate one of Pillow and
others. Policies were trained on the former. Entropy coding loses nothing, so only the lossy steps are computed here:
colour conversion, colour subsampling, transform, quantisation, and back in 16-bit arithmetic (Arai, Agui, Nakajima 1988).

Shape letters: H W frame, h w a colour plane padded to whole blocks, N blocks of 8x8.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rawdream_env.types import UInt8Array

Ints = NDArray[np.int32]

_LUMA = np.array(
    [16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55, 14, 13, 16, 24, 40, 57, 69, 56, 14, 17, 22, 29, 51, 87,
     80, 62, 18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92, 49, 64, 78, 87, 103, 121, 120, 101, 72, 92,
     95, 98, 112, 100, 103, 99]
)  # fmt: skip
_CHROMA = np.array([17, 18, 24, 47, 18, 21, 26, 66, 24, 26, 56, 99, 47, 66, 99, 99]).reshape(4, 4)
"""Its upper left corner; the rest is 99."""
_QUALITY_95 = 10
"""Per cent of the standard tables (of Annex K)."""
_COSINES = np.array(
    [[8192, 8192, 8192, 8192], [11363, 9633, 6437, 2260], [10703, 4433, -4433, -10703], [9633, -2259, -11362, -6436],
     [8192, -8192, -8192, 8192], [6437, -11362, 2261, 9633], [4433, -10704, 10704, -4433], [2260, -6436, 9633, -11363]]
)  # fmt: skip
"""libjpeg's accurate transform: 8192 sqrt(2) cos((2 j + 1) k pi / 16), nearly; j = 4..7 mirror these with sign (-1)^k."""
_FORWARD = np.concatenate([_COSINES, _COSINES[:, ::-1] * (-1) ** np.arange(8)[:, None]], 1).T.astype(np.float64)
_SCALE = np.where(np.arange(8), np.cos(np.arange(8) * np.pi / 16) * 2**0.5, 1.0)
"""What the fast transform leaves to the quantisation table, per axis."""


def round_trip(frame: UInt8Array) -> UInt8Array:
    """A frame (H, W, 3) as it comes back from JPEG."""
    height, width = frame.shape[:2]
    luma, *colours = _to_planes(frame.astype(np.int32))
    half = [_halve(_pad_right(plane, 16)) for plane in colours]
    y = _transform(_pad(luma, 16), _table(_LUMA.reshape(8, 8)))[:height, :width]
    chroma = np.pad(_CHROMA, (0, 4), constant_values=99)
    cb, cr = (
        _double(_transform(_pad(plane, 8), _table(chroma))[: -(-height // 2), : -(-width // 2)])[:height, :width]
        for plane in half
    )
    return _to_rgb(y, cb, cr)


def _table(standard: NDArray[np.int64]) -> Ints:
    return np.maximum((standard * _QUALITY_95 + 50) // 100, 1).astype(np.int32)


def _fixed(value: float) -> int:
    return int(value * 65536 + 0.5)


def _to_planes(rgb: Ints) -> tuple[Ints, Ints, Ints]:
    """Y, Cb, Cr in [0, 255], (H, W) each."""
    r, g, b = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    half, middle = 1 << 15, (128 << 16) + (1 << 15) - 1
    y = (_fixed(0.299) * r + _fixed(0.587) * g + _fixed(0.114) * b + half) >> 16
    cb = (-_fixed(0.168735892) * r - _fixed(0.331264108) * g + (b << 15) + middle) >> 16
    cr = ((r << 15) - _fixed(0.418687589) * g - _fixed(0.081312411) * b + middle) >> 16
    return y, cb, cr


def _to_rgb(y: Ints, cb: Ints, cr: Ints) -> UInt8Array:
    cb, cr, half = cb - 128, cr - 128, 1 << 15
    red = y + ((_fixed(1.402) * cr + half) >> 16)
    green = y + ((-_fixed(0.344136286) * cb - _fixed(0.714136286) * cr + half) >> 16)
    blue = y + ((_fixed(1.772) * cb + half) >> 16)
    return np.stack([red, green, blue], -1).clip(0, 255).astype(np.uint8)


def _pad(plane: Ints, multiple: int) -> Ints:
    """Repeat the last row and column up to a multiple."""
    return np.pad(plane, [(0, -size % multiple) for size in plane.shape], mode="edge")


def _pad_right(plane: Ints, multiple: int) -> Ints:
    """Repeat the last column up to a multiple, and the last row of an odd number."""
    return np.pad(plane, [(0, plane.shape[0] % 2), (0, -plane.shape[1] % multiple)], mode="edge")


def _halve(plane: Ints) -> Ints:
    """Means of 2x2, rounded down and up in turn."""
    total = plane[::2, ::2] + plane[1::2, ::2] + plane[::2, 1::2] + plane[1::2, 1::2]
    return (total + 1 + np.arange(total.shape[1]) % 2) >> 2


def _double(plane: Ints) -> Ints:
    """Twice the size by weights 3 and 1 of the nearest and the next sample, along both axes."""
    rows = np.pad(plane, ((1, 1), (0, 0)), mode="edge")
    sums = np.stack([3 * rows[1:-1] + rows[:-2], 3 * rows[1:-1] + rows[2:]], 1).reshape(-1, plane.shape[1])
    wide = np.pad(sums, ((0, 0), (1, 1)), mode="edge")
    left, right = (3 * wide[:, 1:-1] + wide[:, :-2] + 8) >> 4, (3 * wide[:, 1:-1] + wide[:, 2:] + 7) >> 4
    right[:, -1] = (4 * sums[:, -1] + 7) >> 4
    return np.stack([left, right], -1).reshape(len(sums), -1)


def _transform(plane: Ints, table: Ints) -> Ints:
    """A plane (h, w) after quantisation of its blocks' cosine coefficients by ``table`` (8, 8)."""
    h, w = plane.shape
    blocks = plane.reshape(h // 8, 8, w // 8, 8).transpose(0, 2, 1, 3).reshape(-1, 8) - 128.0
    rows = np.floor((blocks @ _FORWARD + 2**10) / 2**11)  # integers, 4 times too large
    columns = rows.reshape(-1, 8, 8).transpose(0, 2, 1).reshape(-1, 8)
    eighths = np.floor((columns @ _FORWARD + 2**14) / 2**15).reshape(-1, 8, 8).transpose(0, 2, 1)
    levels = (np.sign(eighths) * np.floor((np.abs(eighths) + 4 * table) / (8 * table))).astype(np.int32)
    factors = (table * np.rint(np.outer(_SCALE, _SCALE) * 2**14).astype(np.int32) + 2048) >> 12
    coarse = _inverse((levels * factors).transpose(1, 0, 2))  # over the rows of a block: (8, N, 8)
    values = (_inverse(coarse.transpose(2, 1, 0)) >> 5) + 128  # over its columns: (8 columns, N, 8 rows)
    whole: Ints = values.clip(0, 255).transpose(1, 2, 0).reshape(h // 8, w // 8, 8, 8).transpose(0, 2, 1, 3)
    return whole.reshape(h, w)


def _times(x: Ints, factor: float) -> Ints:
    return (x * round(factor * 256)) >> 8


def _inverse(c: Ints) -> Ints:
    """The fast inverse cosine transform of 8 samples over the first axis."""
    root = 2**0.5
    outer_sum, outer_difference = c[0] + c[4], c[0] - c[4]
    inner_sum = c[2] + c[6]
    inner = _times(c[2] - c[6], root) - inner_sum
    even = (outer_sum + inner_sum, outer_difference + inner, outer_difference - inner, outer_sum - inner_sum)
    a, b, d, e = c[5] + c[3], c[5] - c[3], c[1] + c[7], c[1] - c[7]
    odd0 = d + a
    turn = _times(b + e, 1.847759065)
    odd1 = turn + _times(b, -2.613125930) - odd0
    odd2 = _times(d - a, root) - odd1
    odd3 = _times(e, 1.082392200) - turn + odd2
    return np.stack(
        [even[0] + odd0, even[1] + odd1, even[2] + odd2, even[3] - odd3,
         even[3] + odd3, even[2] - odd2, even[1] - odd1, even[0] - odd0]
    )  # fmt: skip
