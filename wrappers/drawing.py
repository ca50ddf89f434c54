"""Draws an episode as a film: dreams side by side, the instruction, an action strip, the verdict as border colour.

Shape letters: F frames, H W height and width, A action dimensions. Colours are RGB, 0 to 255; lengths are pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from rawdream_env.errors import InvalidOptionError
from rawdream_env.media import encode_gif, encode_video
from rawdream_env.types import UInt8Array

Colour = tuple[int, int, int]
Format = Literal["gif", "mp4"]

COLOURS: dict[str, Colour] = {
    "success": (46, 160, 67),
    "failure": (218, 54, 51),
    "invalid": (139, 148, 158),
    "flagged": (210, 153, 34),
}
"""Border colours by the word for an episode's outcome; the evaluation reports use them too."""

MIN_PANEL = 256  # a panel's shorter side is scaled up to at least this
_BORDER, _GAP, _STRIP, _LINE, _FONT = 8, 8, 72, 20, 15
_INK, _PAPER, _AXIS = (24, 24, 24), (250, 250, 248), (190, 190, 190)
_POSITIVE, _NEGATIVE = (9, 105, 218), (191, 57, 137)
_LABELS = ("dx", "dy", "dz", "droll", "dpitch", "dyaw", "grip")


@dataclass(frozen=True)
class Panel:
    """One film in the picture: ``frames`` uint8 (F, H, W, 3), a ``title``, an ``outcome`` for its colour."""

    title: str
    frames: UInt8Array
    outcome: str


def compose(
    panels: Sequence[Panel], outcome: str, instruction: str, actions: NDArray[np.floating] | None = None
) -> Iterator[UInt8Array]:
    """The pictures of a film, one per frame of the longest panel; shorter panels hold their last frame.

    Args:
        panels: one or more films, drawn side by side from left to right.
        outcome: a key of `COLOURS`; the border of the whole picture.
        instruction: written above the panels, wrapped.
        actions: (F - 1, A) in [-1, 1]; frame f shows the action that led to it, the first frame none.

    Yields:
        uint8 (H', W', 3), all of one size.
    """
    scaled = [_enlarged(panel.frames) for panel in panels]
    widths = [frames.shape[2] for frames in scaled]
    panel_height = max(frames.shape[1] for frames in scaled)
    width = sum(widths) + _GAP * (len(panels) - 1) + 2 * (_BORDER + _GAP)
    font = ImageFont.load_default(_FONT)
    lines = _wrapped(instruction, font, width - 2 * (_BORDER + _GAP))
    top = _BORDER + _GAP + _LINE * (len(lines) + 1)
    strip_top = top + panel_height + _GAP
    height = strip_top + (_STRIP if actions is not None else 0) + _BORDER

    page = Image.new("RGB", (width, height), COLOURS[outcome])
    draw = ImageDraw.Draw(page)
    draw.rectangle((_BORDER, _BORDER, width - _BORDER - 1, height - _BORDER - 1), fill=_PAPER)
    for i, line in enumerate(lines):
        draw.text((_BORDER + _GAP, _BORDER + 4 + i * _LINE), line, fill=_INK, font=font)
    lefts = [_BORDER + _GAP + sum(widths[:i]) + _GAP * i for i in range(len(panels))]
    for panel, left, frames in zip(panels, lefts, scaled, strict=True):
        draw.text((left, top - _LINE), f"{panel.title}: {panel.outcome}", fill=COLOURS[panel.outcome], font=font)
        box = (left - 3, top - 3, left + frames.shape[2] + 2, top + frames.shape[1] + 2)
        draw.rectangle(box, fill=COLOURS[panel.outcome])

    for f in range(max(len(frames) for frames in scaled)):
        picture = page.copy()
        for left, frames in zip(lefts, scaled, strict=True):
            picture.paste(Image.fromarray(frames[min(f, len(frames) - 1)]), (left, top))
        if actions is not None:
            shown = actions[min(f, len(actions)) - 1] if f and len(actions) else np.zeros(len(_LABELS))
            _draw_bars(ImageDraw.Draw(picture), shown, strip_top, width)
        yield np.asarray(picture)


def encode(pictures: Sequence[UInt8Array], fps: float, format: Format) -> bytes:
    """A gif or an H.264 mp4 as bytes, from uint8 (H, W, 3) pictures of one size at ``fps`` Hz."""
    if format == "gif":
        return encode_gif(pictures, fps)
    if format == "mp4":
        return encode_video([np.stack(pictures)], fps)
    raise InvalidOptionError(f"Video format {format!r} is unknown; use 'gif' or 'mp4'.")


def _enlarged(frames: UInt8Array) -> UInt8Array:
    """Frames scaled by a whole factor, nearest pixel, so that the shorter side is at least `MIN_PANEL`."""
    factor = -(-MIN_PANEL // min(frames.shape[1:3]))
    return frames.repeat(factor, axis=1).repeat(factor, axis=2)


def _wrapped(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> list[str]:
    lines: list[str] = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _draw_bars(draw: ImageDraw.ImageDraw, action: NDArray[np.floating], top: int, width: int) -> None:
    """One bar per action dimension, from the middle up for positive values and down for negative ones."""
    left, right = _BORDER + _GAP, width - _BORDER - _GAP
    labels = _LABELS if len(action) == len(_LABELS) else tuple(str(i) for i in range(len(action)))
    slot = (right - left) / len(action)
    half = (_STRIP - _LINE) // 2 - 2
    middle = top + half
    font = ImageFont.load_default(11)
    draw.line((left, middle, right, middle), fill=_AXIS)
    for i, (label, value) in enumerate(zip(labels, np.clip(action, -1, 1), strict=True)):
        centre = left + slot * (i + 0.5)
        end = middle - float(value) * half
        draw.rectangle(
            (centre - slot / 4, min(middle, end), centre + slot / 4, max(middle, end)),
            fill=_POSITIVE if value >= 0 else _NEGATIVE,
        )
        draw.text((centre - font.getlength(label) / 2, top + 2 * half + 4), label, fill=_INK, font=font)
