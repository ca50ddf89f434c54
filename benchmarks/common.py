"""Shared by the benchmarks: interleaved timing, results with their goals, and the models to time.

Timing rules: both sides run in the same process, interleaved (A B, B A, A B, ...), for at least 7 rounds after a warm-up, so
that a slowdown of the machine affects both. The minimum estimates the cost itself, the median what a user observes. Ratios
are reported for both and for each round, which shows their spread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

ROUNDS = 7


@dataclass
class Result:
    """``lines``: printed; ``numbers``: written as JSON; ``passed``: whether the goal is met, None without a goal."""

    name: str
    goal: str
    passed: bool | None
    lines: list[str]
    numbers: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Times:
    """Seconds of every round: wall clock (``seconds``) and processor time of this process (``processor``).

    Processor time sums over threads and is not affected by other programs on a busy machine.
    """

    seconds: np.ndarray
    processor: np.ndarray

    @property
    def best(self) -> float:
        """Minimum over rounds."""
        return float(self.seconds.min())

    @property
    def median(self) -> float:
        """Median over rounds."""
        return float(np.median(self.seconds))

    def as_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "min_s": self.best,
            "median_s": self.median,
            "processor_median_s": float(np.median(self.processor)),
            "rounds": len(self.seconds),
        }


def interleave(sides: Mapping[str, Callable[[], Any]], rounds: int = ROUNDS) -> dict[str, Times]:
    """Time every function once per round, in alternating order, after one untimed call of each."""
    if rounds < ROUNDS:
        raise ValueError(f"{rounds} rounds are too few to tell signal from noise; use at least {ROUNDS}")
    for function in sides.values():
        function()
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for turn in range(rounds):
        for name in list(sides) if turn % 2 == 0 else list(sides)[::-1]:
            wall, processor = time.perf_counter(), time.process_time()
            sides[name]()
            spent[name].append((time.perf_counter() - wall, time.process_time() - processor))
    return {name: Times(*np.array(values).T) for name, values in spent.items()}


def ratio(slow: Times, fast: Times) -> dict[str, float]:
    """Speed-up: of minima, of medians, median and range over the rounds, and of processor time."""
    each = slow.seconds / fast.seconds
    return {
        "min": slow.best / fast.best,
        "median": slow.median / fast.median,
        "median_round": float(np.median(each)),
        "lowest_round": float(each.min()),
        "highest_round": float(each.max()),
        "processor_median": float(np.median(slow.processor) / np.median(fast.processor)),
    }


def twin_starts(twin: Any, count: int) -> list[Any]:
    """Starts of the Piper's tasks in turn, scene seeds 0, 1, ..., on the first ``count`` rows of ``twin``, which is reset."""
    from rawdream_env.piper.relations import TASKS
    from rawdream_env.types import Start

    rows, tasks = range(count), [i % len(TASKS) for i in range(count)]
    frames = twin.reset(rows, list(rows), [TASKS[task].name for task in tasks])
    proprio = twin.proprio(rows)
    return [Start(frames[i], TASKS[task].instruction, task, proprio[i], i) for i, task in enumerate(tasks)]


def milliseconds(times: Times) -> str:
    """Minimum and median as "12.3 / 12.9 ms"."""
    return f"{1e3 * times.best:.2f} / {1e3 * times.median:.2f} ms"


def embedded_models() -> tuple[Any, Any, Any, bool]:
    """(world model, judge, policy, trained): the bundled ones, or the same sizes with random weights if none are bundled.

    Speed does not depend on the weights, success rates do: use random weights only for timings.
    """
    from rawdream_env.errors import CheckpointError

    try:
        from rawdream_env.judges import load_judge
        from rawdream_env.policies import load_policy
        from rawdream_env.world_models import load_world_model

        return load_world_model("embedded-video"), load_judge("embedded"), load_policy("embedded"), True
    except CheckpointError:
        return random_world_model(), random_judge(), random_policy(), False


def random_world_model() -> Any:
    """The embedded configuration with random weights."""
    import torch

    from rawdream_env.world_models.autoencoders import AutoencoderConfig, PackedFrameAutoencoder
    from rawdream_env.world_models.wan.config import WAN_CONFIGS
    from rawdream_env.world_models.wan.rollout import RolloutConfig, WanWorldModel
    from rawdream_env.world_models.wan.transformer import WanWorldModelTransformer

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = WanWorldModelTransformer(WAN_CONFIGS["embedded"])
        for parameter in transformer.parameters():  # heads that start at zero would make every output equal
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.02)
        return WanWorldModel(transformer, PackedFrameAutoencoder(AutoencoderConfig()), RolloutConfig())


def random_judge() -> Any:
    """The embedded judge's size with random weights."""
    from rawdream_env.judges.embedded import EmbeddedJudge
    from rawdream_env.judges.embedded_network import EmbeddedJudgeConfig, JudgeNetwork

    return EmbeddedJudge(JudgeNetwork(EmbeddedJudgeConfig()))


def random_policy() -> Any:
    """The embedded policy's size with random weights."""
    from rawdream_env.policies.tiny_vla import TinyVLA

    return TinyVLA()
