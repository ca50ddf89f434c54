"""Frame sources: time stamps, stale, frozen and lost cameras, crop and resize; the check of the camera."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from rawdream_env import cli
from rawdream_env.errors import CameraError, InvalidOptionError, MissingDependencyError, StaleFrameError
from rawdream_env.media import encode_picture, encode_video, read_picture
from rawdream_env.piper.arm.camera import (
    CameraView,
    DeviceFrames,
    FrameSource,
    NewestFrames,
    RealSenseFrames,
    RecordedFrames,
    TwinFrames,
    Viewed,
    open_camera,
)
from tests.waiting import wait_until


class Camera:
    """Counts up in the picture every 10 ms; ``after`` frames it does ``then``."""

    def __init__(self, after=10**9, then="stop"):
        self.after, self.then = after, then
        self.count, self.closed, self.go_on, self.times = 0, False, threading.Event(), []

    def read(self):
        time.sleep(0.01)
        if self.count >= self.after:
            if self.then == "fail":
                raise CameraError("unplugged.")
            if self.then == "hang":
                self.go_on.wait(60)
        else:
            self.count += 1
        self.times.append(time.monotonic())
        return np.full((4, 6, 3), self.count % 256, np.uint8), self.times[-1]

    def close(self):
        self.closed = True


def test_the_newest_frame_is_returned_at_once_with_its_time():
    camera = Camera(after=5, then="hang")
    newest = NewestFrames(camera, max_age=600.0)
    frame, taken = newest.read()
    assert taken in camera.times and frame[0, 0, 0] >= 1
    wait_until(lambda: newest.read()[0][0, 0, 0] == 5)  # the camera gives no further one
    assert newest.read()[1] == camera.times[4]
    camera.go_on.set()
    newest.close()
    assert camera.closed


@pytest.mark.parametrize(
    ("then", "max_age", "error", "said"),
    [
        ("hang", 0.15, StaleFrameError, "limit is 0.15"),
        ("freeze", 0.15, StaleFrameError, "frozen"),
        ("fail", 600.0, CameraError, "unplugged"),
    ],
)
def test_a_camera_that_hangs_freezes_or_fails_is_noticed(then, max_age, error, said):
    camera = Camera(after=3, then=then)
    newest = NewestFrames(camera, max_age=max_age)
    with pytest.raises(error, match=said):
        wait_until(lambda: newest.read() is None)
    camera.go_on.set()
    newest.close()


def test_a_still_scene_without_noise_may_repeat():
    newest = NewestFrames(Camera(after=1, then="freeze"), max_age=600.0, repeats_are_old=False)
    _, first = newest.read()
    wait_until(lambda: newest.read()[1] > first)
    assert newest.read()[0][0, 0, 0] == 1
    newest.close()


def test_the_view_cuts_a_square_and_resizes():
    frame = np.zeros((48, 64, 3), np.uint8)
    frame[:, 8:56] = 200
    assert CameraView(24)(frame).shape == (24, 24, 3) and CameraView(24)(frame).min() == 200
    corner = CameraView(8, crop=(0, 0, 8))(frame)
    assert corner.shape == (8, 8, 3) and not corner.any()
    viewed = Viewed(Camera(), CameraView(2))
    assert isinstance(viewed, FrameSource) and viewed.read()[0].shape == (2, 2, 3)
    for crop in ((60, 0, 8), (0, -1, 8), (0, 0, 0)):
        with pytest.raises(InvalidOptionError, match="not inside the 64x48"):
            CameraView(8, crop=crop)(frame)
    assert CameraView.of(8, "80,0,480") == CameraView.of(8, [80, 0, 480]) == CameraView(8, crop=(80, 0, 480))
    assert CameraView.of(8, None) == CameraView(8)
    for wrong in ("80,0", "a,b,c", (1, 2)):
        with pytest.raises(InvalidOptionError, match="such as 80,0,480"):
            CameraView.of(8, wrong)


def test_files_and_folders_are_read_in_order_and_end(tmp_path):
    clip = np.repeat(np.array([30, 130, 230], np.uint8), 32 * 32 * 3).reshape(3, 32, 32, 3)
    (tmp_path / "clip.mp4").write_bytes(encode_video([clip], 10.0))
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, frame in enumerate(clip):
        (folder / f"{i:03}.png").write_bytes(encode_picture(frame))
    for path in (tmp_path / "clip.mp4", folder):
        source = open_camera(str(path))
        assert [int(source.read()[0].mean()) // 20 for _ in range(3)] == [1, 6, 11]
        with pytest.raises(CameraError, match="no more frames"):
            source.read()
        source.close()
    (tmp_path / "empty").mkdir()
    with pytest.raises(CameraError, match="no pictures"):
        RecordedFrames(tmp_path / "empty")


def test_devices_are_read_through_ffmpeg():
    device = DeviceFrames("testsrc=size=160x120:rate=30", driver="lavfi")
    first, second = device.read(), device.read()
    assert first[0].shape == (120, 160, 3) and first[0].dtype == np.uint8 and second[1] >= first[1]
    device.close()
    with pytest.raises(CameraError, match="cannot be opened with 640x480"):
        open_camera("/dev/no-camera-here")
    with pytest.raises(CameraError, match="does not exist"):
        open_camera("somewhere.mp4")


def test_a_realsense_camera_is_started_with_its_serial_and_mode(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyrealsense2", None)
    with pytest.raises(MissingDependencyError, match="pyrealsense2"):
        RealSenseFrames()
    calls = []

    class Pipeline:
        def start(self, config):
            calls.append("start")

        def wait_for_frames(self, timeout_ms):
            if calls.count("frame") == 2:
                raise RuntimeError("Frame didn't arrive within 1000")
            calls.append("frame")
            data = np.full((480, 640, 3), 7, np.uint8)
            return SimpleNamespace(get_color_frame=lambda: SimpleNamespace(get_data=lambda: data))

        def stop(self):
            calls.append("stop")

    config = SimpleNamespace(enable_device=calls.append, enable_stream=lambda *mode: calls.append(mode))
    stand_in = SimpleNamespace(
        config=lambda: config,
        pipeline=Pipeline,
        stream=SimpleNamespace(color="color"),
        format=SimpleNamespace(rgb8="rgb8"),
    )
    monkeypatch.setitem(sys.modules, "pyrealsense2", stand_in)
    camera = RealSenseFrames("0123")
    assert calls == ["0123", ("color", 640, 480, "rgb8", 30), "start"]
    assert camera.read()[0].shape == (480, 640, 3) and camera.read()[0].max() == 7
    with pytest.raises(CameraError, match="is gone"):
        camera.read()
    camera.close()
    assert calls[-1] == "stop"


def test_the_check_shows_the_view_beside_a_start(tmp_path, capsys):
    frame = np.full((120, 160, 3), 250, np.uint8)
    frame[:, 20:140] = (10, 200, 30)
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.png").write_bytes(encode_picture(frame))
    out = tmp_path / "new" / "check.png"
    words = ["camera", "check", "--camera", str(folder), "--frames", "3", "--out", str(out)]
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    assert "trained on" in said and "(20, 0, 120)" in said and str(out) in said
    shown = read_picture(Path(out))
    assert shown.shape == (256 + 16, 3 * 256 + 8, 3)
    assert (shown[100:200, 270:500] == (10, 200, 30)).all() and len(np.unique(shown[16:, 520:])) > 20
    assert cli.main([*words, "--crop", "100", "0", "120"]) == 2
    assert "is not inside the 160x120 picture" in capsys.readouterr().err


def test_the_twin_is_a_camera():
    from rawdream_env.errors import RendererError

    try:
        camera = TwinFrames(size=32)
    except RendererError as error:
        pytest.skip(f"no OpenGL here: {error}")
    frame, taken = camera.read()
    assert frame.shape == (32, 32, 3) and frame.std() > 10 and taken <= time.monotonic()
    camera.close()
