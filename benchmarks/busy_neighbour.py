"""How much slower is training when another program uses a core? Policy updates beside a busy loop.

OpenMP's threads spin while they wait for each other. A spinning thread keeps the core from the thread that it waits for, so
that one more program on the machine can slow a step down many times over. The command line therefore runs with
``OMP_WAIT_POLICY=PASSIVE`` unless the variable is set. Each side is a fresh interpreter that samples and updates the bundled
policy; quiet and busy rounds alternate, and so do the policies.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys

from benchmarks.common import Result

GOAL = 2.5
WORK = """
import sys, time
import numpy as np
import torch
from rawdream_env.policies import load_policy
from rawdream_env.seeding import NoiseKey

torch.set_num_threads(int(sys.argv[1]))
policy = load_policy("embedded")
optimizer = torch.optim.AdamW(policy.parameters(), 1e-6)
images, texts = np.zeros((64, 64, 64, 3), np.uint8), ["put the cup into the pot"] * 64
keys = [NoiseKey(seed) for seed in range(64)]

def step():
    with torch.no_grad():
        tokens = policy.act(images, texts, temperature=0.7, keys=keys).tokens
    policy.logprobs(images, texts, tokens, temperature=0.7).mean().backward()
    optimizer.step()
    optimizer.zero_grad()

step()
begun = time.perf_counter()
for _ in range(int(sys.argv[2])):
    step()
print((time.perf_counter() - begun) / int(sys.argv[2]))
"""
NEIGHBOUR = "while True: pass"


def run(quick: bool = False) -> Result:
    """Seconds per step, quiet and beside one busy loop, with both wait policies."""
    import torch

    threads, rounds, steps = torch.get_num_threads(), 2 if quick else 4, 2 if quick else 4
    seconds: dict[tuple[str, bool], list[float]] = {}
    for turn in range(rounds):
        for policy in ("PASSIVE", "default") if turn % 2 == 0 else ("default", "PASSIVE"):
            for busy in (False, True):
                seconds.setdefault((policy, busy), []).append(_seconds(policy, busy, threads, steps))
    lines, slowdown = [], {}
    for policy in ("PASSIVE", "default"):
        quiet, busy_s = (statistics.median(seconds[policy, busy]) for busy in (False, True))
        slowdown[policy] = busy_s / quiet
        lines.append(
            f"OMP_WAIT_POLICY {policy}: {quiet:.2f} s a step quiet, {busy_s:.2f} s beside a busy loop ({busy_s / quiet:.1f}x)"
        )
    numbers = {f"{policy}_{'busy' if busy else 'quiet'}_s": values for (policy, busy), values in seconds.items()}
    passed = slowdown["PASSIVE"] <= GOAL
    return Result("busy_neighbour", f"<= {GOAL} times slower beside a busy loop", passed, lines, numbers)


def _seconds(policy: str, busy: bool, threads: int, steps: int) -> float:
    environment = {
        name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "OMP_NUM_THREADS")
    }
    if policy != "default":
        environment["OMP_WAIT_POLICY"] = policy
    neighbour = subprocess.Popen([sys.executable, "-c", NEIGHBOUR]) if busy else None
    try:
        command = [sys.executable, "-c", WORK, str(threads), str(steps)]
        return float(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    finally:
        if neighbour is not None:
            neighbour.kill()
            neighbour.wait()
