"""Shared value types, the protocols of world models, judges and policies, and their optional methods.

Shape letters used across the package: B envs, G group, T chunks in an episode, K actions in a chunk, F frames,
H W height and width, C channels, L tokens, D width, A action dimensions.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

    from rawdream_env.seeding import NoiseKey

UInt8Array = NDArray[np.uint8]
Float32Array = NDArray[np.float32]

ACTION_DIM = 7
"""End-effector delta xyz, delta rotation (axis-angle), gripper (-1 open, +1 close)."""


class Outcome(IntEnum):
    """A judge's conclusion. INVALID never becomes a reward."""

    INVALID = -1
    FAILURE = 0
    SUCCESS = 1


@dataclass(frozen=True)
class Video:
    """Frames to be judged: ``frames`` uint8 (F, H, W, 3), the start frame first; ``fps`` in Hz.

    ``state_success``: whether the task is done at the end, by the state behind the pictures: 1, 0, or -1 where there is no
    such state. Only the judge "state" reads it.
    """

    frames: UInt8Array
    fps: float
    state_success: int = -1


@dataclass(frozen=True)
class Verdict:
    """A judge's answer about one video.

    ``reason`` explains it (always set for INVALID); ``probability`` is the success probability in [0, 1] where the judge
    has one; ``votes`` are the individual outcomes where it samples several; ``latency_s`` in seconds. ``held_out``: what a
    hold-out judge, which never rewards, says about the same video; None where there is none.
    """

    outcome: Outcome
    reason: str = ""
    probability: float | None = None
    votes: tuple[Outcome, ...] = ()
    latency_s: float = 0.0
    raw: tuple[str, ...] = ()
    held_out: Outcome | None = None


@dataclass(frozen=True)
class Start:
    """Where an episode begins.

    ``frame`` uint8 (H, W, 3); ``proprio`` float32 (P,) or None: the robot's commanded pose, as its kinematics take it.
    ``seed`` resets the matching simulator to the same scene.
    """

    frame: UInt8Array
    instruction: str
    task_id: int = -1
    proprio: Float32Array | None = None
    seed: int | None = None


@dataclass(frozen=True)
class Trajectory:
    """What ``replay`` needs to imagine an episode again: start, noise key and actions.

    ``actions`` float32 (T, K, A) as executed; ``noise_key`` is the episode's key at chunk 0, draw 0.
    """

    start: Start
    noise_key: NoiseKey
    actions: Float32Array
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PolicyOutput:
    """``actions`` (B, K, A) in environment units; ``tokens`` int64 (B, K*A) in [0, num_bins), or of a continuous policy the
    float32 values it drew; ``logprobs`` fp32 (B, K*A).
    """

    actions: Tensor
    tokens: Tensor
    logprobs: Tensor


@runtime_checkable
class WorldModel(Protocol):
    """Imagines what the camera sees after a chunk of actions.

    Optional: ``device`` (a ``torch.device``, where actions are expected; default the CPU), :class:`SupportsPrepare` and
    :class:`SupportsShownFrames`. A state may have ``finite``, a bool tensor (B,): False where the frames are not finite,
    which makes the episode invalid.
    """

    chunk_len: int
    frame_shape: tuple[int, int, int]
    fps: float

    def start(self, frames: Tensor, keys: Sequence[NoiseKey], proprio: Tensor | None = None) -> Any:
        """Begin B episodes from ``frames`` uint8 (B, H, W, 3). Returns a ``DreamState`` batched along dim 0.

        The state supports ``state[rows]`` and ``type(state).where(mask, a, b)``, and ``len(state)``.
        """
        ...

    def imagine(self, state: Any, actions: Tensor) -> tuple[Any, Tensor]:
        """Advance every row by one chunk: ``actions`` (B, K, A) -> next state, frames uint8 (B, K, H, W, 3)."""
        ...


@runtime_checkable
class Judge(Protocol):
    """Decides whether an instruction is carried out in a video.

    Optional: ``remote`` (bool, default False): the verdicts come from a server, so that calls may wait in
    threads; :class:`SupportsFramesSeen`; and :class:`SupportsClose`.
    """

    def __call__(self, videos: Sequence[Video], instructions: Sequence[str]) -> list[Verdict]:
        """One verdict per video. Never raises for a bad reply or a bad video: INVALID with its reason."""
        ...


@runtime_checkable
class Policy(Protocol):
    """A vision-language-action policy with categorical action tokens.

    Optional: ``logprobs_and_entropy`` (as ``logprobs``, with the entropy (B, K*A) of the same pass),
    :class:`SupportsSave` and :class:`SupportsLook`.
    """

    def act(
        self, images: Any, instructions: Sequence[str], *, temperature: float, keys: Sequence[NoiseKey]
    ) -> PolicyOutput:
        """Sample a chunk per row; ``temperature`` 0 is greedy. ``images`` uint8 (B, H, W, 3), numpy or torch."""
        ...

    def logprobs(self, images: Any, instructions: Sequence[str], tokens: Tensor, *, temperature: float) -> Tensor:
        """Log-probabilities (B, K*A) of given tokens, differentiable."""
        ...


# Optional methods of a part. Environments, trainers and evaluations check for them with ``isinstance``.


@runtime_checkable
class SupportsLook(Protocol):
    """A policy that sees the simulator behind the pictures, such as a scripted expert."""

    def look(self, env: Any, rows: Sequence[int]) -> None:
        """Called before ``act``, whose batch are ``rows`` of the vector environment ``env``, in this order."""
        ...


@runtime_checkable
class SupportsPrepare(Protocol):
    """A world model that prepares for a number of parallel episodes before the first starts."""

    def prepare(self, num_envs: int) -> None:
        """Raise ``NotEnoughMemoryError`` when ``num_envs`` rows do not fit."""
        ...


@runtime_checkable
class SupportsShownFrames(Protocol):
    """A world model that need not compute every frame of a chunk to go on."""

    def imagine_shown(self, state: Any, actions: Tensor, shown: Tensor) -> tuple[Any, Tensor]:
        """As ``WorldModel.imagine``, with only the frames where ``shown``, bool (B, K), is True: uint8 (M, H, W, 3), row by
        row and in the order of time, each as among all. Where the frames are floats, the state has ``finite``, and it tells of
        the frames that are left out too.
        """
        ...


@runtime_checkable
class SupportsFramesSeen(Protocol):
    """A judge that looks at some frames of a video and not at others, which need not be computed for it."""

    def frames_seen(self, total: int, fps: float) -> Collection[int]:
        """Indices of the frames that decide about a video of ``total`` frames at ``fps`` Hz, negative ones from its end. The
        verdict must not depend on any other frame. Empty where only ``Video.state_success`` counts.
        """
        ...


@runtime_checkable
class SupportsState(Protocol):
    """A world model that imagines a state and not only pictures."""

    def success(self, state: Any, instructions: Sequence[str]) -> Any:
        """Whether each row's task is done in its state: int8 (B,), 1, 0, or -1 where the model cannot tell."""
        ...

    def belief(self, state: Any) -> tuple[Any, Any]:
        """Object poses float64 (B, O, 7), xyz and quaternion wxyz, NaN for absent objects, and relations bool (B, R), as a
        simulator records them (``privileged.object_poses``, ``privileged.relations``).
        """
        ...


@runtime_checkable
class SupportsTrace(SupportsState, Protocol):
    """A world model that imagines the state of every frame; states have ``arm`` (B, 8), as in ``robots.Scene.truth``."""

    def trace(self, state: Any, actions: Tensor) -> Sequence[Any]:
        """The states of the K frames of a chunk, without pictures: ``actions`` (B, K, A); the last is ``imagine``'s."""
        ...


@runtime_checkable
class SupportsLift(Protocol):
    """A world model whose state tells whether a task's object has been picked up."""

    def lifted(self, state: Any, instructions: Sequence[str]) -> Any:
        """Whether the object that each row's task moves has been ``robots.LIFT_RISE`` above its start in any frame so far: int8
        (B,), 1, 0, or -1 where the model cannot tell.
        """
        ...


@runtime_checkable
class SupportsClose(Protocol):
    """A judge or start source that holds connections, processes or an OpenGL context."""

    def close(self) -> None:
        """Free them. May be called more than once."""
        ...


@runtime_checkable
class SupportsSave(Protocol):
    """A policy that is written to ``RUN/policy`` at the end of training."""

    def save_pretrained(self, folder: Any) -> None:
        """Write a checkpoint folder that ``load_policy`` reads."""
        ...
