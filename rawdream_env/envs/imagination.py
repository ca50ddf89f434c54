"""What a dream is made of: checking what a world model returns, and the record of an episode."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rawdream_env.errors import InvalidOptionError, RawDreamError
from rawdream_env.seeding import NoiseKey
from rawdream_env.types import (
    Float32Array,
    Start,
    SupportsLift,
    SupportsState,
    Trajectory,
    UInt8Array,
    Verdict,
    Video,
    WorldModel,
)


@dataclass
class Episode:
    """The record of one imagined episode; ``frames`` uint8 (F, H, W, 3) pieces, the start frame first.

    ``shown``: for every piece, which frames it has of the start or its chunk, bool (1,) or (K,). The others were not computed.
    """

    start: Start
    key: NoiseKey
    frames: list[UInt8Array]
    shown: list[NDArray[np.bool_]]
    actions: list[Float32Array] = field(default_factory=list)
    verdict: Verdict | None = None
    valid: bool = True
    states: list[int] = field(default_factory=list)
    """Whether the task is done after each chunk in the world model's own state: 1, 0, or -1 where it has none."""
    lifted: int = -1
    """Whether the task's object has been picked up in that state: 1, 0, or -1 where it is not known."""

    @classmethod
    def begin(cls, start: Start, key: NoiseKey) -> Episode:
        """The record of an episode that has not moved yet."""
        return cls(start, key, [start.frame[None].copy()], [np.ones(1, np.bool_)])

    @property
    def complete(self) -> bool:
        """Whether every frame was computed."""
        return all(shown.all() for shown in self.shown)

    def video(self, fps: float) -> Video:
        """The episode so far; a frame that was not computed repeats the one before it."""
        frames = np.concatenate(self.frames)
        if not self.complete:
            frames = frames[np.concatenate(self.shown).cumsum() - 1]
        return Video(frames, fps, self.states[-1] if self.states else -1)

    def trajectory(self, action_shape: tuple[int, int]) -> Trajectory:
        """The episode as a trajectory for ``replay``; ``extra`` has ``verdict`` (or None) and ``valid``."""
        actions = np.stack(self.actions) if self.actions else np.zeros((0, *action_shape), dtype=np.float32)
        return Trajectory(self.start, self.key, actions, {"verdict": self.verdict, "valid": self.valid})


@dataclass(frozen=True)
class Replay:
    """A replayed episode: ``frames`` uint8 (1 + T*K, H, W, 3) or None; ``verdict`` None without a judge; ``states`` and
    ``lifted`` as in :class:`Episode`.
    """

    frames: UInt8Array | None
    verdict: Verdict | None
    states: tuple[int, ...] = ()
    lifted: int = -1


def begin_states(model: WorldModel, starts: Sequence[Start], keys: Sequence[NoiseKey]) -> Any:
    """The world model's state for new episodes, batched.

    Raises:
        InvalidOptionError: a start's frame does not fit the model, or only some starts have a proprio.
    """
    shape = tuple(model.frame_shape)
    for index, start in enumerate(starts):
        if start.frame.shape != shape or start.frame.dtype != np.uint8:
            raise InvalidOptionError(
                f"start {index} ({start.instruction!r}) has a frame of shape {start.frame.shape} and dtype "
                f"{start.frame.dtype}; the world model needs uint8 {shape}."
            )
    proprios = [start.proprio for start in starts if start.proprio is not None]
    if proprios and len(proprios) != len(starts):
        raise InvalidOptionError(
            f"{len(proprios)} of {len(starts)} starts have a proprio; give it for all or for none."
        )
    frames = torch.from_numpy(np.stack([start.frame for start in starts]))
    proprio = torch.from_numpy(np.stack(proprios).astype(np.float32)) if proprios else None
    with torch.no_grad():
        return model.start(frames, list(keys), proprio)


def imagine(
    model: WorldModel, state: Any, actions: Float32Array, shown: NDArray[np.bool_] | None = None
) -> tuple[Any, list[UInt8Array], NDArray[np.bool_]]:
    """One chunk: (next state, per row the frames uint8 (K, H, W, 3), finite (n,)). With ``shown``, bool (n, K), a row has
    only the frames where it is True; the model must be one that ``SupportsShownFrames``.

    A row is not finite when the model returns floating frames with NaN or infinity, or when the attribute
    ``finite`` (n,) of the next state is False. Finite floating frames are taken as 0 to 255.
    """
    with torch.no_grad():
        if shown is None:
            name, counts = "imagine", np.full(len(actions), model.chunk_len)
            expected: tuple[int, ...] = (len(actions), model.chunk_len, *model.frame_shape)
            state, frames = model.imagine(state, torch.from_numpy(actions))
        else:
            name, counts = "imagine_shown", shown.sum(1)
            expected = (int(counts.sum()), *model.frame_shape)
            sparing: Any = model
            state, frames = sparing.imagine_shown(state, torch.from_numpy(actions), torch.from_numpy(shown))
    if not isinstance(frames, Tensor) or tuple(frames.shape) != expected:
        got = tuple(frames.shape) if hasattr(frames, "shape") else type(frames).__name__
        raise RawDreamError(f"{type(model).__name__}.{name} returned frames {got}, expected {expected}.")
    frames = frames.detach().reshape(-1, *model.frame_shape)
    row = torch.from_numpy(np.arange(len(actions)).repeat(counts))
    finite = torch.ones(len(actions), dtype=torch.bool)
    flag = getattr(state, "finite", None)
    if isinstance(flag, Tensor):
        finite &= flag.detach().cpu().bool()
    if frames.dtype.is_floating_point:
        finite[row[~torch.isfinite(frames).flatten(1).all(dim=1).cpu()]] = False
        frames = torch.nan_to_num(frames).round().clamp(0, 255)
    host = frames.to(device="cpu", dtype=torch.uint8).numpy()
    return state, [piece.copy() for piece in np.split(host, counts.cumsum()[:-1])], finite.numpy()


def state_success(model: WorldModel, state: Any, starts: Sequence[Start]) -> NDArray[np.int8]:
    """Whether each row's task is done in the model's own state: 1, 0, or -1 where it has none (int8 (n,))."""
    if not isinstance(model, SupportsState):
        return np.full(len(starts), -1, np.int8)
    return np.asarray(model.success(state, [start.instruction for start in starts]), np.int8)


def state_lifted(model: WorldModel, state: Any, starts: Sequence[Start]) -> NDArray[np.int8]:
    """Whether each row's task object has been picked up in the model's own state: 1, 0, or -1 (int8 (n,))."""
    if not isinstance(model, SupportsLift):
        return np.full(len(starts), -1, np.int8)
    return np.asarray(model.lifted(state, [start.instruction for start in starts]), np.int8)


def select(state: Any, rows: Sequence[int] | NDArray[np.intp]) -> Any:
    """``state`` at ``rows``, given as an int64 CPU tensor."""
    return state[torch.as_tensor(np.asarray(rows, dtype=np.int64))]


def scatter(state: Any, size: int, rows: NDArray[np.intp], part: Any) -> Any:
    """``state`` of ``size`` rows with ``rows`` replaced by ``part`` (one entry per row); where ``state`` is None, the other
    rows are fillers.
    """
    source = np.zeros(size, dtype=np.int64)
    source[rows] = np.arange(len(rows))
    mask = np.zeros(size, dtype=np.bool_)
    mask[rows] = True
    filled = select(part, source)
    return filled if state is None else type(state).where(torch.from_numpy(mask), filled, state)


@contextmanager
def on_host(model: WorldModel) -> Iterator[None]:
    """Within the context the weights of ``model`` and of its parts are in host memory, with the same values."""
    parts = [part for part in (model, *vars(model).values()) if isinstance(part, nn.Module)]
    homes = [{tensor.device for tensor in (*part.parameters(), *part.buffers())} for part in parts]
    for part in parts:
        part.to("cpu")
    try:
        yield
    finally:
        for part, home in zip(parts, homes, strict=True):
            for device in home:  # a part is on one device
                part.to(device)
