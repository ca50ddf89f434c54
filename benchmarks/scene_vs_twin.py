"""Imagined frames per second of the bundled scene world model and of its MuJoCo twin, 64 environments, on the same cores.

Episodes of 8 chunks from different starts, begun by reading the start picture or by resetting the simulator. Each world is
timed drawing every camera frame (64x64), and drawing only the last frame of a chunk, as a policy sees it. Then episodes with
the policy: rewarded by the imagined state, rewarded by the bundled judge of videos, and in the simulator. The dream is
bfloat16. No goal: the dream's advantage is that it needs no simulator of the task.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import ROUNDS, Result, interleave, ratio, twin_starts

BATCH, CHUNKS = 64, 8


def run(quick: bool = False) -> Result:
    """Ratios of frames per second; ``quick``: 16 environments."""
    import torch

    from rawdream_env.envs.dream import DreamVectorEnv
    from rawdream_env.envs.episodes import run_episodes
    from rawdream_env.envs.imagination import begin_states, imagine
    from rawdream_env.evaluation.reporting.provenance import usable_cores
    from rawdream_env.piper.envs import PiperSimVectorEnv
    from rawdream_env.piper.relations import TASKS
    from rawdream_env.piper.simulator.workers import PiperWorkers
    from rawdream_env.policies import load_policy
    from rawdream_env.seeding import NoiseKey
    from rawdream_env.world_models import load_world_model

    batch = 16 if quick else BATCH
    cores = usable_cores()
    workers = 0 if cores == 1 else cores
    model, policy = load_world_model("embedded", dtype="bfloat16"), load_policy("embedded")
    twin = PiperWorkers(batch, workers, image_size=model.frame_shape[0])
    starts = twin_starts(twin, batch)
    seeds, tasks = list(range(batch)), [TASKS[start.task_id].name for start in starts]
    keys = [NoiseKey(seed) for seed in seeds]
    actions = np.random.default_rng(0).uniform(-0.5, 0.5, (CHUNKS, batch, model.chunk_len, 7)).astype(np.float32)
    options: dict[str, Any] = {"autoreset_mode": "Disabled", "judge_every": "episode"}
    by_state = DreamVectorEnv(batch, world_model=model, judge="state", starts="null", **options)
    by_judge = DreamVectorEnv(batch, world_model=model, judge="embedded", starts="null", **options)
    simulator = PiperSimVectorEnv(batch, num_workers=workers, **options)

    last = np.zeros((batch, model.chunk_len), np.bool_)
    last[:, -1] = True

    def dream(shown: NDArray[np.bool_] | None) -> None:
        state = begin_states(model, starts, keys)
        for chunk in actions:
            state, _, _ = imagine(model, state, chunk, shown)

    def simulate(every_frame: bool) -> None:
        twin.reset(range(batch), seeds, tasks)
        for chunk in actions:
            twin.step(range(batch), chunk, every_frame=every_frame)

    def episodes(env: Any) -> None:
        list(run_episodes(env, starts, policy, temperature=0.7))

    sides = {
        "dream, every frame": lambda: dream(None),
        "dream, last frames": lambda: dream(last),
        "twin, every frame": lambda: simulate(True),
        "twin, last frames": lambda: simulate(False),
        "dream, policy": lambda: episodes(by_state),
        "dream, policy and judge": lambda: episodes(by_judge),
        "twin, policy": lambda: episodes(simulator),
    }
    try:
        times = interleave(sides, ROUNDS)
    finally:
        twin.close()
        for env in (by_state, by_judge, simulator):
            env.close()
    count = batch * CHUNKS * model.chunk_len
    rates = {name: {"best": count / t.best, "median": count / t.median} for name, t in times.items()}
    against = {
        "dream, every frame": "twin, every frame", "dream, last frames": "twin, last frames",
        "dream, policy": "twin, policy", "dream, policy and judge": "twin, policy",
    }  # fmt: skip
    ratios = {name: ratio(times[other], times[name]) for name, other in against.items()}  # sides of as many frames
    lines = [
        f"{name}: {rates[name]['median']:.0f} frames/s, {other}: {rates[other]['median']:.0f} "
        f"({ratios[name]['median_round']:.2f}x)"
        for name, other in against.items()
    ]
    numbers = {"frames_per_s": rates, "ratios": ratios, "batch": batch, "workers": workers,
               "threads": torch.get_num_threads()}  # fmt: skip
    return Result("scene_vs_twin", "report", None, lines, numbers)
