"""Does the instant reflector end episodes when the task is done? Scripted experts in the Piper simulator.

An expert's actions are recorded in the twin together with the truth after every chunk, then executed in the simulator
environment inside the wrapper, which sees only images. *On time*: it stopped in the chunk of the first true success
or at most three later. *False stop*: it stopped while the task was not done, counted over all episodes of a driver.
Noisy experts, which often hold the object at its goal without releasing it, test for false stops. The rewards of an
episode must sum to its last probability.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from benchmarks.common import Result

os.environ.setdefault("MUJOCO_GL", "egl")
CHUNK, CHUNKS, ROWS, LATE = 8, 8, 8, 3
NOISE = {"expert": 0.1, "shaky expert": 0.7}
SETTINGS = ((None, 1), (None, 2), (0.95, 1), (0.95, 2))
"""(threshold, patience); None: the judge's default."""


def run(quick: bool = False) -> Result:
    """100 episodes of each driver (16 when ``quick``)."""
    from rawdream_env.statistics import Rate

    count = 16 if quick else 100
    lines, numbers = [], {}
    for driver, noise in NOISE.items():
        episodes = [_record(seed, noise) for seed in range(count)]
        for threshold, patience in SETTINGS:
            stops, whole = _play(episodes, threshold, patience)
            truth = [np.flatnonzero(episode["truth"]) for episode in episodes]
            pairs = list(zip(stops, truth, strict=True))
            solved = [(stop, int(done[0])) for stop, done in pairs if len(done)]
            on_time = Rate.over(stop is not None and 0 <= stop - first <= LATE for stop, first in solved)
            near = Rate.over(stop is not None and abs(stop - first) <= LATE for stop, first in solved)
            false = Rate.over(stop is not None and stop not in done for stop, done in pairs)
            never = Rate.over(stop is None for stop, _ in solved)
            name = f"{driver}, threshold {threshold or 'own'}, patience {patience}"
            lines.append(
                f"{name}: on time {on_time}; within {LATE} chunks either way {near}; never stopped {never}; "
                f"false stops {false}{'' if whole else '; REWARDS DO NOT SUM UP'}"
            )
            rates = {"on_time": on_time, "near": near, "never": never, "false_stops": false}
            numbers[name] = {key: rate.as_dict() for key, rate in rates.items()}
    return Result("instant_reflector", "reported; no goal of its own", None, lines, numbers)


def _record(index: int, noise: float) -> dict[str, Any]:
    """An expert's episode without images: scene, actions (T, K, 7) and truth (T,)."""
    from rawdream_env.piper.relations import TASKS
    from rawdream_env.piper.simulator.skills import ScriptedExpert
    from rawdream_env.piper.simulator.twin import PiperTwin
    from rawdream_env.seeding import mix

    task, seed = index % len(TASKS), mix(index, 0xEF1EC)
    twin = PiperTwin(render=False)
    twin.reset(seed, task=TASKS[task].name)
    expert = ScriptedExpert(twin, TASKS[task], np.random.default_rng(mix(seed, 1)), noise=noise)
    actions, truth = [], []
    for _ in range(CHUNKS):
        for _ in range(CHUNK):
            actions.append(expert.act())
            twin.step(actions[-1], render=False)
        truth.append(bool(twin.success()))
    twin.close()
    return {"task": task, "seed": seed, "actions": np.stack(actions).reshape(CHUNKS, CHUNK, -1), "truth": truth}


def _play(episodes: list[dict[str, Any]], threshold: float | None, patience: int) -> tuple[list[int | None], bool]:
    """The chunk in which the wrapper ended each episode before the horizon would have, and whether rewards add up."""
    from rawdream_env.piper.envs import PiperSimVectorEnv
    from rawdream_env.piper.relations import TASKS
    from rawdream_env.types import Start
    from rawdream_env.wrappers import InstantReflector

    env = InstantReflector(
        PiperSimVectorEnv(ROWS, judge_every="episode", autoreset_mode="Disabled", return_frames=True),
        "embedded",
        threshold=threshold,
        patience=patience,
    )
    stops: list[int | None] = []
    whole, blank = True, np.zeros((64, 64, 3), np.uint8)
    for begin in range(0, len(episodes), ROWS):
        part = [episodes[min(begin + row, len(episodes) - 1)] for row in range(ROWS)]
        starts = [Start(blank, TASKS[e["task"]].instruction, e["task"], None, e["seed"]) for e in part]
        env.reset(seed=0, options={"starts": starts})
        stopped: list[int | None] = [None] * ROWS
        total, last, over = np.zeros(ROWS), np.zeros(ROWS), np.zeros(ROWS, bool)
        for chunk in range(CHUNKS):
            _, rewards, terminated, truncated, infos = env.step(np.stack([e["actions"][chunk] for e in part]))
            known = infos["_success_probability"]
            total += rewards
            last[known] = infos["success_probability"][known]
            for row in np.flatnonzero(terminated & ~over & infos["is_success"]):
                stopped[row] = chunk
            over = terminated | truncated
            if over.all():
                break
        whole &= bool(np.allclose(total, last))
        stops += stopped[: len(episodes) - begin]
    env.close()
    return stops, whole
