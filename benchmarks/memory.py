"""Growth of memory over 1,000 episodes: resident memory of this process, dream and verification included.

Measured in a fresh process, so that earlier benchmarks have no influence. The first 200 episodes are warm-up (allocators,
caches); the growth per 100 episodes is the slope of a line fitted to the rest.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.common import Result

GOAL_MB = 4.0


def resident_mb() -> float:
    """Resident memory of this process in MB (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def measure(episodes: int) -> list[tuple[int, float]]:
    """(episodes done, MB) along the way: 10 environments, frames returned, verification, automatic reset."""
    import gc

    import numpy as np

    from rawdream_env.envs.dream import DreamVectorEnv
    from rawdream_env.judges.scripted import ScriptedJudge
    from rawdream_env.wrappers.dual_noise import DualNoiseVerification

    num_envs = 10
    env = DualNoiseVerification(
        DreamVectorEnv(
            num_envs,
            world_model="null",
            judge=ScriptedJudge(success_rate=0.3),
            starts="null",
            return_frames=True,
            autoreset_mode="SameStep",
        )
    )
    rng = np.random.default_rng(0)
    env.reset(seed=0)
    curve = []
    for done in range(0, episodes, num_envs):
        for _ in range(8):
            env.step(rng.uniform(-1, 1, (num_envs, 8, 7)).astype(np.float32))
        if (done + num_envs) % 50 == 0:
            gc.collect()
            curve.append((done + num_envs, resident_mb()))
    env.close()
    return curve


def run(quick: bool = False) -> Result:
    """1,000 episodes (300 when ``quick``)."""
    import numpy as np

    episodes = 300 if quick else 1000
    code = f"import json; from benchmarks.memory import measure; print(json.dumps(measure({episodes})))"
    root = Path(__file__).resolve().parent.parent
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root).stdout
    curve = json.loads(output.strip().splitlines()[-1])
    later = np.array([point for point in curve if point[0] > (100 if quick else 200)])
    slope = float(np.polyfit(later[:, 0], later[:, 1], 1)[0])
    growth = float(slope * (later[-1, 0] - later[0, 0]))
    lines = [
        f"{later[0, 1]:.1f} MB after {later[0, 0]:.0f} episodes, {later[-1, 1]:.1f} MB after {later[-1, 0]:.0f}: "
        f"fitted growth {growth:+.2f} MB"
    ]
    numbers = {"curve": curve, "fitted_growth_mb": growth, "mb_per_100_episodes": 100 * slope}
    return Result("memory", f"fitted growth <= {GOAL_MB} MB after warm-up", bool(growth <= GOAL_MB), lines, numbers)
