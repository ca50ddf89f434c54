"""The bundled policy on the four tasks through SDK, CAN bus and fake arm, against the twin driven directly; jitter at 10 Hz.

python -m benchmarks.fake_arm --episodes 20 --periods 600
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from rawdream_env.data.reader import LeRobotReader
from rawdream_env.envs.base import ChunkVectorEnv
from rawdream_env.envs.episodes import run_episodes
from rawdream_env.errors import ArmFaultError
from rawdream_env.piper.arm.recording import OUTCOMES_PATH
from rawdream_env.piper.envs import CHUNK_LEN, PiperSimVectorEnv
from rawdream_env.piper.real import PERIOD, PiperRealVectorEnv
from rawdream_env.piper.starts import TASK_NAMES, SimStarts
from rawdream_env.policies import load_policy
from rawdream_env.seeding import NoiseKey
from rawdream_env.statistics import wilson_interval
from rawdream_env.types import Policy, Start

GOAL_MS = 15.0
_MOST_FAULTS = 20
"""A computer that is too busy for real time ends the measurement."""


def outcomes(env: ChunkVectorEnv, starts: Sequence[Start], policy: Policy) -> tuple[NDArray[np.bool_], int]:
    """(N,) whether each greedy episode succeeds, and how many a fault ended."""
    rollouts = list(run_episodes(env, starts, policy, temperature=0.0))
    env.close()
    return np.array([r.reward > 0 for r in rollouts]), sum(not r.valid for r in rollouts)


def compare(policy: Policy, tasks: Sequence[str], episodes: int) -> bool:
    """Print both success rates for every task; whether the intervals overlap everywhere."""
    source, same = SimStarts(), True
    for task in tasks:
        starts = [source.sample(NoiseKey(seed), task) for seed in range(1000, 1000 + episodes)]
        arm, faults = outcomes(PiperRealVectorEnv(fake=True, record=None), starts, policy)
        twin, _ = outcomes(PiperSimVectorEnv(1, autoreset_mode="Disabled"), starts, policy)
        (a, b), (c, d) = (wilson_interval(int(won.sum()), len(won)) for won in (arm, twin))
        same &= a <= d and c <= b
        cells = f"arm {arm.mean():.0%} [{a:.0%}, {b:.0%}], twin {twin.mean():.0%} [{c:.0%}, {d:.0%}]"
        alone = f"the arm alone succeeds in {int((arm & ~twin).sum())}, the twin alone in {int((twin & ~arm).sum())}"
        print(f"{task}: {cells}, n = {len(starts)}; from the same start {alone}; {faults} faults", flush=True)
    source.close()
    return same


def jitter(policy: Policy, periods: int) -> tuple[NDArray[np.float64], int, int]:
    """Times between successive actions of a chunk less 0.1 s, in ms, at least ``periods`` of them: real time, with camera and
    policy. Also the number of episodes, and how many a fault ended.
    """
    late, source, episodes, faults = np.zeros(0), SimStarts(), 0, 0
    with TemporaryDirectory() as folder:
        env = PiperRealVectorEnv(fake=True, realtime=True, record=folder, max_frame_age=0.5)
        while len(late) < periods and faults < _MOST_FAULTS:
            episodes += 1
            try:
                [rollout] = run_episodes(env, [source.sample(NoiseKey(episodes))], policy, temperature=0.0)
                faults += not rollout.valid
            except ArmFaultError as error:  # before the first action
                print(error, flush=True)
                faults += 1
            if (Path(folder) / OUTCOMES_PATH).exists():
                late = recorded_differences(Path(folder))
        env.close()
    source.close()
    return late, episodes, faults


def recorded_differences(folder: Path) -> NDArray[np.float64]:
    """Of recorded episodes: times between successive actions of a chunk less 0.1 s, in ms."""
    late, reader = [], LeRobotReader(folder)
    for index in range(len(reader)):
        sent = reader.episode(index).privileged["time"][:-1, 1].astype(np.float64)
        inside = np.arange(1, len(sent)) % CHUNK_LEN != 0
        late.append((np.diff(sent)[inside] - PERIOD) * 1e3)
    return np.concatenate(late)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run both; returns 1 when the intervals do not overlap or p99 of the jitter misses its goal."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fake_arm", description=__doc__.split("\n")[0])
    parser.add_argument("--episodes", type=int, default=20, help="per task")
    parser.add_argument("--tasks", nargs="+", choices=TASK_NAMES, default=TASK_NAMES)
    parser.add_argument("--periods", type=int, default=600, help="of real time; 0: no measurement")
    options = parser.parse_args(arguments)
    policy = load_policy("embedded")
    same = compare(policy, options.tasks, options.episodes) if options.episodes else True
    if not options.periods:
        return int(not same)
    differences, episodes, faults = jitter(policy, options.periods)
    late = np.abs(differences)
    p50, p99 = np.percentile(late, [50, 99])
    print(
        f"jitter of {len(late)} periods: p50 {p50:.2f} ms, p99 {p99:.2f} ms, max {late.max():.2f} ms "
        f"(goal p99 <= {GOAL_MS} ms); {faults} of {episodes} episodes ended by a fault; "
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    )
    return int(not same or p99 > GOAL_MS)


if __name__ == "__main__":
    sys.exit(main())
