"""Camera calibration from points: recovery, noise, what it refuses, the file, and the arm map that uses it."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rawdream_env import cli
from rawdream_env.errors import CalibrationError, InvalidOptionError
from rawdream_env.media import encode_picture
from rawdream_env.piper import geometry as geo
from rawdream_env.piper.arm_map import ArmMap
from rawdream_env.piper.calibration import fit_camera
from rawdream_env.robots import ArmMapConfig, read_camera


def looking(position, target, fovy, center=(0.5, 0.5), roll=0.0):
    """A camera whose rotation vector is found by SciPy."""
    rotation = pytest.importorskip("scipy.spatial.transform").Rotation
    back = np.subtract(position, target) / np.linalg.norm(np.subtract(position, target))
    right = np.cross([0, 0, 1.0], back)
    right /= np.linalg.norm(right)
    axes = np.stack([right, np.cross(back, right), back], 1) @ rotation.from_euler("z", roll).as_matrix()
    return geo.Camera.of_numbers([*position, *rotation.from_matrix(axes).as_rotvec(), fovy, *center]), axes


FRONT = looking((0.75, 0.1, 0.55), (0.28, 0.0, 0.05), 40.0)[0]
SIDE = looking((0.2, -0.7, 0.4), (0.28, 0.0, 0.05), 55.0, (0.55, 0.45), roll=0.1)[0]
UPSIDE_DOWN = looking((-0.3, 0.5, 0.8), (0.25, 0.0, 0.0), 30.0, roll=np.pi)[0]


def grid(heights=(0.0, 0.12)):
    return np.array([[x, y, z] for x in (0.18, 0.28, 0.38) for y in (-0.15, 0.0, 0.15) for z in heights])


def test_axes_of_a_camera_are_those_of_its_rotation_vector():
    for roll in (0.0, 1.0, np.pi):
        camera, axes = looking((0.7, 0.2, 0.6), (0.3, 0.0, 0.0), 40.0, roll=roll)
        np.testing.assert_allclose(camera.axes, axes, atol=1e-12)
    with pytest.raises(InvalidOptionError, match="9 numbers"):
        geo.Camera.of_numbers([0.0] * 8)


def test_the_simulators_camera_projects_as_by_default():
    right = geo.camera_rotation()
    angle = np.arccos((np.trace(right) - 1) / 2)
    skew = np.array([right[2, 1] - right[1, 2], right[0, 2] - right[2, 0], right[1, 0] - right[0, 1]])
    vector = skew / np.linalg.norm(skew) * angle
    camera = geo.Camera.of_numbers([*geo.CAMERA_POSITION, *vector, geo.CAMERA_FOVY, 0.5, 0.5])
    for found, expected in zip(geo.project(grid(), 64, camera), geo.project(grid(), 64), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-9)
    default, pose = ArmMap(), torch.tensor(geo.HOME_POSE, dtype=torch.float32).expand(1, 1, 4, 7)
    same, other = (ArmMap(ArmMapConfig(camera=c.numbers)) for c in (camera, FRONT))
    assert torch.allclose(same.draw(pose, (8, 8)), default.draw(pose, (8, 8)), atol=1e-4)
    assert not torch.allclose(other.draw(pose, (8, 8)), default.draw(pose, (8, 8)), atol=0.1)
    np.testing.assert_allclose(other.project(grid(), 64), geo.project(grid(), 64, FRONT)[0])


@pytest.mark.parametrize("camera", [FRONT, SIDE, UPSIDE_DOWN])
def test_exact_points_give_the_camera_back(camera):
    pixels = geo.project(grid(), 1, camera)[0]
    fit = fit_camera(grid(), pixels, center=camera.center)
    np.testing.assert_allclose(fit.camera.position, camera.position, atol=1e-6)
    np.testing.assert_allclose(fit.camera.axes, camera.axes, atol=1e-6)
    assert fit.camera.fovy == pytest.approx(camera.fovy, abs=1e-4) and fit.rms < 1e-8
    known = geo.focal_length(1, camera)
    flat = fit_camera(grid((0.0,)), geo.project(grid((0.0,)), 1, camera)[0], center=camera.center, focal=known)
    np.testing.assert_allclose(flat.camera.position, camera.position, atol=1e-6)


def test_noise_is_reported_and_the_deviations_cover_the_error():
    """One pixel of noise at 480: over repetitions, position errors are as large as the fit says."""
    ratios, rms = [], []
    for seed in range(12):
        noise = np.random.default_rng(seed).normal(0, 1 / 480, (18, 2))
        fit = fit_camera(grid(), geo.project(grid(), 1, FRONT)[0] + noise)
        rms.append(480 * fit.rms)
        ratios.append((np.array(fit.camera.position) - FRONT.position) / fit.deviations[:3])
    assert 0.9 < np.mean(rms) < 1.7
    assert 0.6 < np.sqrt(np.mean(np.square(ratios))) < 1.6


def test_points_that_do_not_determine_a_camera_are_refused():
    with pytest.raises(CalibrationError, match="5 points"):
        fit_camera(grid()[:5], np.zeros((5, 2)))
    line = np.array([[0.2 + 0.02 * i, 0.0, 0.0] for i in range(8)])
    with pytest.raises(CalibrationError, match="do not determine"):
        fit_camera(line, geo.project(line, 1, FRONT)[0])
    above, flat = looking((0.28001, 0.0, 0.9), (0.28, 0.0, 0.0), 40.0)[0], grid((0.0,))
    for seed, noise in ((0, 0.0), (1, 0.002)):  # far and narrow looks like near and wide
        seen = geo.project(flat, 1, above)[0] + np.random.default_rng(seed).normal(0, noise, (len(flat), 2))
        with pytest.raises(CalibrationError, match="give the field of view"):
            fit_camera(flat, seen)
        assert fit_camera(flat, seen, focal=geo.focal_length(1, above)).rms < 0.005


def write_points(path, camera, crop, rows=()):
    left, top, side = crop
    pixels = geo.project(grid(), side, camera)[0] + [left, top] - 0.5  # as viewers count
    lines = [",".join(f"{x:.6f}" for x in (*uv, *xyz)) for uv, xyz in zip(pixels, grid(), strict=True)]
    path.write_text("\n".join(["u,v,x,y,z", *lines, *rows]) + "\n")


def test_the_command_writes_a_camera_that_the_arm_map_takes(tmp_path, capsys):
    crop, out = (100, 20, 400), tmp_path / "new" / "camera.json"
    camera = replace(FRONT, center=((320 - 100) / 400, (240 - 20) / 400))
    write_points(tmp_path / "points.csv", camera, crop)
    words = [
        "camera",
        "calibrate",
        "--points",
        str(tmp_path / "points.csv"),
        "--crop",
        "100",
        "20",
        "400",
        "--out",
        str(out),
    ]
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    assert "reprojection error of 18 points: rms 0.00 px" in said and "line 19" in said
    np.testing.assert_allclose(read_camera(out), camera.numbers, atol=1e-4)
    assert json.loads(out.read_text())["crop"] == list(crop)
    assert ArmMap(ArmMapConfig(camera=read_camera(out))).camera is not None
    (tmp_path / "empty.json").write_text("{}")
    with pytest.raises(InvalidOptionError, match="no list of numbers"):
        read_camera(tmp_path / "empty.json")
    write_points(tmp_path / "points.csv", camera, crop, ["1,2,3,4"])
    assert cli.main(words) == 2 and "line 20" in capsys.readouterr().err
    (tmp_path / "points.csv").write_text("u,v,x,y\n")
    assert cli.main(words) == 2 and "lacks the column 'z'" in capsys.readouterr().err
    assert cli.main(["camera", "calibrate"]) == 2 and "give --points" in capsys.readouterr().err


def test_april_tags(tmp_path, capsys, monkeypatch):
    corners = grid()[:16].reshape(4, 4, 3)
    pixels = geo.project(corners, 200, FRONT)[0]
    (tmp_path / "picture.png").write_bytes(encode_picture(np.zeros((200, 200, 3), np.uint8)))
    lines = [f"{tag},{k},{','.join(map(str, corners[tag, k]))}" for tag in range(4) for k in range(4)]
    (tmp_path / "tags.csv").write_text("\n".join(["tag,corner,x,y,z", *lines, "99,0,0,0,0"]))
    words = ["camera", "calibrate", "--picture", str(tmp_path / "picture.png"), "--tags", str(tmp_path / "tags.csv")]
    words += ["--out", str(tmp_path / "camera.json")]
    monkeypatch.setitem(sys.modules, "pupil_apriltags", None)
    assert cli.main(words) == 2 and "pip install pupil-apriltags" in capsys.readouterr().err
    found = [SimpleNamespace(tag_id=tag, corners=pixels[tag]) for tag in range(4)]
    detector = SimpleNamespace(detect=lambda gray: found if gray.shape == (200, 200) else [])
    monkeypatch.setitem(sys.modules, "pupil_apriltags", SimpleNamespace(Detector=lambda families: detector))
    assert cli.main(words) == 0 and "tag 3.3" in capsys.readouterr().out
    np.testing.assert_allclose(read_camera(tmp_path / "camera.json"), FRONT.numbers, atol=1e-4)
    found.clear()
    assert cli.main(words) == 2 and "none of the tags [0, 1, 2, 3, 99]" in capsys.readouterr().err
