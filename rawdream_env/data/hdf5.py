"""Demonstrations in HDF5 files, as LIBERO and robomimic keep them.

The layout, of which only what is named here is read::

    data                     attributes: problem_info (JSON, language_instruction), env_args (JSON, env_kwargs.
                             control_freq), macros_image_convention ("opengl" in LIBERO)
    data/demo_<i>            attribute: num_samples T
        actions              (T, 7): end-effector delta, rotation delta, gripper (-1 open, +1 close), in [-1, 1]
        obs/agentview_rgb    (T, H, W, 3) uint8; robomimic: obs/agentview_image
        obs/ee_pos, ee_ori, gripper_states     (T, 3), (T, 3), (T, 2); robomimic: robot0_eef_pos, _quat, gripper_qpos
        states               (T, S) simulator states before each action: time, then joint positions, arm first

Three conventions differ between files, each read off the file and each an option:

- **timing**. LIBERO's own files record the observation *after* the action of the same row, so a picture is seen before
  the action of the next row; files that were rendered again (robomimic, OpenVLA's replays) record it *before*. Which it is
  shows in the arm's joints: they equal the simulator state of the same row (before) or of the next one (after). Either
  way one action of the T has no picture on one side, so an episode has N = T - 1 actions and N + 1 frames.
- **flip**. robosuite renders with the bottom row first ("opengl"). Turning by 180 degrees, as the published LIBERO
  policies (OpenVLA-OFT, LeRobot) see it, sets it upright and mirrors it; "vertical" sets it upright without mirroring.
- **gripper and scale** are this package's: -1 open, +1 close, all actions in [-1, 1]. Nothing is changed.

Shape letters: T rows of a demonstration, N = T - 1 actions of an episode, H W image size, P proprio.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rawdream_env.data.images import resize_frames
from rawdream_env.data.lerobot import EpisodeData
from rawdream_env.errors import DatasetError, MissingDependencyError
from rawdream_env.types import UInt8Array

Flip = Literal["auto", "none", "vertical", "rotate180"]
Timing = Literal["auto", "before", "after"]

DEFAULT_FPS = 20.0
"""Control frequency of LIBERO and robomimic, where a file does not say."""
_STATES = (
    ("ee_pos", "ee_ori", "gripper_states"),
    ("ee_states", "gripper_states"),
    ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos"),
)
_JOINTS = ("joint_states", "robot0_joint_pos")
_ADVICE = "Download the file again, or leave the demonstration out with --skip {}."


@dataclass(frozen=True)
class Demo:
    """One demonstration: its ``path`` and group ``name``, and what is known without reading pictures."""

    path: Path
    name: str
    label: str
    """How messages and ``--skip`` call it: ``file.hdf5:demo_3``."""
    camera: str
    """Full name of the camera's data set below ``obs``."""
    steps: int
    """N, the number of actions of the episode."""
    state_dim: int
    action_dim: int
    task: str
    fps: float


@contextmanager
def open_hdf5(path: Path) -> Iterator[Any]:
    """The open file; whatever goes wrong while it is read is a ``DatasetError`` naming it.

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
        with h5py.File(path, "r") as file:
            yield file
    except (OSError, KeyError, RuntimeError) as error:
        raise DatasetError(
            f"{path} is missing, damaged or no HDF5 file ({type(error).__name__}: {error}). Download it again."
        ) from error


def list_demos(
    path: Path, *, camera: str = "agentview", task: str = "", label: str = "", skip: Sequence[str] = ()
) -> list[Demo]:
    """The demonstrations of a file in the order of their numbers, without those whose label is in ``skip``.

    Args:
        path: the file.
        camera: a data set of ``obs``, with or without the ending ``_rgb`` or ``_image``.
        task: the instruction, for files that hold none; else theirs is used.
        label: what the file is called in messages; by default its name.
        skip: labels (``file.hdf5:demo_3``) to leave out.

    Raises:
        DatasetError: something is missing, of another length or type; the message names file and demonstration.
    """
    label = label or path.name
    with open_hdf5(path) as file:
        if "data" not in file:
            raise DatasetError(f"{path} has no group 'data' but {sorted(file)}: it is no LIBERO or robomimic file.")
        data = file["data"]
        names = sorted((n for n in data if re.fullmatch(r"demo_\d+", n)), key=lambda n: int(n[5:]))
        if not names:
            raise DatasetError(f"{path}: 'data' holds no demo_0, demo_1, ... but {sorted(data)[:5]}.")
        instruction, fps = _instruction(data, path, task), _fps(data)
        wanted = [name for name in names if f"{label}:{name}" not in skip]
        return [_describe(data[n], path, f"{label}:{n}", camera, instruction, fps) for n in wanted]


def _describe(group: Any, path: Path, label: str, camera: str, task: str, fps: float) -> Demo:
    advice = _ADVICE.format(label)
    missing = [key for key in ("actions", "obs") if key not in group]
    if missing:
        raise DatasetError(f"{path}, {group.name}: lacks {missing}; it holds {sorted(group)}. {advice}")
    obs = group["obs"]
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
    return Demo(path, group.name, label, found[0], lengths["actions"] - 1, width, group["actions"].shape[1], task, fps)


def read_demo(demo: Demo, *, image_size: int | None = 256, flip: Flip = "auto", timing: Timing = "auto") -> EpisodeData:
    """Read one demonstration as an episode: frames (N+1, S, S, 3), actions (N, 7), state (N+1, P).

    The state is LIBERO's end-effector position (m), axis-angle (rad) and the two finger positions (m), P = 8, or
    robomimic's position, quaternion and fingers, P = 9. ``image_size=None`` leaves the pictures as they are.

    Raises:
        DatasetError: non-finite numbers, or actions outside [-1, 1]; the message names file and demonstration.
    """
    with open_hdf5(demo.path) as file:
        group = file[demo.name]
        obs = group["obs"]
        parts = next(parts for parts in _STATES if all(part in obs for part in parts))
        actions = np.asarray(group["actions"], dtype=np.float32)
        state = np.concatenate([np.asarray(obs[p], np.float32).reshape(len(actions), -1) for p in parts], axis=1)
        frames = turn(np.asarray(obs[demo.camera]), _flip(file["data"], demo.camera) if flip == "auto" else flip)
        after = (_timing(file["data"], group) if timing == "auto" else timing) == "after"
    for name, values in (("actions", actions), ("the state", state)):
        bad = np.flatnonzero(~np.isfinite(values).all(1))
        if len(bad):
            raise DatasetError(
                f"{demo.path}, {demo.name}: {name} of {len(bad)} of {len(values)} rows are not finite, the first in row "
                f"{bad[0]}. {_ADVICE.format(demo.label)}"
            )
    # A motion that is a little over full speed is rounding; one far over is not a delta action at all.
    if np.abs(actions).max() > 1.001:
        raise DatasetError(
            f"{demo.path}, {demo.name}: actions reach {np.abs(actions).max():.3g}, but delta actions lie in [-1, 1]. "
            "These look like absolute poses: convert the file with delta actions."
        )
    if image_size is not None:
        frames = resize_frames(frames, (image_size, image_size))
    kept = actions[1:] if after else actions[:-1]
    return EpisodeData(np.ascontiguousarray(frames), np.clip(kept, -1, 1), state, demo.task)


def turn(frames: UInt8Array, flip: Flip) -> UInt8Array:
    """Frames (F, H, W, 3) the way ``flip`` says; a view."""
    return {"vertical": frames[:, ::-1], "rotate180": frames[:, ::-1, ::-1]}.get(flip, frames)


def _flip(data: Any, camera: str) -> Flip:
    """What turns a file's pictures upright. Files without the attribute are robosuite's default if LIBERO named them."""
    default = "opengl" if camera.endswith("_rgb") else "opencv"
    return "rotate180" if _text(data.attrs.get("macros_image_convention", default)) == "opengl" else "none"


def _timing(data: Any, group: Any) -> Timing:
    """Whether row t was observed before action t or after it (see the module's text)."""
    joints = next((np.asarray(group["obs"][name]) for name in _JOINTS if name in group["obs"]), None)
    if joints is not None and "states" in group and group["states"].shape[1:] > joints.shape[1:]:
        states = np.asarray(group["states"])[:, 1 : 1 + joints.shape[1]]
        before = float(np.median(np.abs(joints - states).max(1)))
        after = float(np.median(np.abs(joints[:-1] - states[1:]).max(1)))
        if before != after:
            return "after" if after < before else "before"
    return "after" if "macros_image_convention" in data.attrs else "before"


def _instruction(data: Any, path: Path, task: str) -> str:
    words = _json(data, path, "problem_info").get("language_instruction") or ""  # null is no instruction
    try:
        found = "".join(words).strip()  # a string, or in some files a list of letters
    except TypeError as error:
        raise DatasetError(
            f"{path}: language_instruction in problem_info has type {type(words).__name__}, expected text."
        ) from error
    if not found and path.stem.endswith("_demo"):  # LIBERO: KITCHEN_SCENE3_turn_on_the_stove_demo.hdf5
        found = re.sub(r"^[A-Z_]+_SCENE\d+_", "", path.stem.removesuffix("_demo")).replace("_", " ")
    if not (found or task):
        raise DatasetError(f"{path} holds no instruction (problem_info): give one with --task.")
    return found or task


def _fps(data: Any) -> float:
    path = Path(data.file.filename)
    arguments = _json(data, path, "env_args").get("env_kwargs")
    rate = (arguments.get("control_freq") if isinstance(arguments, dict) else None) or DEFAULT_FPS
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < math.inf:
        raise DatasetError(f"{path}: control_freq in env_args is {rate!r}, expected a positive number (Hz).")
    return float(rate)


def _json(data: Any, path: Path, name: str) -> dict[str, Any]:
    try:
        value = json.loads(_text(data.attrs.get(name, "{}")))
    except ValueError as error:
        raise DatasetError(f"{path}: attribute {name} is no JSON ({error}). Download the file again.") from error
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
