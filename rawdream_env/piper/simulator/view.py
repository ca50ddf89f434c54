"""The Piper's scene drawn for people: episodes of the simulator, and states that a world model imagines."""

from __future__ import annotations

import numpy as np

from rawdream_env.piper.simulator.twin import PiperTwin
from rawdream_env.piper.starts import TASK_NAMES
from rawdream_env.robots import BoolArray, FloatArray
from rawdream_env.types import Start, UInt8Array


class PiperView:
    """``rawdream_env.robots.SceneView`` of the Piper tabletop.

    Raises RendererError when it first draws on a machine without OpenGL.
    """

    def __init__(self, image_size: int = 256, layout: str = "narrow") -> None:
        self._twin = PiperTwin(image_size)
        self._layout = layout

    def simulate(self, start: Start, actions: FloatArray) -> tuple[UInt8Array, BoolArray]:
        """Actions (T, K, 7) -> pictures uint8 (1 + T K, H, W, 3) and success after each chunk (T,)."""
        if start.seed is None:
            raise ValueError("a start without a seed has no scene in the simulator")
        pictures = [self._twin.reset(start.seed, task=TASK_NAMES[start.task_id], layout=self._layout)[None]]
        success = []
        for chunk in actions:
            pictures.append(self._twin.step_chunk(chunk))
            success.append(self._twin.success())
        return np.concatenate(pictures), np.array(success)

    def draw(self, poses: FloatArray, arm: FloatArray) -> UInt8Array:
        """Object poses (F, 7, 7) and arm states (F, 8) -> pictures uint8 (F, H, W, 3)."""
        pictures = []
        for objects, hand in zip(poses, arm, strict=True):
            self._twin.pose_scene(objects, hand)
            pictures.append(self._twin.frame())
        return np.stack(pictures)

    def close(self) -> None:
        """Free the renderer."""
        self._twin.close()
