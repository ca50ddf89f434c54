"""The full-size world model and OpenVLA-OFT on a GPU, with random weights: speed, memory, goals, within ten minutes.

python -m benchmarks.gpu --json out.json                 one H200
python -m benchmarks.gpu --only openvla                  the policy: acting, and the phases of a GRPO step
python -m benchmarks.gpu --tiny --device cpu             the same script at a size for a CPU

Every row reports its result, or why it was skipped: no time left, or too little memory. Times are measured with CUDA events
over at least 7 interleaved rounds after a warm-up; compile times are reported separately.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_models import FULL, TINY
from benchmarks.gpu_rows import ROWS, Bench


def goals(rows: dict[str, Any], judged: bool = True) -> list[dict[str, Any]]:
    """Each goal with the measured value (None: not measured) and whether it is met (None: not ``judged``)."""

    def number(row: str, *path: str) -> Any:
        value = rows.get(row, {}).get("numbers", {})
        for name in path:
            value = value.get(name) if isinstance(value, dict) else None
        return value

    wanted = [
        ("denoiser vs compiled recomputation", ">=", 2.4, number("naive", "denoiser", "median")),
        ("whole step vs compiled recomputation", ">=", 1.8, number("naive", "whole step", "median")),
        ("whole step vs eager loop per environment", ">=", 3.5, number("loop", "ratio", "median")),
        ("frames/s at B=8, exact", ">=", 150, number("exact", "B=8", "frames_per_s")),
        ("frames/s at B=64, exact", ">=", 180, number("exact", "B=64", "frames_per_s")),
        ("frames/s, rolling cache and tiny decoder", ">=", 400, number("options", "rolling + tiny", "frames_per_s")),
        ("streamed vs window decode", ">=", 3.3, number("decode", "ratio", "median")),
        ("environment's share of a step", "<=", 0.02, number("environment", "share")),
        ("hidden synchronisations in a step", "<=", 0, number("environment", "synchronisations")),
    ]
    return [
        {"goal": f"{name} {sign} {limit}", "found": found, "met": _met(found, sign, limit) if judged else None}
        for name, sign, limit, found in wanted
    ]


def _met(found: Any, sign: str, limit: float) -> bool | None:
    if found is None:
        return None
    return bool(found >= limit if sign == ">=" else found <= limit)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all rows; returns 1 when a goal was missed (never for ``--tiny``) or a row failed."""
    import torch

    from benchmarks.device import hardware

    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu")
    parser.add_argument(
        "--tiny", action="store_true", help="a model of a few thousand weights; its numbers mean nothing"
    )
    parser.add_argument(
        "--minutes", type=float, default=9.0, help="time for everything; rows that no longer fit are skipped"
    )
    parser.add_argument("--only", nargs="+", choices=list(ROWS), default=list(ROWS), help="which rows")
    parser.add_argument("--json", type=Path, default=None, help="write the numbers to this file")
    options = parser.parse_args(arguments)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print("PyTorch sees no CUDA device; use --tiny --device cpu to try the script on a CPU.", file=sys.stderr)
        return 2
    machine = hardware(options.device)
    print("on " + ", ".join(f"{name} {value}" for name, value in machine.items()), flush=True)
    bench = Bench(TINY if options.tiny else FULL, options.device, time.monotonic() + 60 * options.minutes)
    rows: dict[str, Any] = {}
    for name in options.only:
        rows[name] = bench.run(name)
        mark = rows[name]["status"] + (f": {rows[name]['reason']}" if "reason" in rows[name] else "")
        print(f"{name} [{mark}] ({rows[name]['seconds']:.1f} s)", flush=True)
        for line in rows[name].get("lines", []):
            print(f"    {line}", flush=True)
        if options.json is not None:  # after every row: an interrupted run keeps its results
            out = {"hardware": machine, "size": bench.size.name, "rows": rows, "goals": goals(rows, not options.tiny)}
            options.json.write_text(json.dumps(out, indent=2, default=str) + "\n", encoding="utf-8")
    listed = goals(rows, not options.tiny)
    for goal in listed:
        unjudged = "not measured" if goal["found"] is None else "not judged at this size"
        mark = {True: "met", False: "MISSED", None: unjudged}[goal["met"]]
        found = "" if goal["found"] is None else f", found {goal['found']:.3g}"
        print(f"goal [{mark}] {goal['goal']}{found}")
    failed = any(row["status"] == "failed" for row in rows.values())
    return int(failed or any(goal["met"] is False for goal in listed))


if __name__ == "__main__":
    sys.exit(main())
