"""The film of an evaluation: large pictures of both worlds, and of the state that the dream imagines."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rawdream_env.evaluation.side_by_side.evaluate import EvaluateConfig, evaluate
from rawdream_env.evaluation.side_by_side.film import chosen_clips, clip_panels, write_film
from rawdream_env.evaluation.side_by_side.records import Clip
from rawdream_env.piper.simulator.view import PiperView
from rawdream_env.robots import Robot
from rawdream_env.types import UInt8Array
from rawdream_env.world_models import load_world_model

CONFIG = EvaluateConfig(
    tasks=("stack_block",), episodes_per_task=1, out=None, judge="state", diagnose=False, max_episode_steps=2, workers=0
)


@pytest.fixture(scope="module")
def clip() -> Clip:
    (clip,) = evaluate(CONFIG, progress=False).clips
    return clip


def shrunk(frames: UInt8Array) -> np.ndarray:
    return frames.reshape(len(frames), 64, 4, 64, 4, 3).mean((2, 4))


def test_every_panel_shows_the_recorded_episode(clip: Clip) -> None:
    view, model = PiperView(256), load_world_model("embedded")
    panels = clip_panels(clip, model, view)
    for panel, frames in zip(panels, (clip.right, clip.right, clip.left), strict=True):
        assert panel.frames.shape == (17, 256, 256, 3)
        # the last frames: an arm or an object elsewhere is worse than the difference between two ways of drawing
        error = np.abs(shrunk(panel.frames) - frames).mean((1, 2, 3))
        assert error[-1] < 0.5 * np.abs(shrunk(panel.frames)[-1] - frames[0]).mean()
    other = replace(clip, record=replace(clip.record, simulator=not clip.record.simulator))
    assert (clip_panels(other, model, view)[2].frames != panels[2].frames).any()  # not the episode of the table
    view.close()


def test_a_robot_without_a_view_is_shown_small(clip: Clip, tmp_path: Path) -> None:
    better = replace(clip, record=replace(clip.record, dream=1), happened=True)
    assert chosen_clips([clip, better], clip.record.policy) == [better]
    path = write_film([clip], tmp_path / "film.gif", None, Robot("plain"))
    assert Image.open(path).size[0] < 3 * 256 and path.stat().st_size > 1000
