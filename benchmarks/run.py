"""Run the benchmarks and print a table; ``--json`` writes the numbers with the hardware named.

python -m benchmarks                        all of them
python -m benchmarks --only env_layer       one
python -m benchmarks --quick --json b.json  fewer episodes, numbers to a file
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

NAMES = (
    "context_reuse",
    "exact_trims",
    "approximations",
    "refill",
    "streamed_decode",
    "env_layer",
    "dual_noise",
    "memory",
    "embedded_vs_twin",
    "scene_vs_twin",
    "judge_client",
    "judge_overlap",
    "instant_reflector",
    "grpo_guard",
    "grpo_loop",
    "policy_throughput",
    "busy_neighbour",
    "libero_env",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmarks; returns 1 when one missed its goal or failed."""
    from benchmarks.common import Result
    from rawdream_env.evaluation.reporting.provenance import provenance, usable_cores

    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=NAMES, default=list(NAMES), help="which ones")
    parser.add_argument("--quick", action="store_true", help="fewer episodes")
    parser.add_argument("--json", type=Path, default=None, help="write the numbers to this file")
    options = parser.parse_args(arguments)
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", usable_cores())))
    results: list[Result] = []
    for name in options.only:
        begin = time.perf_counter()
        try:
            result = importlib.import_module(f"benchmarks.{name}").run(quick=options.quick)
        except Exception as error:  # one broken benchmark must not hide the others
            result = Result(name, "", False, [f"failed: {type(error).__name__}: {error}"])
        mark = {True: "met", False: "MISSED", None: "no goal"}[result.passed]
        print(f"{name} [{mark}] {result.goal} ({time.perf_counter() - begin:.1f} s)", flush=True)
        for line in result.lines:
            print(f"    {line}", flush=True)
        results.append(result)
    run = provenance(load_average=os.getloadavg()[0])
    hardware = run["hardware"]
    machine = f"{hardware['cpu']}, {hardware['cores']} cores"
    print(f"on {machine}, {torch.get_num_threads()} threads, load {run['load_average']:.1f}")
    if options.json is not None:
        options.json.write_text(json.dumps({"run": run, "results": [asdict(r) for r in results]}, indent=2) + "\n")
    return int(any(r.passed is False for r in results))


if __name__ == "__main__":
    sys.exit(main())
