"""Imagined frames per second of the bundled world model and of its MuJoCo twin on the same cores, with a breakdown of the
time.

Both produce every camera frame (64x64) for the same actions. The dream's stages (policy, denoiser, decoder, judge) are
timed inside the same episodes. No goal: a world model on a CPU need not be faster than the simulator it imitates.
"""

from __future__ import annotations

import time
from typing import Any

from benchmarks.common import ROUNDS, Result, embedded_models, interleave, twin_starts

BATCH, CHUNKS = 8, 8


class Stopwatch:
    """Sums the seconds spent in the functions it wraps."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def wrap(self, name: str, function: Any) -> Any:
        """``function`` with its time added to ``name``."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin

        return timed


def run(quick: bool = False) -> Result:
    """Episodes of 8 chunks, 8 environments: dream with policy and judge, twin with as many workers as cores."""
    import numpy as np

    from rawdream_env.envs.dream import DreamVectorEnv
    from rawdream_env.envs.episodes import run_episodes
    from rawdream_env.evaluation.reporting.provenance import usable_cores
    from rawdream_env.piper.relations import TASKS
    from rawdream_env.piper.simulator.workers import PiperWorkers

    model, judge, policy, trained = embedded_models()
    watch, workers = Stopwatch(), usable_cores()
    twin = PiperWorkers(BATCH, 0 if workers == 1 else workers, image_size=model.frame_shape[0])
    tasks = [TASKS[i % len(TASKS)].name for i in range(BATCH)]
    seeds = list(range(BATCH))
    starts = twin_starts(twin, BATCH)
    env = DreamVectorEnv(
        BATCH, world_model=model, judge=watch.wrap("judge", judge), starts="null", autoreset_mode="Disabled"
    )
    policy.act = watch.wrap("policy", policy.act)
    model.autoencoder.decode_next = watch.wrap("decoder", model.autoencoder.decode_next)
    model.imagine = watch.wrap("imagine", model.imagine)
    model.start = watch.wrap("start", model.start)
    total = {"episodes": 0.0}
    actions = np.random.default_rng(0).uniform(-0.5, 0.5, (CHUNKS, BATCH, model.chunk_len, 7)).astype(np.float32)

    def dream() -> None:
        begin = time.perf_counter()
        list(run_episodes(env, starts, policy))
        total["episodes"] += time.perf_counter() - begin

    def simulate() -> None:
        twin.reset(range(BATCH), seeds, tasks)
        for chunk in actions:
            twin.step(range(BATCH), chunk)

    try:
        times = interleave({"dream": dream, "twin": simulate}, ROUNDS)
    finally:
        twin.close()
        env.close()
    count = BATCH * CHUNKS * model.chunk_len
    fps = {name: {"best": count / t.best, "median": count / t.median} for name, t in times.items()}
    spent = dict(watch.seconds)
    spent["denoiser"] = spent.pop("imagine") - spent["decoder"]
    spent["environment"] = total["episodes"] - sum(spent.values())
    share = {name: seconds / total["episodes"] for name, seconds in spent.items()}
    dream_fps, twin_fps = fps["dream"], fps["twin"]
    parts = sorted(share.items(), key=lambda item: -item[1])
    lines = [
        f"dream {dream_fps['best']:.0f} / {dream_fps['median']:.0f} frames/s (best / median, with policy and judge), "
        f"twin {twin_fps['best']:.0f} / {twin_fps['median']:.0f} with {workers} workers: "
        f"{dream_fps['median'] / twin_fps['median']:.2f}x",
        "share of the dream: " + ", ".join(f"{name} {100 * part:.0f} %" for name, part in parts),
    ]
    numbers = {"trained_weights": trained, "frames_per_s": fps, "share": share, "batch": BATCH, "workers": workers}
    return Result("embedded_vs_twin", "report", None, lines, numbers)
