"""``rawdream bench``: run the benchmarks of a clone of the repository."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from rawdream_env.errors import InvalidOptionError


@dataclass(frozen=True)
class BenchConfig:
    """Options of ``rawdream bench``."""

    only: tuple[str, ...] = ()
    """Benchmarks to run, by name; default: all."""
    quick: bool = False
    """Run fewer episodes."""
    json: str = ""
    """File for the numbers as JSON; default: none is written."""


def run_bench(config: BenchConfig) -> int:
    """Run ``benchmarks/`` of the clone that this package is installed from; returns 1 when a goal was missed."""
    for folder in (Path.cwd(), Path(__file__).resolve().parents[2]):
        if (folder / "benchmarks" / "run.py").is_file():
            sys.path.insert(0, str(folder))
            break
    else:
        raise InvalidOptionError(
            "the benchmarks are not part of the installed package; run this command in a clone of the repository."
        )
    arguments = ["--only", *config.only] if config.only else []
    arguments += ["--quick"] if config.quick else []
    arguments += ["--json", config.json] if config.json else []
    return int(import_module("benchmarks.run").main(arguments))
