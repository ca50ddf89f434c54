"""Video, GIF and pictures, in and out. What is exact is compared as decoded frames."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rawdream_env import media
from rawdream_env.errors import DatasetError


def clip(frames: int, height: int = 32, width: int = 48, seed: int = 0) -> np.ndarray:
    """A red square of five pixels that moves over a grey floor."""
    out = np.full((frames, height, width, 3), 110 + seed, np.uint8)
    for t, frame in enumerate(out):
        frame[10:15, 4 + 2 * t : 9 + 2 * t] = (210, 30, 30)
    return out


def write(path: Path, *clips: np.ndarray, **options: object) -> Path:
    path.write_bytes(media.encode_video(clips, 10.0, **options))  # type: ignore[arg-type]
    return path


def test_films_play_everywhere_and_odd_sides_repeat_the_edge(tmp_path: Path) -> None:
    import imageio.v3 as iio

    path = write(tmp_path / "a.mp4", clip(6, 31, 47))
    frames, fps = media.read_video(path)
    assert iio.immeta(path, plugin="pyav")["video_format"] == "yuv420p"
    assert frames.shape == (6, 32, 48, 3) and fps == 10.0
    assert np.abs(frames[:, 30].astype(int) - frames[:, 31]).max() < 12


def test_full_chroma_keeps_the_colour_of_small_objects(tmp_path: Path) -> None:
    truth = clip(6)
    half, full = (
        media.read_video(write(tmp_path / f"{name}.mp4", truth, pix_fmt=name, crf=8))[0].astype(int)
        for name in ("yuv420p", "yuv444p")
    )
    edge = np.s_[:, 10:15, 4:5]
    assert np.abs(full[0, 10:15, 4:9] - truth[0, 10:15, 4:9]).mean() < 6
    assert np.abs(half[edge] - truth[edge]).mean() > np.abs(full[edge] - truth[edge]).mean()


def test_a_clip_is_read_from_its_own_start(tmp_path: Path) -> None:
    clips = [clip(n, seed=20 * i) for i, n in enumerate((5, 9, 7))]
    path = write(tmp_path / "a.mp4", *clips, pix_fmt="yuv444p", crf=8, gop=4)
    whole = np.stack(list(media.frames_at(path, np.arange(21) / 10, 0.01)))
    assert len(whole) == 21 and np.abs(whole.astype(int) - np.concatenate(clips)).mean() < 3
    later = np.stack(list(media.frames_at(path, np.arange(5, 21) / 10, 0.01)))
    np.testing.assert_array_equal(later, whole[5:])
    np.testing.assert_array_equal(media.read_video(path)[0], whole)


def test_a_gif_has_one_palette_and_its_speed(tmp_path: Path) -> None:
    content = media.encode_gif(list(clip(8)), 30.0)
    with Image.open(io.BytesIO(content)) as gif:
        assert gif.n_frames == 8 and gif.info["duration"] == 30 and gif.info["loop"] == 0
    (tmp_path / "a.gif").write_bytes(content)
    frames, fps = media.read_video(tmp_path / "a.gif")
    assert fps == pytest.approx(100 / 3, rel=0.02)
    assert np.unique(frames[:, 20:], axis=0).shape[0] == 1  # the floor does not flicker


def test_pictures_round_trip(tmp_path: Path) -> None:
    frame = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    (tmp_path / "a.png").write_bytes(media.encode_picture(frame))
    np.testing.assert_array_equal(media.read_picture(tmp_path / "a.png"), frame)
    soft = media.read_picture(io.BytesIO(media.encode_picture(frame, "jpeg", quality=90)))
    assert soft.shape == frame.shape


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "noise.mp4").write_bytes(bytes(range(256)) * 9)
    for read in (media.read_video, lambda path: list(media.frames_at(path, [0.0], 0.01))):
        for name in ("noise.mp4", "missing.mp4"):
            with pytest.raises(DatasetError, match=f"{name}: cannot be read as a video"):
                read(tmp_path / name)


def rotated(path: Path, content: bytes, turn: str) -> Path:
    """An MP4 file whose track says that players turn it: the matrix of its ``tkhd`` box, 16.16 fixed-point."""
    matrices = {"right": (0, 1, 0, -1, 0, 0), "left": (0, -1, 0, 1, 0, 0), "over": (-1, 0, 0, 0, -1, 0)}
    at = content.index(b"tkhd") + 4 + 40
    matrix = b"".join((65536 * n).to_bytes(4, "big", signed=True) for n in matrices[turn])
    path.write_bytes(content[:at] + matrix + content[at + 24 :])
    return path


@pytest.mark.parametrize(("turn", "quarters"), [("right", -1), ("left", 1), ("over", 2)])
def test_a_turned_video_is_read_upright(tmp_path: Path, turn: str, quarters: int) -> None:
    content = media.encode_video([clip(5)], 10.0, pix_fmt="yuv444p", crf=8)
    plain = tmp_path / "plain.mp4"
    plain.write_bytes(content)
    expected = np.rot90(media.read_video(plain)[0], quarters, axes=(1, 2))
    path = rotated(tmp_path / "turned.mp4", content, turn)
    np.testing.assert_array_equal(media.read_video(path)[0], expected)
    np.testing.assert_array_equal(np.stack(list(media.frames_at(path, np.arange(5) / 10, 0.01))), expected)


def test_a_turned_photo_is_read_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn right to view
    Image.fromarray(clip(1)[0]).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(media.read_picture(tmp_path / "a.png"), np.rot90(clip(1)[0], -1))
