"""``rawdream camera calibrate``: where the camera stands, from points whose places in the picture and on the table are known.

The pose, and the focal length unless it is given, are fitted to the pixels by least squares (Levenberg and Marquardt), from
many first guesses around the table. The optical axis is assumed to meet the whole picture in its middle, and lens distortion is
not modelled: points should lie where the robot works.

Shape letters: N points.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rawdream_env.errors import CalibrationError, InvalidOptionError, MissingDependencyError
from rawdream_env.files import atomic_write_json, read_text
from rawdream_env.media import read_picture
from rawdream_env.piper import geometry as geo
from rawdream_env.piper.arm.camera import CameraView
from rawdream_env.piper.geometry import Camera, FloatArray

_STEPS = 60
_MIN_POINTS = 6
_MAX_DEVIATION = 0.25
"""Largest relative standard deviation of a focal length that is taken."""


@dataclass(frozen=True)
class CalibrateConfig:
    """Options of ``rawdream camera calibrate``."""

    points: Path | None = None
    """CSV file with the columns u,v,x,y,z: pixel of a point as picture viewers show it (the first pixel is 0), and its place
    in metres (x away from the base, y to the right in the picture, z up from the table)."""
    picture: Path | None = None
    """Picture of AprilTags (family tag36h11; package pupil-apriltags), instead of points."""
    tags: Path | None = None
    """CSV file with the columns tag,corner,x,y,z: number of a tag, corner 0 to 3 counterclockwise from the lower left as
    printed, and its place in metres."""
    image_size: tuple[int, int] = (640, 480)
    """Width and height of the picture that the points are from."""
    crop: tuple[int, int, int] | None = None
    """Left, top and side of the square that the policy sees, as for `rawdream camera check`."""
    fovy: float | None = None
    """Vertical field of view of the whole picture in degrees, where it is known; by default it is fitted."""
    out: Path = Path("camera.json")
    """Camera file to write, for --camera of `rawdream world-model train`."""


@dataclass(frozen=True)
class Fit:
    """A fitted camera. ``errors`` (N,): distance between a pixel and where the camera puts its point, in picture sides.
    ``deviations`` (7,): standard deviations of position (m), rotation (rad) and, relative, focal length (0 if it was given).
    """

    camera: Camera
    errors: FloatArray
    deviations: FloatArray

    @property
    def rms(self) -> float:
        """Root mean square of ``errors``."""
        return float(np.sqrt(np.mean(self.errors**2)))


def fit_camera(
    points: FloatArray, pixels: FloatArray, *, center: tuple[float, float] = (0.5, 0.5), focal: float | None = None
) -> Fit:
    """The camera that sees ``points`` (N, 3) at ``pixels`` (N, 2), both in picture sides from the top left.

    Args:
        points: places in metres.
        pixels: u to the right, v down.
        center: where the optical axis meets the picture.
        focal: focal length in picture sides; None: fitted too.

    Raises:
        CalibrationError: too few points, or points that leave the camera undetermined (all on a line, say).
    """
    if len(points) < _MIN_POINTS:
        raise CalibrationError(
            f"{len(points)} points are given; at least {_MIN_POINTS} are needed, spread over the table."
        )
    best: tuple[float, NDArray[np.float64]] | None = None
    for guess in _guesses(points.mean(0), focal):
        found = _minimize(guess, points, pixels, center, fit_focal=focal is None)
        _, depth = geo.project(points, 1, _camera(found, center))
        cost = float((_residuals(found, points, pixels, center) ** 2).sum())
        if (depth > 0).all() and np.isfinite(cost) and (best is None or cost < best[0]):
            best = cost, found
    if best is None:
        raise CalibrationError("no camera sees these points at these pixels; check the columns and the units (metres).")
    cost, found = best
    free = 7 if focal is None else 6
    jacobian = _jacobian(found, points, pixels, center)[:, :free]
    scale = np.linalg.norm(jacobian, axis=0)
    deviations = np.zeros(7)
    determined = scale.min() > 1e-9 and np.linalg.cond(jacobian / scale) < 1e5
    if determined:
        variance = cost / max(2 * len(points) - free, 1)
        deviations[:free] = np.sqrt(variance * np.diag(np.linalg.inv(jacobian.T @ jacobian)))
    if not determined or deviations[6] > _MAX_DEVIATION:
        raise CalibrationError(
            f"the {len(points)} points do not determine the camera; spread them over the table and give some of them "
            "another height, or give the field of view (--fovy)."
        )
    errors = np.linalg.norm(_residuals(found, points, pixels, center).reshape(-1, 2), axis=1)
    return Fit(_camera(found, center), errors, deviations)


def calibrate(config: CalibrateConfig) -> str:
    """Write the camera file; returns a table of the points with their reprojection errors, and the camera.

    Raises:
        InvalidOptionError: a file is not readable. CalibrationError: the points do not determine a camera.
        MissingDependencyError: no detector for AprilTags is installed.
    """
    if (config.points is None) == (config.picture is None) or (config.picture is None) != (config.tags is None):
        raise InvalidOptionError("give --points FILE, or --picture FILE with --tags FILE.")
    if config.points is not None:
        names, pixels, points = _read_points(config.points)
        width, height = config.image_size
    else:
        assert config.picture is not None and config.tags is not None
        picture = read_picture(config.picture)
        names, pixels, points = _detect(picture, config.tags)
        height, width = picture.shape[:2]
    left, top, side = CameraView(crop=config.crop).square(height, width)
    center = ((width / 2 - left) / side, (height / 2 - top) / side)
    focal = None if config.fovy is None else height / 2 / np.tan(np.deg2rad(config.fovy) / 2) / side
    fit = fit_camera(points, (pixels - [left, top]) / side, center=center, focal=focal)
    camera = fit.camera
    described = {
        "camera": list(camera.numbers),
        "position": list(camera.position),
        "axes": camera.axes.T.tolist(),
        "fovy": camera.fovy,
        "center": list(camera.center),
        "picture": [width, height],
        "crop": [left, top, side],
        "points": len(points),
        "reprojection_error_px": {"rms": fit.rms * side, "max": float(fit.errors.max()) * side},
    }
    config.out.absolute().parent.mkdir(parents=True, exist_ok=True)
    atomic_write_json(config.out, described)
    lines = [f"{name:>12}  {error * side:6.2f} px" for name, error in zip(names, fit.errors, strict=True)]
    return "\n".join([*lines, *_summary(fit, side), f"Written to {config.out}."])


def _summary(fit: Fit, side: int) -> list[str]:
    camera, sigma = fit.camera, fit.deviations
    place = ", ".join(f"{x:.3f} +- {s:.3f}" for x, s in zip(camera.position, sigma[:3], strict=True))
    turned = np.degrees(np.arccos(np.clip((np.trace(camera.axes.T @ geo.camera_rotation()) - 1) / 2, -1, 1)))
    away = np.linalg.norm(np.array(camera.position) - geo.CAMERA_POSITION)
    return [
        f"reprojection error of {len(fit.errors)} points: rms {fit.rms * side:.2f} px, max {fit.errors.max() * side:.2f} px",
        f"position (m): {place}; rotation +- {np.degrees(sigma[3:6].max()):.2f} degrees",
        f"vertical field of view of the policy's picture: {camera.fovy:.2f} degrees, focal length +- {100 * sigma[6]:.1f} %",
        f"the simulator's camera: {100 * away:.1f} cm away, turned by {turned:.1f} degrees, {geo.CAMERA_FOVY:.0f} degrees wide",
    ]


# -- least squares -----------------------------------------------------------------------------------------------------
# Parameters (7,): position, rotation vector, logarithm of the focal length in picture sides.


def _camera(parameters: FloatArray, center: tuple[float, float]) -> Camera:
    fovy = np.degrees(2 * np.arctan(0.5 / np.exp(np.clip(parameters[6], -3.0, 5.0))))
    return Camera.of_numbers([*parameters[:6], fovy, *center])


def _residuals(
    parameters: FloatArray, points: FloatArray, pixels: FloatArray, center: tuple[float, float]
) -> NDArray[np.float64]:
    return np.asarray(geo.project(points, 1, _camera(parameters, center))[0] - pixels, np.float64).ravel()


def _jacobian(
    parameters: FloatArray, points: FloatArray, pixels: FloatArray, center: tuple[float, float]
) -> NDArray[np.float64]:
    columns = []
    for step in 1e-6 * np.eye(7):
        ahead = _residuals(parameters + step, points, pixels, center)
        columns.append((ahead - _residuals(parameters - step, points, pixels, center)) / 2e-6)
    return np.stack(columns, axis=1)


def _minimize(
    parameters: NDArray[np.float64],
    points: FloatArray,
    pixels: FloatArray,
    center: tuple[float, float],
    *,
    fit_focal: bool,
) -> NDArray[np.float64]:
    free = 7 if fit_focal else 6
    residuals, damping = _residuals(parameters, points, pixels, center), 1e-2
    for _ in range(_STEPS):
        jacobian = _jacobian(parameters, points, pixels, center)[:, :free]
        normal = jacobian.T @ jacobian
        move = np.zeros(7)
        damped = normal + damping * np.diag(np.diag(normal)) + 1e-12 * np.eye(free)
        move[:free] = -np.linalg.solve(damped, jacobian.T @ residuals)
        tried = _residuals(parameters + move, points, pixels, center)
        if (tried**2).sum() < (residuals**2).sum():
            parameters, residuals, damping = parameters + move, tried, max(damping / 5, 1e-9)
            if np.abs(move).max() < 1e-9:
                break
        elif (damping := damping * 5) > 1e6:
            break
    return parameters


def _guesses(target: FloatArray, focal: float | None) -> Iterator[NDArray[np.float64]]:
    """Cameras around ``target`` that look at it, upright and upside down; the simulator's first."""
    logarithm = np.log(geo.focal_length(1) if focal is None else focal)
    yield np.array([*geo.CAMERA_POSITION, *_rotation_vector(geo.camera_rotation()), logarithm])
    for azimuth in np.arange(0.0, 2 * np.pi, np.pi / 4):
        for elevation in (0.4, 1.2):
            flat = np.cos(elevation)
            back = np.array([flat * np.cos(azimuth), flat * np.sin(azimuth), np.sin(elevation)])
            right = np.cross([0.0, 0.0, 1.0], back)
            right /= np.linalg.norm(right)
            for sign in (1.0, -1.0):
                axes = np.stack([sign * right, sign * np.cross(back, right), back], axis=1)
                yield np.array([*(target + 0.7 * back), *_rotation_vector(axes), logarithm])


def _rotation_vector(axes: FloatArray) -> FloatArray:
    """The inverse of ``Camera.axes``; at half a turn the axis is that of the largest diagonal element."""
    angle = np.arccos(np.clip((np.trace(axes) - 1) / 2, -1.0, 1.0))
    skew = np.array([axes[2, 1] - axes[1, 2], axes[0, 2] - axes[2, 0], axes[1, 0] - axes[0, 1]])
    if angle < np.pi - 1e-4:
        return np.asarray(skew * (0.5 if angle < 1e-6 else angle / (2 * np.sin(angle))))
    column = (axes + np.eye(3))[:, int(np.argmax(np.diag(axes)))]
    return np.asarray(angle * column / np.linalg.norm(column))


# -- files -------------------------------------------------------------------------------------------------------------


def _rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, list[float]]]:
    """Line number and numbers of every row of a CSV file."""
    reader = csv.DictReader(read_text(path).splitlines())
    if missing := [name for name in columns if name not in (reader.fieldnames or ())]:
        raise InvalidOptionError(f"{path} lacks the column {missing[0]!r}; its first line must be {','.join(columns)}.")
    for row in reader:
        try:
            values = [float(row[name]) for name in columns]
        except (TypeError, ValueError):
            values = [np.nan]
        if not np.isfinite(values).all():
            raise InvalidOptionError(f"{path}, line {reader.line_num}: {','.join(columns)} must be finite numbers.")
        yield reader.line_num, values


def _read_points(path: Path) -> tuple[list[str], FloatArray, FloatArray]:
    """Names, pixels (N, 2) and places (N, 3)."""
    rows = list(_rows(path, ("u", "v", "x", "y", "z")))
    table = np.array([values for _, values in rows]).reshape(-1, 5)
    return [f"line {number}" for number, _ in rows], table[:, :2] + 0.5, table[:, 2:]


def _detect(picture: NDArray[np.uint8], tags: Path) -> tuple[list[str], FloatArray, FloatArray]:
    """As ``_read_points``, for the corners of the tags that are seen and listed."""
    try:
        import pupil_apriltags
    except ModuleNotFoundError as error:
        raise MissingDependencyError("AprilTags need a detector: pip install pupil-apriltags.") from error
    places = {(int(tag), int(corner)): xyz for _, (tag, corner, *xyz) in _rows(tags, ("tag", "corner", "x", "y", "z"))}
    gray = np.ascontiguousarray((picture @ np.array([0.299, 0.587, 0.114])).round().astype(np.uint8))
    found: list[Any] = pupil_apriltags.Detector(families="tag36h11").detect(gray)
    seen = {(tag.tag_id, k): np.asarray(tag.corners)[k] for tag in found for k in range(4)}
    both = [key for key in places if key in seen]
    if not both:
        listed, ids = sorted({tag for tag, _ in places}), sorted({tag for tag, _ in seen})
        raise CalibrationError(f"none of the tags {listed} is seen (found: {ids}); take the picture nearer or sharper.")
    pixels, points = (np.array([table[key] for key in both], np.float64) for table in (seen, places))
    return [f"tag {tag}.{corner}" for tag, corner in both], pixels, points
