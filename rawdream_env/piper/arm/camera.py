"""Frames of the arm's camera, with time stamps, cut and resized to what the world model was trained on.

A frame source is anything with ``read`` and ``close`` (:class:`FrameSource`). Live cameras are read in a thread, so that
``read`` returns the newest frame at once, and raises ``StaleFrameError`` where that is too old to act on.

Shape letters: H W height and width of a picture; all pictures uint8 RGB, channels last.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from rawdream_env.data.images import resize_frames
from rawdream_env.errors import CameraError, InvalidOptionError, MissingDependencyError, RawDreamError, StaleFrameError
from rawdream_env.media import read_picture, read_video
from rawdream_env.resolve import resolve
from rawdream_env.types import UInt8Array

if TYPE_CHECKING:
    from rawdream_env.piper.simulator.twin import PiperTwin

MAX_AGE = 0.25
"""A frame older than this (s) is not acted on: at 10 Hz the arm has had two or three commands since."""
_FIRST_FRAME = 5.0
"""Cameras need this long (s) for the first frame, at most."""
_PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


@runtime_checkable
class FrameSource(Protocol):
    """A camera, or what stands in for one."""

    def read(self) -> tuple[UInt8Array, float]:
        """The newest frame (H, W, 3), and the time when it was taken, by ``time.monotonic`` (s).

        Raises:
            CameraError: there is none.
        """
        ...

    def close(self) -> None:
        """Free the camera. Closing again does nothing."""
        ...


def read_frame(source: FrameSource, shape: tuple[int, ...]) -> tuple[UInt8Array, float]:
    """The newest frame of a source, uint8 of this ``shape``, and its time.

    Raises:
        CameraError: there is none, whatever the source raises or returns instead.
    """
    try:
        picture, at = source.read()
        frame, taken = np.asarray(picture), float(at)
        if not np.isfinite(taken):
            raise ValueError(f"its time is {taken}")
    except (RawDreamError, OSError) as error:
        raise CameraError(f"The camera gives no frame: {error}") from error
    except Exception as error:
        raise CameraError(f"The camera gives no frame ({type(error).__name__}: {error}).") from error
    if frame.shape != shape or frame.dtype != np.uint8:
        raise CameraError(f"The camera gives no frame: it is {frame.dtype} {frame.shape}, not uint8 {shape}.")
    return frame, taken


@dataclass(frozen=True)
class CameraView:
    """The part of a picture that the policy sees.

    ``size``: side of the result in pixels. ``crop``: left, top and side of a square in the picture, in pixels; None: the
    largest square in the middle.
    """

    size: int = 64
    crop: tuple[int, int, int] | None = None

    @classmethod
    def of(cls, size: int, crop: str | Sequence[int] | None) -> CameraView:
        """With ``crop`` also as "LEFT,TOP,SIDE". Raises ``InvalidOptionError`` where it is not three whole numbers."""
        if crop is None:
            return cls(size)
        try:
            left, top, side = map(int, crop.split(",") if isinstance(crop, str) else crop)
        except ValueError as error:
            raise InvalidOptionError(
                f"crop={crop!r} must be left, top and side in pixels, such as 80,0,480."
            ) from error
        return cls(size, (left, top, side))

    def square(self, height: int, width: int) -> tuple[int, int, int]:
        """Left, top and side of the square that is cut from a picture.

        Raises:
            InvalidOptionError: ``crop`` is not inside the picture.
        """
        if self.crop is None:
            side = min(height, width)
            return (width - side) // 2, (height - side) // 2, side
        left, top, side = self.crop
        if side < 1 or left < 0 or top < 0 or left + side > width or top + side > height:
            raise InvalidOptionError(f"crop {self.crop} (left, top, side) is not inside the {width}x{height} picture.")
        return left, top, side

    def __call__(self, frame: UInt8Array) -> UInt8Array:
        """(H, W, 3) -> (size, size, 3)."""
        left, top, side = self.square(*frame.shape[:2])
        resized = resize_frames(frame[None, top : top + side, left : left + side], (self.size, self.size))
        return np.asarray(resized[0], np.uint8)


class Viewed:
    """A source whose frames are cut and resized by ``view``."""

    def __init__(self, source: FrameSource, view: CameraView) -> None:
        self.source, self.view = source, view

    def read(self) -> tuple[UInt8Array, float]:
        """See :class:`FrameSource`."""
        frame, taken = self.source.read()
        return self.view(frame), taken

    def close(self) -> None:
        """Close the source."""
        self.source.close()


class NewestFrames:
    """Reads a live source in a thread and returns the newest frame, which no driver's queue delays.

    Args:
        source: ``read`` waits for the next frame.
        max_age: of a frame (s).
        repeats_are_old: a frame equal to the one before keeps its time, so that a frozen picture becomes stale. Pictures of a
            real camera always differ by their noise.

    Owns: the source and the thread.
    """

    def __init__(self, source: FrameSource, *, max_age: float = MAX_AGE, repeats_are_old: bool = True) -> None:
        self.source, self.max_age, self.repeats_are_old = source, max_age, repeats_are_old
        self._newest: tuple[UInt8Array, float] | None = None
        self._error: Exception | None = None
        self._changed, self._stop = threading.Condition(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="camera", daemon=True)
        self._thread.start()

    def read(self) -> tuple[UInt8Array, float]:
        """See :class:`FrameSource`.

        Raises:
            CameraError: the source has ended or failed. StaleFrameError: the newest frame is older than ``max_age``.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._newest is not None or self._error is not None, timeout=_FIRST_FRAME)
            newest, error = self._newest, self._error
        if error is not None:
            raise CameraError(f"the camera gives no more frames: {error} Check its cable, then start again.") from error
        if newest is None:
            raise StaleFrameError(
                f"the camera gave no frame within {_FIRST_FRAME:.0f} s. Check its cable and its power."
            )
        age = time.monotonic() - newest[1]
        if age > self.max_age:
            raise StaleFrameError(
                f"the newest new picture of the camera is {age:.2f} s old, the limit is {self.max_age:.2f} s. The camera is "
                "frozen, unplugged or too slow: check it, then start again."
            )
        return newest

    def close(self) -> None:
        """Stop the thread, then close the source."""
        self._stop.set()
        self._thread.join(timeout=2.0)
        if not self._thread.is_alive():  # else it is inside the driver, which ends with the process
            self.source.close()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                frame, taken = self.source.read()
            except Exception as error:  # noqa: BLE001 - raised by the next read
                with self._changed:
                    self._error = error
                    self._changed.notify_all()
                return
            with self._changed:
                if self._newest is not None and self.repeats_are_old and np.array_equal(frame, self._newest[0]):
                    continue
                self._newest = frame, taken
                self._changed.notify_all()


class DeviceFrames:
    """A V4L2 device, by FFmpeg; frames are stamped when they arrive.

    Args:
        device: "/dev/video0".
        size: (width, height) and ``fps``: a mode of the camera.
        driver: FFmpeg's input format.

    Raises:
        CameraError: it cannot be opened.
    """

    def __init__(self, device: str, *, size: tuple[int, int] = (640, 480), fps: int = 30, driver: str = "v4l2") -> None:
        import av

        options = {"video_size": f"{size[0]}x{size[1]}", "framerate": str(fps)} if driver == "v4l2" else {}
        try:
            self._container: Any = av.open(device, format=driver, options=options)
        except (av.error.FFmpegError, OSError, ValueError) as error:
            raise CameraError(
                f"camera {device} cannot be opened with {size[0]}x{size[1]} at {fps} Hz ({error}). `v4l2-ctl --list-devices "
                "--list-formats-ext` lists devices and modes; another program may use it."
            ) from error
        self.device, self._failed = device, av.error.FFmpegError
        self._frames: Iterator[Any] = self._container.decode(video=0)

    def read(self) -> tuple[UInt8Array, float]:
        """See :class:`FrameSource`; waits for the next frame."""
        try:
            frame = next(self._frames)
        except (StopIteration, self._failed, OSError) as error:
            raise CameraError(f"camera {self.device} is gone ({str(error) or 'no more frames'}).") from error
        taken = time.monotonic()
        return np.asarray(frame.to_ndarray(format="rgb24"), np.uint8), taken

    def close(self) -> None:
        """Free the device."""
        self._container.close()


class RealSenseFrames:
    """Colour of an Intel RealSense camera (package ``pyrealsense2``); frames are stamped when they arrive.

    Args:
        serial: of the camera; empty: the first one.
        size: (width, height) and ``fps``: a mode of the camera.

    Raises:
        MissingDependencyError: pyrealsense2 is not installed. CameraError: there is no such camera.
    """

    def __init__(self, serial: str = "", *, size: tuple[int, int] = (640, 480), fps: int = 30) -> None:
        try:
            import pyrealsense2 as rs
        except ModuleNotFoundError as error:
            raise MissingDependencyError("a RealSense camera needs pyrealsense2: pip install pyrealsense2.") from error
        config, self._pipeline = rs.config(), rs.pipeline()
        if serial:
            config.enable_device(serial)
        config.enable_stream(rs.stream.color, *size, rs.format.rgb8, fps)
        try:
            self._pipeline.start(config)
        except RuntimeError as error:
            raise CameraError(
                f"RealSense camera {serial or '(first)'} does not start with {size[0]}x{size[1]} at {fps} Hz ({error}). Check "
                "that it is plugged into USB 3 and that no other program uses it."
            ) from error

    def read(self) -> tuple[UInt8Array, float]:
        """See :class:`FrameSource`; waits for the next frame."""
        try:
            color = self._pipeline.wait_for_frames(1000).get_color_frame()
        except RuntimeError as error:
            raise CameraError(f"the RealSense camera is gone ({error}).") from error
        taken = time.monotonic()
        return np.array(color.get_data(), np.uint8), taken

    def close(self) -> None:
        """Stop the camera."""
        self._pipeline.stop()


class RecordedFrames:
    """The frames of a video file, or the pictures of a folder by name, one a ``read``, stamped when they are read.

    Raises:
        CameraError: the folder has no picture. DatasetError: the video cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.is_dir():
            names = sorted(name for name in path.iterdir() if name.suffix.lower() in _PICTURES)
            if not names:
                raise CameraError(f"{path} has no pictures ({', '.join(_PICTURES)}).")
            self._frames: Iterator[UInt8Array] = map(read_picture, names)
        else:
            self._frames = iter(read_video(path)[0])

    def read(self) -> tuple[UInt8Array, float]:
        """See :class:`FrameSource`."""
        frame = next(self._frames, None)
        if frame is None:
            raise CameraError(f"{self.path} has no more frames.")
        return frame, time.monotonic()

    def close(self) -> None:
        """Nothing to free."""


class TwinFrames:
    """The camera of the MuJoCo twin; without one, a twin of its own with a drawn scene."""

    def __init__(self, twin: PiperTwin | None = None, *, size: int = 64) -> None:
        self._owned = twin is None
        if twin is None:
            from rawdream_env.piper.simulator.twin import PiperTwin

            twin = PiperTwin(image_size=size)
            twin.reset(0)
        self.twin = twin

    def read(self) -> tuple[UInt8Array, float]:
        """See :class:`FrameSource`."""
        return self.twin.frame(), time.monotonic()

    def close(self) -> None:
        """Free the twin, if it is this one's own."""
        if self._owned:
            self.twin.close()


def open_camera(spec: str, *, max_age: float = MAX_AGE) -> FrameSource:
    """The frame source that ``spec`` names, whole pictures.

    Args:
        spec: "/dev/video0", "realsense" or "realsense:SERIAL", "twin" (the simulator), a video file, a folder of pictures, or
            "module:factory".
        max_age: of a live camera's frames (s).

    Raises:
        CameraError: there is no such camera, or it does not open.
    """
    kind, _, serial = spec.partition(":")
    if kind == "realsense":
        return NewestFrames(RealSenseFrames(serial), max_age=max_age)
    if spec == "twin":
        return TwinFrames()
    if spec.startswith("/dev/"):
        if sys.platform != "linux":
            raise CameraError(f"camera {spec}: devices are read by V4L2, which only Linux has; use module:factory.")
        return NewestFrames(DeviceFrames(spec), max_age=max_age)
    if Path(spec).exists():
        return RecordedFrames(Path(spec))
    if serial:
        source: FrameSource = resolve(spec, "frame source", FrameSource, bundled=Path())
        return source
    raise CameraError(
        f"camera {spec!r} does not exist; give /dev/video0, realsense, twin, a video, a folder of pictures or module:factory."
    )
