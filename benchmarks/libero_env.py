"""LIBERO: control steps per second for 1 and 2 worker processes, and the cost of our layer over hf-libero's own environment.

One row in this process carries out the same chunks as hf-libero's environment, which draws a 256 px frame at every control
step; so does ours with ``return_frames``. Without it only the last frame of a chunk is drawn. A round is one chunk of 8
control steps of each side. Needs hf-libero and its assets.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.common import ROUNDS, Result, interleave, ratio

GOAL = "our layer costs at most 5 % over hf-libero (median of processor time)"
LIMIT = 1.05
SUITE, TASK, SIDE, CHUNK = "libero_goal", 0, 256, 8
CHUNKS = 60
"""Rounds; the wall clock of a chunk varies by a quarter on a shared core."""


def bare_environment() -> Any:
    """hf-libero's own environment, at the task's first initial state."""
    from rawdream_env.libero.init_states import load_init_states
    from rawdream_env.libero.install import import_simulator, tasks_of

    task = tasks_of(SUITE)[TASK]
    env = import_simulator().OffScreenRenderEnv(
        bddl_file_name=str(task.bddl), camera_names=["agentview"], camera_heights=SIDE, camera_widths=SIDE
    )
    env.seed(0)
    env.reset()
    env.sim._render_context_offscreen.gl_ctx.make_current()
    env.set_init_state(load_init_states(SUITE, task)[0])
    return env


def make(num_envs: int, workers: int, frames: bool) -> Any:
    """Our environment, reset; its episodes outlast the benchmark."""
    from rawdream_env.libero.envs import LiberoSimVectorEnv

    env = LiberoSimVectorEnv(
        num_envs,
        suite=SUITE,
        task=TASK,
        num_workers=workers,
        return_frames=frames,
        max_episode_steps=10_000,
        chunk_len=CHUNK,
    )
    env.reset(seed=0)
    return env


def run(quick: bool = False) -> Result:
    """Chunks of 8 control steps, small random motions."""
    from rawdream_env.errors import MissingAssetsError, MissingDependencyError

    try:
        bare = bare_environment()
    except (MissingDependencyError, MissingAssetsError) as error:
        return Result("libero_env", GOAL, None, [f"not measured: {error}"])
    rounds = ROUNDS if quick else CHUNKS
    actions = np.random.default_rng(0).uniform(-0.2, 0.2, (rounds + 1, 2, CHUNK, 7)).astype(np.float32)
    bare.env.ignore_done = True  # its horizon is shorter than the benchmark
    for_bare = iter(actions[:, 0])

    def step_bare() -> None:
        bare.sim._render_context_offscreen.gl_ctx.make_current()
        for action in next(for_bare):
            bare.step(action)

    def stepper(env: Any) -> Callable[[], None]:
        chunks = iter(actions[:, : env.num_envs])
        return lambda: env.step(next(chunks))

    envs = {
        "ours, every frame": make(1, 0, True),
        "ours, last frame": make(1, 0, False),
        "1 worker, 2 rows": make(2, 1, False),
        "2 workers, 2 rows": make(2, 2, False),
    }
    times = interleave({"hf-libero": step_bare, **{name: stepper(env) for name, env in envs.items()}}, rounds)
    lines, numbers = [], {}
    for name, t in times.items():
        done = CHUNK * (envs[name].num_envs if name in envs else 1)
        numbers[name] = {**t.as_dict(), "steps_per_s": done / t.median, "best_steps_per_s": done / t.best}
        lines.append(f"{name}: {done / t.median:.1f} control steps/s (median), {done / t.best:.1f} (best)")
    cost = ratio(times["ours, every frame"], times["hf-libero"])
    two = ratio(times["1 worker, 2 rows"], times["2 workers, 2 rows"])
    numbers |= {"cost": cost, "two_workers": two}
    lines += [
        f"ours, every frame / hf-libero, {rounds} chunks: processor time {cost['processor_median']:.3f}, wall clock "
        f"{cost['median']:.3f} (median of the chunks' ratios {cost['median_round']:.3f})",
        f"2 workers are {two['median']:.2f} times as fast as 1 (median of the chunks' ratios {two['median_round']:.2f})",
    ]
    for env in envs.values():
        env.close()
    bare.sim._render_context_offscreen.gl_ctx.make_current()  # it frees what is current
    bare.close()
    return Result("libero_env", GOAL, cost["processor_median"] <= LIMIT, lines, numbers)
