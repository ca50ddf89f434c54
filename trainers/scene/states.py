"""Episodes of scene states, read from safetensors shards (``states-*``), and windows drawn from them.

Windows in which something moves, or the gripper is near an object, are drawn more often: most of a scene rests most of the
time, and nothing is learnt from that.

Shape letters: B rows, N objects of a row, T rows of all episodes, U frames of a window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rawdream_env.errors import CheckpointError, DatasetError
from rawdream_env.files import load_safetensors
from rawdream_env.world_models.scene.dynamics import ARM_DIM, SceneFrame
from rawdream_env.world_models.scene.rotations import compose, rotate

_WIDTHS = {"position": 3, "rotation": 4, "velocity": 6}
_MOVES = 3e-4
"""Motion in a frame (m) that counts."""
_NEAR = 0.06
"""Distance from tool to object (m) that counts as near."""
_MOVING_WEIGHT, _NEAR_WEIGHT, _OTHER_WEIGHT = 3.0, 1.0, 0.15
_BATCH_SHARE = {0: 1.4, 1: 1.4, 2: 1.0, 3: 0.6, 4: 0.4}
"""Rows of a batch, relative to two objects, by number of objects: about equal work."""


@dataclass
class _Group:
    """All episodes with N objects."""

    which: Tensor  # (E, N)
    frames: SceneFrame  # of T rows; arm_before is unused
    first: NDArray[np.int64]  # (W,) row of a window's first frame
    episode: NDArray[np.int64]  # (W,)
    begins: NDArray[np.bool_]  # (W,) the window begins with its episode
    weight: NDArray[np.float64]  # (W,) cumulative


@dataclass(frozen=True)
class Window:
    """B windows of U + 1 frames: the objects (B, N), the first frame, and the frames after it, each tensor (B, U, ...)."""

    which: Tensor
    first: SceneFrame
    rest: SceneFrame

    def after(self, u: int) -> SceneFrame:
        """Frame ``u`` of ``rest``."""
        return SceneFrame(*(x[:, u] for x in self.rest))


class SceneStates:
    """Windows of ``length`` frames from the shards in ``folders``.

    Raises:
        DatasetError: there are no shards, one is damaged, or no episode is longer than a window.
    """

    def __init__(self, folders: Sequence[str | Path], length: int) -> None:
        self.length = length
        paths = [path for folder in folders for path in sorted(Path(folder).glob("states-*.safetensors"))]
        if not paths:
            raise DatasetError(f"no states-*.safetensors in {', '.join(map(str, folders))}; collect them first.")
        parts: dict[int, list[dict[str, Tensor]]] = {}
        for path in paths:
            for n, part in _by_count(_read(path)).items():
                parts.setdefault(n, []).append(part)
        self.groups = {n: self._group(list_) for n, list_ in sorted(parts.items())}
        self.groups = {n: group for n, group in self.groups.items() if len(group.first)}
        if not self.groups:
            raise DatasetError(
                f"no episode in {', '.join(map(str, folders))} has more than {length} rows; collect more."
            )
        totals = np.array([group.weight[-1] for group in self.groups.values()])
        self._odds = totals / totals.sum()

    def __len__(self) -> int:
        """Number of control steps."""
        return sum(len(group.frames.arm) - len(group.which) for group in self.groups.values())

    def draw(self, rng: np.random.Generator, rows: int, length: int) -> Window:
        """About ``rows`` windows with one number of objects, of ``length`` frames at most the constructor's."""
        n = list(self.groups)[int(rng.choice(len(self._odds), p=self._odds))]
        group = self.groups[n]
        size = max(1, round(rows * _BATCH_SHARE.get(n, 0.3)))
        drawn = np.searchsorted(group.weight, rng.random(size) * group.weight[-1]).clip(0, len(group.first) - 1)
        first = torch.from_numpy(group.first[drawn])
        before = first - torch.from_numpy(~group.begins[drawn]).long()
        after = first[:, None] + torch.arange(1, length + 1)
        frames = group.frames
        window = Window(
            group.which[torch.from_numpy(group.episode[drawn])],
            SceneFrame(*(x[first] for x in frames))._replace(arm_before=frames.arm[before]),
            SceneFrame(*(x[after] for x in frames)),
        )
        return _mirror(window, torch.from_numpy(rng.random(size) < 0.5))

    def _group(self, parts: list[dict[str, Tensor]]) -> _Group:
        joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        lengths = joined["length"].numpy()
        starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        counts = np.maximum(lengths - self.length, 0)
        episode = np.repeat(np.arange(len(lengths)), counts)
        offset = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        first = starts[episode] + offset
        step = (joined["position"][1:] - joined["position"][:-1]).norm(dim=-1)
        moves = torch.cat([(step > _MOVES).any(-1), torch.zeros(1, dtype=torch.bool)])
        near = ((joined["position"] - joined["arm"][:, None, :3]).norm(dim=-1) < _NEAR).any(-1)
        seen = torch.from_numpy(first[:, None] + np.arange(self.length))
        weight = _MOVING_WEIGHT * moves[seen].any(1) + _NEAR_WEIGHT * near[seen].any(1) + _OTHER_WEIGHT
        frames = SceneFrame(
            joined["position"],
            _matrices(joined["rotation"]),
            joined["velocity"],
            joined["arm"],
            joined["arm"],
            joined["command"],
        )
        return _Group(joined["which"], frames, first, episode, offset == 0, np.cumsum(weight.double().numpy()))


def _read(path: Path) -> dict[str, Tensor]:
    try:
        shard = load_safetensors(path)
    except CheckpointError as error:
        raise DatasetError(str(error)) from error
    names = {*_WIDTHS, "arm", "command", "length", "present"}
    if missing := sorted(names - set(shard)):
        raise DatasetError(f"{path} lacks {', '.join(missing)}; collect it again.")
    rows, (episodes, objects) = int(shard["length"].sum()), shard["present"].shape
    wanted: dict[str, tuple[int, ...]] = {name: (rows, objects, width) for name, width in _WIDTHS.items()}
    wanted |= {"arm": (rows, ARM_DIM), "command": (rows, 7), "length": (episodes,)}
    for name, shape in wanted.items():
        if shard[name].shape != shape:
            raise DatasetError(
                f"{path} has {name} of shape {tuple(shard[name].shape)}, expected {shape}; collect it again."
            )
    return {name: shard[name] for name in names}


def _by_count(shard: dict[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """The episodes of a shard by number of objects; rows keep the objects that are present, ``which`` (E, N)."""
    counts, out = shard["present"].sum(1), {}
    row_episode = torch.repeat_interleave(torch.arange(len(counts)), shard["length"])
    for n in counts.unique().tolist():
        episodes = (counts == n).nonzero()[:, 0]
        which = shard["present"][episodes].nonzero()[:, 1].view(len(episodes), n)
        rows = (counts[row_episode] == n).nonzero()[:, 0]
        objects = which.repeat_interleave(shard["length"][episodes], 0)  # (rows, N)
        part = {"which": which, "length": shard["length"][episodes], "arm": shard["arm"][rows]}
        part["command"] = shard["command"][rows]
        for name, width in _WIDTHS.items():
            part[name] = shard[name][rows].gather(1, objects[..., None].expand(-1, -1, width))
        out[n] = part
    return out


def _matrices(quaternion: Tensor) -> Tensor:
    """Rotation matrices (..., 3, 3) of unit quaternions wxyz (..., 4)."""
    w, x, y, z = quaternion.unbind(-1)
    rows = [
        *(1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        *(2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        *(2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    ]
    matrices: Tensor = torch.stack(rows, -1).unflatten(-1, (3, 3))
    return matrices


def _mirror(window: Window, chosen: Tensor) -> Window:
    """Reflect the ``chosen`` windows at the plane y = 0. Physics and the objects' shapes are the same in a mirror."""

    def reflect(frame: SceneFrame) -> SceneFrame:
        ranks = frame.arm.dim() - 1
        flip = torch.where(chosen, -1.0, 1.0)
        one = torch.ones_like(flip)

        def signs(*values: Tensor, extra: int = 0) -> Tensor:
            stacked = torch.stack(values, -1)
            return stacked.view(len(flip), *[1] * (ranks - 1 + extra), stacked.shape[-1])

        polar, pose = (one, flip, one), (one, flip, one, flip, one, flip)
        arms = []
        for arm in (frame.arm, frame.arm_before):
            swapped = torch.where(chosen.view(-1, *[1] * ranks), arm[..., [0, 1, 2, 3, 4, 5, 7, 6]], arm)
            arms.append(swapped * signs(*pose, one, one))
        diagonal = signs(*polar, extra=1)
        return SceneFrame(
            frame.position * diagonal,
            frame.rotation * diagonal[..., None] * diagonal[..., None, :],
            frame.velocity * signs(*polar, flip, one, flip, extra=1),
            arms[0],
            arms[1],
            frame.command * signs(*pose, one),
        )

    return Window(window.which, reflect(window.first), reflect(window.rest))


def disturb(frame: SceneFrame, scale: float, generator: torch.Generator) -> SceneFrame:
    """A frame with small errors, as a model's own predictions have: up to 0.5 mm and 10 mrad at ``scale`` 1."""
    b, n = frame.position.shape[:2]

    def normal(*shape: int) -> Tensor:
        return torch.randn(b, *shape, generator=generator)

    def share(chance: float, *ones: int) -> Tensor:
        drawn = torch.rand(2, b, generator=generator)
        return ((drawn[0] < chance) * drawn[1] * scale).view(b, *ones)

    objects, arm = share(0.6, 1, 1), share(0.5, 1)
    scales = torch.tensor([1.0] * 3 + [5.0] * 3 + [0.7] * 2)
    return frame._replace(
        position=frame.position + normal(n, 3) * objects * 5e-4,
        rotation=compose(rotate(normal(n, 3) * objects * 0.01), frame.rotation),
        velocity=frame.velocity * (1 + normal(n, 6) * objects * 0.1),
        arm=frame.arm + normal(ARM_DIM) * arm * 3e-4 * scales,
    )
