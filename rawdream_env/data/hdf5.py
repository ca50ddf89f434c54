"""Demonstrations in HDF5 files, as LIBERO and robomimic keep them.

The part of the layout that is read::

    data                     attributes: problem_info (JSON, language_instruction), env_args (JSON, env_kwargs.
                             control_freq), macros_image_convention ("opengl" in LIBERO)
    data/demo_<i>            attributes: num_samples T; ep_meta (JSON, lang: RoboCasa's instruction of the demonstration)
        actions              (T, 7): end-effector delta, rotation delta, gripper (-1 open, +1 close), in [-1, 1]
        obs/agentview_rgb    (T, H, W, 3) uint8; robomimic: obs/agentview_image
        obs/ee_pos, ee_ori, gripper_states     (T, 3), (T, 3), (T, 2); robomimic: robot0_eef_pos, _quat, gripper_qpos
        states               (T, S) simulator states before each action: time, then the joint positions in any order

Three conventions differ between files. Each is detected, and each has an option:

- **timing**. LIBERO's own files record the observation *after* the action of the same row, so a picture is seen before
  the action of the next row; files that were rendered again (robomimic, OpenVLA's replays) record it *before*. The arm's
  joints show which: they equal the simulator state of the same row (before) or of the next row (after). The convention is
  measured once per file; a file in which the joints match neither needs the option. In both cases one of the T actions
  lacks a picture on one side, so an episode has N = T - 1 actions and N + 1 frames.
- **flip**. robosuite renders with the bottom row first ("opengl"). Rotation by 180 degrees, as the published LIBERO
  policies (OpenVLA-OFT, LeRobot) see it, sets it upright and mirrors it; "vertical" sets it upright without mirroring.
- **gripper and scale** are those of this package: -1 open, +1 close, all actions in [-1, 1]. Nothing is changed.

Shape letters: T rows of a demonstration, N = T - 1 actions of an episode, H W image size, P proprio.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rawdream_env.data import schema
from rawdream_env.data.images import resize_frames
from rawdream_env.data.lerobot import EpisodeData
from rawdream_env.errors import DatasetError, MissingDependencyError, RawDreamError, shorten
from rawdream_env.files import require_regular
from rawdream_env.types import UInt8Array

Flip = Literal["auto", "none", "vertical", "rotate180"]
Recorded = Literal["before", "after"]
Timing = Literal["auto", "before", "after"]

MAX_BYTES = 2**31
"""Largest size of one array of a demonstration."""
DEFAULT_FPS = 20.0
"""Control frequency of LIBERO and robomimic, for files that do not state it."""
_STATES = (
    ("ee_pos", "ee_ori", "gripper_states"),
    ("ee_states", "gripper_states"),
    ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos"),
)
_JOINTS = ("joint_states", "robot0_joint_pos")
_SAME_JOINTS = 2e-3
"""Largest typical difference (rad) at which recorded joints count as those of a simulator state."""
_ADVICE = "Download the file again, or leave the demonstration out with --skip {}."


@dataclass(frozen=True)
class Demo:
    """One demonstration: the ``path`` of its file, its group ``name``, and what is known without reading pictures."""

    path: Path
    name: str
    label: str
    """Its name in messages and in ``--skip``: ``file.hdf5:demo_3``."""
    camera: str
    """Full name of the camera's data set in ``obs``."""
    steps: int
    """N, the number of actions of the episode."""
    state_dim: int
    action_dim: int
    task: str
    fps: float
    timing: Recorded
    """When the file records observations: "before" or "after" the action of the same row."""


_HDF5_ERRORS = (OSError, LookupError, ValueError, ArithmeticError, RuntimeError, TypeError, AttributeError)
"""What h5py and conversions of its values raise for damaged files and unexpected kinds."""


@contextmanager
def open_hdf5(path: Path) -> Iterator[Any]:
    """The open file; any error while it is read becomes a ``DatasetError`` that names the file.

    Raises:
        MissingDependencyError: h5py is not installed.
    """
    try:
        import h5py
    except ImportError as error:
        raise MissingDependencyError(
            "reading HDF5 demonstrations needs h5py, which is not installed: pip install 'rawdream-env[hdf5]'."
        ) from error
    try:
        require_regular(path)
        with h5py.File(path, "r") as file:
            yield file
    except RawDreamError:
        raise
    except _HDF5_ERRORS as error:
        raise DatasetError(
            f"{path} is missing, damaged or no HDF5 file ({type(error).__name__}: {error}). Download it again."
        ) from error


def list_demos(
    path: Path,
    *,
    camera: str = "agentview",
    task: str = "",
    label: str = "",
    skip: Sequence[str] = (),
    timing: Timing = "auto",
) -> list[Demo]:
    """The demonstrations of a file in the order of their numbers, without those whose label is in ``skip``.

    Args:
        path: the file.
        camera: a data set of ``obs``, with or without the ending ``_rgb`` or ``_image``.
        task: the instruction of demonstrations that hold none.
        label: name of the file in messages; by default its file name.
        skip: labels (``file.hdf5:demo_3``) to leave out.
        timing: "auto" measures the file's convention.

    Raises:
        DatasetError: something is missing or has another length or type, or the timing cannot be measured. The message
            names the file and the demonstration.
    """
    label = label or path.name
    with open_hdf5(path) as file:
        if "data" not in file:
            raise DatasetError(f"{path} has no group 'data' but {sorted(file)}: it is no LIBERO or robomimic file.")
        data = _group(file, "data")
        names = sorted((n for n in data if re.fullmatch(r"demo_\d+", n)), key=lambda n: int(n[5:]))
        if not names:
            raise DatasetError(f"{path}: 'data' holds no demo_0, demo_1, ... but {sorted(data)[:5]}.")
        fps = _fps(data)
        groups = {f"{label}:{name}": _group(data, name) for name in names if f"{label}:{name}" not in skip}
        tasks = {name: _instruction(data, group, path, task) for name, group in groups.items()}
        demos = [
            _describe(group, path, name, camera, tasks[name], fps, "before" if timing == "auto" else timing)
            for name, group in groups.items()
        ]
        if timing == "auto" and demos:
            found = _measure_timing(path, groups)
            demos = [replace(demo, timing=found) for demo in demos]
        return demos


def _describe(group: Any, path: Path, label: str, camera: str, task: str, fps: float, timing: Recorded) -> Demo:
    advice = _ADVICE.format(label)
    missing = [key for key in ("actions", "obs") if key not in group]
    if missing:
        raise DatasetError(f"{path}, {group.name}: lacks {missing}; it holds {sorted(group)}. {advice}")
    obs = _group(group, "obs")
    found = [name for name in (camera, f"{camera}_rgb", f"{camera}_image") if name in obs]
    pictures = sorted(name for name in obs if obs[name].ndim == 4)
    if not found:
        raise DatasetError(f"{path}, {group.name}: no camera {camera!r}; it has {pictures}. Choose one with --camera.")
    images = obs[found[0]]
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
        raise DatasetError(
            f"{path}, {group.name}: obs/{found[0]} is {images.dtype} {images.shape}, not uint8 (T, H, W, 3); cameras "
            f"are {pictures}. Choose one with --camera."
        )
    parts = next((parts for parts in _STATES if all(part in obs for part in parts)), None)
    if parts is None:
        raise DatasetError(
            f"{path}, {group.name}: no end-effector pose; obs holds {sorted(obs)}, needed is one of "
            f"{[list(parts) for parts in _STATES]}. Render the file with proprioception."
        )
    lengths = {"actions": len(group["actions"])} | {f"obs/{k}": len(obs[k]) for k in (found[0], *parts)}
    if "num_samples" in group.attrs:
        lengths["num_samples"] = int(group.attrs["num_samples"])
    if len(set(lengths.values())) > 1 or min(lengths.values()) < 2:
        raise DatasetError(
            f"{path}, {group.name}: lengths {lengths}; they have to be equal and at least 2. The file is incomplete. "
            + advice
        )
    if group["actions"].ndim != 2:
        raise DatasetError(f"{path}, {group.name}: actions are {group['actions'].shape}, not (T, A). {advice}")
    width = sum(int(np.prod(obs[part].shape[1:])) for part in parts)
    steps, action_dim = lengths["actions"] - 1, group["actions"].shape[1]
    return Demo(path, group.name, label, found[0], steps, width, action_dim, task, fps, timing)


def read_demo(demo: Demo, *, image_size: int | None = 256, flip: Flip = "auto", timing: Timing = "auto") -> EpisodeData:
    """Read one demonstration as an episode: frames (N+1, S, S, 3), actions (N, 7), state (N+1, P).

    The state is LIBERO's end-effector position (m), axis-angle (rad) and the two finger positions (m), P = 8, or
    robomimic's position, quaternion and fingers, P = 9. ``image_size=None`` keeps the stored size. ``timing="auto"`` uses
    the convention that ``list_demos`` found.

    Raises:
        DatasetError: non-finite numbers, or actions outside [-1, 1]; the message names file and demonstration.
    """
    with open_hdf5(demo.path) as file:
        group = file[demo.name]
        obs = group["obs"]
        parts = next(parts for parts in _STATES if all(part in obs for part in parts))
        actions = _values(group, "actions", np.float32)
        state = np.concatenate([_values(obs, p, np.float32).reshape(len(actions), -1) for p in parts], axis=1)
        frames = turn(_values(obs, demo.camera, np.uint8), _flip(file["data"], demo.camera) if flip == "auto" else flip)
        after = (demo.timing if timing == "auto" else timing) == "after"
    for name, values in (("actions", actions), ("the state", state)):
        bad = np.flatnonzero(~np.isfinite(values).all(1))
        if len(bad):
            raise DatasetError(
                f"{demo.path}, {demo.name}: {name} of {len(bad)} of {len(values)} rows are not finite, the first in row "
                f"{bad[0]}. {_ADVICE.format(demo.label)}"
            )
    schema.check_range(actions, f"{demo.path}, {demo.name}")
    if image_size is not None:
        frames = resize_frames(frames, (image_size, image_size))
    kept = actions[1:] if after else actions[:-1]
    return EpisodeData(np.ascontiguousarray(frames), np.clip(kept, -1, 1), state, demo.task)


def _group(parent: Any, name: str) -> Any:
    """A group of a group, without links to other files."""
    group = _own(parent, name)
    if not hasattr(group, "keys"):
        raise DatasetError(f"{parent.file.filename}: {parent.name}/{name} is {shorten(group)}, expected a group.")
    for member in group:
        _own(group, member)
    return group


def _own(group: Any, name: str) -> Any:
    """A member of a group, which is not a link to another file."""
    link = group.get(name, getlink=True)
    if hasattr(link, "filename"):
        raise DatasetError(
            f"{group.file.filename}: {group.name}/{name} is a link to {link.filename}. Copy it into this file (h5repack)."
        )
    return group[name]


def _values(group: Any, name: str, dtype: Any) -> NDArray[Any]:
    """A data set as an array. Refuses values in other files, and sizes that no demonstration has."""
    data = _own(group, name)
    where = f"{group.file.filename}, {group.name}/{name}"
    if data.file != group.file or data.external or data.is_virtual:
        raise DatasetError(f"{where}: its values are in another file. Copy them into this one (h5repack).")
    if data.size * max(data.dtype.itemsize, np.dtype(dtype).itemsize) > MAX_BYTES:
        raise DatasetError(
            f"{where}: shape {data.shape} of {data.dtype} needs more than {MAX_BYTES >> 20} MiB. Cut the demonstration "
            "into shorter ones."
        )
    return np.asarray(data[()], dtype)


def turn(frames: UInt8Array, flip: Flip) -> UInt8Array:
    """Frames (F, H, W, 3) turned as ``flip`` says; a view."""
    return {"vertical": frames[:, ::-1], "rotate180": frames[:, ::-1, ::-1]}.get(flip, frames)


def _flip(data: Any, camera: str) -> Flip:
    """The turn that sets a file's pictures upright. Without the attribute, pictures with LIBERO's names are "opengl"."""
    default = "opengl" if camera.endswith("_rgb") else "opencv"
    return "rotate180" if _text(data.attrs.get("macros_image_convention", default)) == "opengl" else "none"


def _measure_timing(path: Path, groups: Mapping[str, Any]) -> Recorded:
    """The one convention of a file, from every demonstration whose joints show it."""
    found = {label: timing for label, group in groups.items() if (timing := _timing(group))}
    if len(set(found.values())) == 1:
        return next(iter(found.values()))
    advice = "Set --timing before (pictures taken before the action of their row) or --timing after."
    if not found:
        raise DatasetError(
            f"{path}: in none of {len(groups)} demonstrations do the recorded joints ({' or '.join(_JOINTS)}) match the "
            f"simulator states of one row and differ from those of the next. {advice}"
        )
    examples = {timing: label for label, timing in found.items()}
    raise DatasetError(
        f"{path}: {examples['before']} records before the action of its row and {examples['after']} after it; a file has "
        f"one convention. {advice}"
    )


def _timing(group: Any) -> Recorded | None:
    """Whether a demonstration's rows are observed before or after their action; None where the joints do not tell.

    A robot with a mobile base has the joints of its base in front of those of the arm, so the arm's are searched for.
    """
    joints = next((_values(group["obs"], name, np.float64) for name in _JOINTS if name in group["obs"]), None)
    if joints is None or joints.ndim != 2 or "states" not in group or group["states"].ndim != 2:
        return None
    states = _values(group, "states", np.float64)
    if len(states) != len(joints):
        return None
    width = joints.shape[1]
    best = np.inf, np.inf
    for first in range(1, states.shape[1] - width + 1):
        arm = states[:, first : first + width]
        before = float(np.median(np.abs(joints - arm).max(1)))
        after = float(np.median(np.abs(joints[:-1] - arm[1:]).max(1)))
        best = min(best, (before, after), key=min)
    before, after = best
    if min(best) > _SAME_JOINTS or max(best) < 5 * min(best) or before == after:
        return None
    return "after" if after < before else "before"


def _instruction(data: Any, group: Any, path: Path, task: str) -> str:
    """The instruction of a demonstration: its own, its file's, the one in the file name, or ``task``."""
    found = _json(group, path, "ep_meta").get("lang") or _json(data, path, "problem_info").get("language_instruction")
    if not isinstance(found or "", str | list):
        raise DatasetError(
            f"{path}: language_instruction in problem_info has type {type(found).__name__}, expected text."
        )
    found = "".join(map(str, found or "")).strip()  # a string, or in some files a list of letters
    if not found and path.stem.endswith("_demo"):  # LIBERO: KITCHEN_SCENE3_turn_on_the_stove_demo.hdf5
        found = re.sub(r"^[A-Z_]+_SCENE\d+_", "", path.stem.removesuffix("_demo")).replace("_", " ")
    if not (found or task):
        raise DatasetError(f"{path} holds no instruction (ep_meta or problem_info): set one with --task.")
    found.encode()  # lone surrogates are a ValueError here, which open_hdf5 names
    return found or task


def _fps(data: Any) -> float:
    path = Path(data.file.filename)
    arguments = _json(data, path, "env_args").get("env_kwargs")
    rate = (arguments.get("control_freq") if isinstance(arguments, dict) else None) or DEFAULT_FPS
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate <= schema.MAX_FPS:
        raise DatasetError(
            f"{path}: control_freq in env_args is {shorten(rate)}, expected a positive number (Hz) up to {schema.MAX_FPS}."
        )
    return float(rate)


def _json(group: Any, path: Path, name: str) -> dict[str, Any]:
    """The JSON object in an attribute; empty where there is none."""
    try:
        value = json.loads(_text(group.attrs.get(name, "{}")))
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{path}: attribute {name} is no JSON ({error}). Download the file again.") from error
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
