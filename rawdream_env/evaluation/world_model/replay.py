"""Replay of recorded episodes in a world model, open loop: the first frame and proprioception, then only actions.

:func:`dream_episodes` is the replay. :func:`action_sensitivity` uses it to test whether actions have an effect.

Shape letters: B episodes, N actions in an episode, K actions in a chunk, P proprio, H W C image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rawdream_env.data.recorded import Recording
from rawdream_env.errors import DatasetError
from rawdream_env.evaluation.reporting.numbers import estimate_text
from rawdream_env.seeding import NoiseKey
from rawdream_env.statistics import bootstrap_ratio
from rawdream_env.types import Float32Array, UInt8Array, WorldModel

Float64Array = NDArray[np.float64]

SOURCES = ("dream", "copy_first", "copy_last")
"""Sources of frames that are compared with the truth: the world model and the :func:`baselines`."""


def background(episodes: Sequence[Recording], samples: int = 200) -> UInt8Array:
    """Median image of a fixed camera over frames spread across the episodes: uint8 (H, W, 3)."""
    episodes = episodes[:: max(1, len(episodes) // samples)]  # bounds the memory of many episodes
    every = max(1, sum(len(e.actions) + 1 for e in episodes) // samples)
    sample = np.concatenate([e.frames[::every].copy() for e in episodes])  # a view would hold all frames
    return np.asarray(np.median(sample, axis=0).astype(np.uint8))


def baselines(truth: UInt8Array, frames: int, chunk_len: int) -> dict[str, UInt8Array]:
    """Baselines that ignore actions, uint8 (F, H, W, 3) each: the start frame of ``truth`` (F+1 or more, start first)
    repeated, and the last true frame before every chunk.
    """
    last = truth[(np.arange(frames) // chunk_len) * chunk_len]
    return {"copy_first": np.broadcast_to(truth[0], last.shape), "copy_last": last}


def dream_episodes(
    world_model: WorldModel,
    episodes: Sequence[Recording],
    *,
    seed: int = 0,
    draw: int = 0,
    batch_size: int = 16,
    change_actions: Callable[[int, Float32Array], Float32Array] | None = None,
    progress: Callable[[int], None] | None = None,
    ended: Callable[[int, Any], None] | None = None,
) -> Iterator[UInt8Array]:
    """Imagine each episode's actions from its first frame; yields (N', H, W, 3) in order, N' = N rounded down to
    chunks.

    Episode i uses noise key ``NoiseKey(seed, episode=i, draw=draw)`` whatever the batch. Shorter episodes leave the
    batch when they end. ``change_actions(i, actions)`` replaces the actions (used for the sensitivity ratio).
    ``progress(n)`` is called after n more chunks, ``ended(i, state)`` with an episode's last state, of one row.
    """
    import torch

    k = world_model.chunk_len
    device = getattr(world_model, "device", "cpu")
    for first in range(0, len(episodes), batch_size):
        batch = episodes[first : first + batch_size]
        actions = [
            e.actions if change_actions is None else change_actions(first + i, e.actions) for i, e in enumerate(batch)
        ]
        chunks = np.array([len(a) // k for a in actions])
        proprio = [e.proprio for e in batch if e.proprio is not None]
        known = torch.from_numpy(np.stack(proprio)).to(device) if len(proprio) == len(batch) else None
        frames = torch.from_numpy(np.stack([e.frames[0] for e in batch])).to(device)
        keys = [NoiseKey(seed, episode=first + i, draw=draw) for i in range(len(batch))]
        imagined: list[list[UInt8Array]] = [[] for _ in batch]
        with torch.inference_mode():
            state = world_model.start(frames, keys, known)
            rows = np.arange(len(batch))
            for c in range(int(chunks.max(initial=0))):
                keep = np.flatnonzero(chunks[rows] > c)
                if len(keep) < len(rows):
                    state, rows = state[torch.from_numpy(keep)], rows[keep]
                part = np.stack([actions[r][c * k : (c + 1) * k] for r in rows]).astype(np.float32)
                state, out = world_model.imagine(state, torch.from_numpy(part).to(device))
                for r, clip in zip(rows, out.cpu().numpy(), strict=True):
                    imagined[r].append(clip)
                if ended is not None:
                    for at in np.flatnonzero(chunks[rows] == c + 1):
                        ended(first + int(rows[at]), state[torch.tensor([at])])
                if progress is not None:
                    progress(len(rows))
        nothing = np.empty((0, *frames.shape[1:]), np.uint8)
        for row, clips in enumerate(imagined):
            imagined[row] = []  # frees the frames of this episode
            yield np.concatenate(clips) if clips else nothing


def action_sensitivity(
    world_model: WorldModel,
    episodes: Sequence[Recording],
    *,
    seed: int = 0,
    batch_size: int = 16,
    recorded: Sequence[UInt8Array] | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """How much the imagined frames depend on the actions, relative to how much they depend on the noise.

    Mean absolute pixel change (0-255) of the imagined frames when the actions are *swapped* with the next episode's and
    when motion is *zeroed* (the gripper command, which is absolute, is kept), divided by the change between noise draws
    0 and 1 under the recorded actions. Well above 1: actions dominate. About 1: noise does. ``ratio`` is None when the
    draws are identical (a deterministic model). Intervals are bootstrapped over episodes. ``recorded``: the replays of the
    recorded actions with draw 0, if they exist already. Needs at least two episodes.

    Returns:
        ``{"noise_change", "n", "swapped": {"change", "interval", "ratio"}, "zeroed": ...}``; ``interval`` is the
        estimate of ``change``.
    """
    if len(episodes) < 2:
        raise DatasetError(
            f"the action-sensitivity ratio swaps actions between episodes: need at least 2, got {len(episodes)}."
        )

    def swapped(i: int, actions: Float32Array) -> Float32Array:
        other = episodes[(i + 1) % len(episodes)].actions
        return np.resize(other, actions.shape) if len(other) < len(actions) else other[: len(actions)]

    def zeroed(_: int, actions: Float32Array) -> Float32Array:
        still = np.zeros_like(actions)
        still[:, -1] = actions[:, -1]
        return still

    def clips(draw: int, change: Callable[[int, Float32Array], Float32Array] | None = None) -> list[UInt8Array]:
        return list(
            dream_episodes(
                world_model,
                episodes,
                seed=seed,
                draw=draw,
                batch_size=batch_size,
                change_actions=change,
                progress=progress,
            )
        )

    reference = clips(0) if recorded is None else recorded

    def change(other: list[UInt8Array]) -> Float64Array:
        return np.array(
            [
                np.abs(a.astype(np.int16) - b.astype(np.int16)).mean()
                for a, b in zip(reference, other, strict=True)
                if len(a)
            ]
        )

    noise = change(clips(1))
    result: dict[str, Any] = {"noise_change": float(noise.mean()), "n": len(noise)}
    for name, function in (("swapped", swapped), ("zeroed", zeroed)):
        changed = change(clips(0, function))
        ratio = bootstrap_ratio(changed, noise, resamples=1000).as_dict() if noise.any() else None
        interval = bootstrap_ratio(changed, resamples=1000).as_dict()
        result[name] = {"change": float(changed.mean()), "interval": interval, "ratio": ratio}
    return result


def action_sensitivity_warning(sensitivity: Mapping[str, Any]) -> str:
    """One sentence when the actions have no clear effect on the frames (see :func:`action_sensitivity`), else ""."""
    kinds = {"swapped": "another episode's actions", "zeroed": "no motion at all"}
    for name, said in kinds.items():
        change, ratio = sensitivity[name]["change"], sensitivity[name]["ratio"]
        if change == 0.0:
            return (
                f"The world model ignores its actions: given {said}, it imagines exactly the same frames "
                f"(n={sensitivity['n']})."
            )
        if ratio is not None and (ratio["value"] if ratio["low"] is None else ratio["low"]) <= 1.0:
            return (
                f"The actions have no clear effect: given {said}, the frames change {ratio['value']:.2f} times as much "
                f"as with fresh noise ({estimate_text(ratio)}), where well above 1 is needed."
            )
    return ""
