"""A film for people: one episode per task, in the dream and in the simulator, at a size where objects can be seen.

Models see pictures of 64 pixels. A robot with a ``view`` (``robots.SceneView``) is drawn larger: the actions of a clip are
repeated in its simulator, and the state that a world model imagines (``SupportsTrace``) is drawn beside the dream's own
pictures. Where that state leaves the simulator's, the dream is wrong. Without a view the film shows the small pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from rawdream_env.envs.imagination import begin_states
from rawdream_env.evaluation.side_by_side.records import Clip
from rawdream_env.files import atomic_write_bytes
from rawdream_env.robots import Robot, SceneView
from rawdream_env.types import Outcome, SupportsTrace, Trajectory, UInt8Array
from rawdream_env.wrappers.drawing import MIN_PANEL, Panel, compose, encode

_WORDS = {Outcome.SUCCESS: "success", Outcome.FAILURE: "failure", Outcome.INVALID: "invalid"}
_ORDER = ("both succeed", "only the dream succeeds", "only the simulator succeeds", "both fail")
_FPS = 10.0
_PAUSE = 6
"""Frames that an episode's end is held, to read the outcome."""


def chosen_clips(clips: Sequence[Clip], policy: str) -> list[Clip]:
    """One clip per task; prefers clips of ``policy``, then clips where both worlds succeed."""

    def rank(clip: Clip) -> tuple[bool, int]:
        return clip.record.policy != policy, _ORDER.index(clip.kind) if clip.kind in _ORDER else len(_ORDER)

    best: dict[str, Clip] = {}
    for clip in sorted(clips, key=rank):
        best.setdefault(clip.record.task, clip)
    return list(best.values())


def write_film(
    clips: Sequence[Clip], path: Path, model: Any, robot: Robot, *, layout: str = "narrow", every: int = 2
) -> Path:
    """Write a GIF of ``clips`` in turn; every second frame at 10 Hz: twice the real speed.

    Args:
        clips: of one evaluation.
        path: the GIF.
        model: the world model that dreamed them.
        robot: whose ``view`` draws them; without one the film shows the small pictures.
        layout: of the simulator in which they were recorded.
        every: show each ``every``-th frame.
    """
    view: SceneView | None = robot.load("view")(MIN_PANEL, layout) if robot.view else None
    pictures: list[UInt8Array] = []
    for clip in clips:
        shown = [Panel(p.title, p.frames[::every], p.outcome) for p in clip_panels(clip, model, view)]
        film = list(compose(shown, shown[0].outcome, f"{clip.instruction} (policy: {clip.record.policy})"))
        pictures += [*film, *film[-1:] * _PAUSE]
    if view is not None:
        view.close()
    atomic_write_bytes(path, encode(pictures, _FPS, "gif"))
    return path


def clip_panels(clip: Clip, model: Any, view: SceneView | None) -> list[Panel]:
    """The dream, with a view the state that ``model`` imagined, and the simulator."""
    dreamt, happened = _WORDS[Outcome(clip.record.dream)], _WORDS[Outcome(int(clip.happened))]
    if view is None:
        return [Panel("dream", clip.right, dreamt), Panel("simulator", clip.left, happened)]
    panels = [Panel(f"dream, {clip.right.shape[1]} px as models see it", _smooth(clip.right), dreamt)]
    if clip.dreamed is not None and isinstance(model, SupportsTrace):
        panels.append(Panel("the dream's state, drawn", view.draw(*imagined_states(model, clip.dreamed)), dreamt))
    pictures = _smooth(clip.left)
    if clip.dreamed is not None and clip.left_actions is not None:
        record = clip.record
        recorded = record.simulator, record.simulator_end
        if clip.same_actions:
            recorded = bool(record.dreamed_actions), bool(record.dreamed_actions_end)
        again, success = view.simulate(clip.dreamed.start, clip.left_actions)
        if (bool(success.any()), bool(success[-1])) == recorded:  # else it is another episode than the table's
            pictures = again
    return [*panels, Panel("simulator", pictures, happened)]


def imagined_states(model: Any, trajectory: Trajectory) -> tuple[Any, Any]:
    """Object poses (1 + T K, O, 7) and arm states (1 + T K, 8) of a dreamed episode, the start first."""
    states = [begin_states(model, [trajectory.start], [trajectory.noise_key])]
    for chunk in trajectory.actions:
        states += model.trace(states[-1], torch.from_numpy(chunk[None]))
    poses = [model.belief(state)[0] for state in states]
    return np.concatenate(poses), torch.cat([state.arm for state in states]).numpy()


def _smooth(frames: UInt8Array) -> UInt8Array:
    size = (MIN_PANEL, MIN_PANEL)
    return np.stack([np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC)) for frame in frames])
