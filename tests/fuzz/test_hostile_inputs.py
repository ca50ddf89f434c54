"""Hostile data sets, demonstration files, checkpoints and run folders: they work, or one short named error is raised.

``pytest tests/fuzz`` runs 50 cases; ``RAWDREAM_FUZZ_CASES=5000 pytest tests/fuzz -s`` runs more, and
``RAWDREAM_FUZZ_FIRST=123 RAWDREAM_FUZZ_CASES=1`` one again. A case is its number: seeds, mutation and opener follow from it.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import shutil
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

CASES = int(os.environ.get("RAWDREAM_FUZZ_CASES", "50"))
FIRST = int(os.environ.get("RAWDREAM_FUZZ_FIRST", "0"))
WORKERS = int(os.environ.get("RAWDREAM_FUZZ_WORKERS", "1"))
DEADLINE_S, START_S = 60, 300


class Worker:
    """A child process that runs cases, restarted when it dies or exceeds the deadline."""

    def __init__(self, seeds: Path, base: Path) -> None:
        self.command = [sys.executable, str(Path(__file__).with_name("worker.py")), str(seeds), str(base)]
        self.process: subprocess.Popen[bytes] | None = None

    def _answer(self, deadline: float) -> bytes:
        """One line, or nothing after the deadline or when the process has ended."""
        assert self.process is not None and self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            return self.process.stdout.readline() if selector.select(deadline) else b""

    def run(self, number: int) -> dict[str, Any]:
        if self.process is None:
            self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            assert self._answer(START_S) == b"ready\n", "the worker does not start"
        assert self.process.stdin is not None
        self.process.stdin.write(b"%d\n" % number)
        self.process.stdin.flush()
        line = self._answer(DEADLINE_S)
        if line:
            return dict(json.loads(line))
        try:
            fault = f"crash, exit code {self.process.wait(5)}"
        except subprocess.TimeoutExpired:
            fault = f"hang of {DEADLINE_S} s"
        self.close()
        return {"number": number, "kind": "?", "outcome": "fault", "faults": [fault]}

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
        self.process = None


def run_cases(numbers: range, base: Path, report: Path | None = None) -> list[dict[str, Any]]:
    """Run cases in ``WORKERS`` processes; ``report`` gets a JSON line for each."""
    seeds = base / "seeds"
    subprocess.run([sys.executable, "-c", f"import seeds, pathlib; seeds.make_all(pathlib.Path({str(seeds)!r}))"],
                   cwd=Path(__file__).parent, check=True, capture_output=True)  # fmt: skip

    def share(first: int) -> list[dict[str, Any]]:
        worker, results = Worker(seeds, base), []
        with contextlib.closing(worker):
            for number in numbers[first::WORKERS]:
                results.append(worker.run(number))
                if report is not None:
                    with open(report, "a") as file:
                        file.write(json.dumps(results[-1]) + "\n")
        return results

    with ThreadPoolExecutor(WORKERS) as pool:
        return [result for part in pool.map(share, range(WORKERS)) for result in part]


@pytest.mark.filterwarnings("ignore")
def test_hostile_inputs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = os.environ.get("RAWDREAM_FUZZ_REPORT")
    results = run_cases(range(FIRST, FIRST + CASES), tmp_path, Path(report) if report else None)
    shutil.rmtree(tmp_path, ignore_errors=True)
    faults = [result for result in results if result["faults"]]
    with capsys.disabled():
        outcomes = Counter((result["kind"], result["outcome"]) for result in results)
        for kind in sorted({kind for kind, _ in outcomes}):
            print(f"\n{kind:<13}", {name: n for (k, name), n in sorted(outcomes.items()) if k == kind}, end="")
        print(f"\n{len(results)} hostile inputs, {len(faults)} faults")
    assert len(results) == CASES
    assert not faults, "\n".join(
        f"{f['number']} ({f['kind']}, {f.get('mutation')}): {f['faults']}" for f in faults[:20]
    )
