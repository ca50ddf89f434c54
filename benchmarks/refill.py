"""Episodes of different lengths on 8 slots: a slot whose episode has ended is given to a waiting one, against stepping
finished episodes until the longest one of the batch has ended.

Lengths have mean/max = 0.6 (4 to 10 chunks; no batch of 8 lacks a longest one). Wan-shaped small model with random
weights and its decoder; every episode must be bit-identical on both sides. Useful frames are those of running episodes;
the ideal gain is 1/0.6 = 1.67.

``imagine`` denoises rows with different numbers of context frames one after the other (an episode's first three chunks
have fewer), so refilled slots lead to smaller batches. This is expensive when a single row leaves the processor idle, as with
the 16 tokens per frame of the bundled model, and cheap otherwise: the full model has 256.
"""

from __future__ import annotations

from typing import Any

from benchmarks.common import ROUNDS, Result, interleave, milliseconds, ratio

GOAL = 1.4
SLOTS = 8
SIZES = {64: 3, 128: 2}
"""Pixels of a frame, and batches of episodes."""
LENGTHS = (10, 6, 4, 5, 7, 4, 6, 6)  # mean 6


class Episodes:
    """N episodes with their own starts, keys, actions and lengths."""

    def __init__(self, model: Any, batches: int) -> None:
        import torch

        from rawdream_env.seeding import NoiseKey

        self.lengths = [n for b in range(batches) for n in LENGTHS[b % SLOTS :] + LENGTHS[: b % SLOTS]]
        generator = torch.Generator().manual_seed(0)
        count = len(self.lengths)
        shape = (count, *model.frame_shape)
        self.frames = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        self.actions = torch.rand(count, max(LENGTHS), model.chunk_len, 7, generator=generator) * 2 - 1
        self.keys = [NoiseKey(i) for i in range(count)]
        self.model, self.steps = model, 0

    def start(self, rows: list[int]) -> Any:
        """States of some episodes at their beginning."""
        return self.model.start(self.frames[rows], [self.keys[i] for i in rows])

    def step(self, state: Any, rows: list[int], chunks: list[int]) -> tuple[Any, Any]:
        """One chunk of some episodes, each at its own."""
        import torch

        self.steps += len(rows)
        chosen = [self.actions[i, c] for i, c in zip(rows, chunks, strict=True)]
        return self.model.imagine(state, torch.stack(chosen))

    def lockstep(self) -> dict[int, Any]:
        """8 at a time, to the end of the longest. Returns the last frames of each episode."""
        last: dict[int, Any] = {}
        for first in range(0, len(self.lengths), SLOTS):
            rows = list(range(first, min(first + SLOTS, len(self.lengths))))
            state = self.start(rows)
            for chunk in range(max(self.lengths[i] for i in rows)):
                state, frames = self.step(state, rows, [chunk] * len(rows))
                last |= {i: frames[k] for k, i in enumerate(rows) if chunk + 1 == self.lengths[i]}
        return last

    def refilled(self) -> dict[int, Any]:
        """8 slots; those that become free are given to waiting episodes at once."""
        from rawdream_env.world_models.wan.dream_state import DreamState

        last: dict[int, Any] = {}
        waiting = list(range(len(self.lengths)))
        rows, chunks, state = [], [], None
        while rows or waiting:
            free = min(SLOTS - len(rows), len(waiting))
            if free:
                joining, waiting = waiting[:free], waiting[free:]
                fresh = self.start(joining)
                state = fresh if state is None or not rows else DreamState.cat([state, fresh])
                rows, chunks = rows + joining, chunks + [0] * free
            state, frames = self.step(state, rows, chunks)
            chunks = [c + 1 for c in chunks]
            last |= {i: frames[k] for k, i in enumerate(rows) if chunks[k] == self.lengths[i]}
            going = [k for k, i in enumerate(rows) if chunks[k] < self.lengths[i]]
            if len(going) < len(rows):
                rows, chunks, state = [rows[k] for k in going], [chunks[k] for k in going], state[going]
        return last


def run(quick: bool = False) -> Result:
    """24 episodes of small frames and 16 of larger ones; ``quick``: small ones alone."""
    import torch

    lines: list[str] = []
    numbers: dict[str, Any] = {"threads": torch.get_num_threads()}
    identical = reached = True
    for size, batches in SIZES.items():
        if quick and size != min(SIZES):
            continue
        tokens = (size // 16) ** 2
        said, found = compare(size, batches)
        lines += [f"{tokens} tokens a frame: {said[0]}", *said[1:]]
        numbers[f"tokens_{tokens}"] = found
        identical &= found["identical"]
        reached = found["ratio"]["median"] >= GOAL  # the last size decides: the full model has 256 tokens per frame
    goal = f">= {GOAL}x useful frames at {(max(SIZES) // 16) ** 2} tokens a frame, bit-identical"
    return Result("refill", goal, None if quick else bool(identical and reached), lines, numbers)


def compare(size: int, batches: int) -> tuple[list[str], dict[str, Any]]:
    """Both methods on frames of ``size`` pixels, 8 episodes per batch; lines and numbers."""
    import numpy as np
    import torch

    from benchmarks.exact_trims import build

    model = build(layers=2, size=size)
    episodes = Episodes(model, batches)
    work, last = {}, {}
    for name, side in (("lockstep", episodes.lockstep), ("refilled", episodes.refilled)):
        episodes.steps = 0
        last[name] = side()
        work[name] = episodes.steps
    identical = all(torch.equal(last["lockstep"][i], last["refilled"][i]) for i in range(len(episodes.lengths)))
    times = interleave({"lockstep": episodes.lockstep, "refilled": episodes.refilled}, ROUNDS)
    gain = ratio(times["lockstep"], times["refilled"])
    useful = sum(episodes.lengths) * model.chunk_len
    numbers = {
        "identical": identical,
        "mean_over_max": float(np.mean(episodes.lengths) / max(episodes.lengths)),
        "rows_imagined": work,
        "ratio": gain,
        "useful_frames_per_s": {name: useful / side.best for name, side in times.items()},
        **{name: side.as_dict() for name, side in times.items()},
    }
    lines = [
        f"{len(episodes.lengths)} episodes, mean/max length {numbers['mean_over_max']:.2f}: {gain['min']:.2f}x min, "
        f"{gain['median']:.2f}x median useful frames (rounds {gain['lowest_round']:.2f} to {gain['highest_round']:.2f}; "
        f"processor time {gain['processor_median']:.2f}x)",
        f"{milliseconds(times['lockstep'])} -> {milliseconds(times['refilled'])}; rows imagined {work['lockstep']} -> "
        f"{work['refilled']} ({work['lockstep'] / work['refilled']:.2f}x); "
        + ("bit-identical" if identical else "NOT IDENTICAL"),
    ]
    return lines, numbers
