"""``rawdream camera check``: what the policy will see, beside what the world model was trained on."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from rawdream_env.errors import InvalidOptionError
from rawdream_env.evaluation.reporting import pictures
from rawdream_env.evaluation.reporting.numbers import aligned
from rawdream_env.files import atomic_write_bytes
from rawdream_env.media import encode_picture
from rawdream_env.piper.arm.camera import CameraView, open_camera
from rawdream_env.seeding import NoiseKey
from rawdream_env.starts import load_starts
from rawdream_env.types import UInt8Array

_PANEL = 256
"""Side of a panel in pixels, at least."""


@dataclass(frozen=True)
class CameraCheckConfig:
    """Options of ``rawdream camera check``."""

    camera: str = "/dev/video0"
    """"/dev/video0", "realsense" (or "realsense:SERIAL"), "twin", a video, a folder of pictures or module:factory."""
    crop: tuple[int, int, int] | None = None
    """Left, top and side in pixels of the square that the policy sees; default: the largest in the middle."""
    starts: str = "pack"
    """Start source of the picture to compare with; default: the starts of the bundled dream."""
    frames: int = 10
    """Frames to read; the last one is shown, and their times give the frame rate."""
    out: Path = Path("camera_check.png")
    """Picture to write."""


def check_camera(config: CameraCheckConfig) -> str:
    """Write the picture; returns a table of brightness and contrast, and the frame rate.

    Raises:
        CameraError: the camera gives no frames. InvalidOptionError: ``crop`` is not inside the picture.
    """
    if config.frames < 2:
        raise InvalidOptionError(f"frames={config.frames} must be at least 2.")
    trained = load_starts(config.starts).sample(NoiseKey(0)).frame
    view = CameraView(trained.shape[0], config.crop)
    camera = open_camera(config.camera)
    times: list[float] = []
    try:
        while len(times) < config.frames:
            frame, taken = camera.read()
            if not times or taken > times[-1]:  # the newest frame may still be the one before
                times.append(taken)
            else:
                time.sleep(0.001)
    finally:
        camera.close()
    seen = view(frame)
    height, width = frame.shape[:2]
    panels = {f"camera, {width}x{height}": frame, f"the policy sees, {view.size} px": seen, "trained on": trained}
    row = pictures.grid([[_panel(picture) for picture in panels.values()]], gap=4)
    config.out.absolute().parent.mkdir(parents=True, exist_ok=True)
    atomic_write_bytes(config.out, encode_picture(pictures.headed(row, list(panels))))
    rows: list[tuple[str, ...]] = [("", "brightness", "contrast", "red", "green", "blue")]
    for name, picture in (("the policy sees", seen), ("trained on", trained)):
        numbers = [picture.mean(), picture.mean(-1).std(), *picture.mean((0, 1))]
        rows.append((name, *(f"{number:.0f}" for number in numbers)))
    rate = (len(times) - 1) / max(times[-1] - times[0], 1e-9)
    square = view.square(height, width)
    return "\n".join(
        [
            *aligned(rows),
            f"frame rate: {rate:.1f} Hz over {len(times)} frames; crop (left, top, side): {square}",
            f"Written to {config.out}. Base, table and gripper should have the same place and size in both pictures.",
        ]
    )


def _panel(picture: UInt8Array) -> UInt8Array:
    """A picture in a square of ``_PANEL`` pixels: small ones with visible pixels, others smooth and with a border."""
    height, width = picture.shape[:2]
    if height == width and _PANEL % height == 0:
        return pictures.upscale(picture, _PANEL // height)
    scale = _PANEL / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    small = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BILINEAR))
    panel = np.full((_PANEL, _PANEL, 3), 255, np.uint8)
    top, left = (_PANEL - small.shape[0]) // 2, (_PANEL - small.shape[1]) // 2
    panel[top : top + small.shape[0], left : left + small.shape[1]] = small
    return panel
