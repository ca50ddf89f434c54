"""Runs a training in processes that are killed with SIGKILL at random moments, until it ends.

A moment is a number of function calls: it does not depend on the speed of the machine. RAWDREAM_TEST_KILLS=50 sets the number
of kills.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

KILLS = int(os.environ.get("RAWDREAM_TEST_KILLS", "5"))


def kill_at_random_moments(train: str, folder: Path, *args: object) -> tuple[Path, list[Path]]:
    """Run folders: of a run that nothing interrupts, and of runs that were killed ``KILLS`` times in all and then ended.

    ``train``: "module:function", called with a run folder and ``args`` as strings. A killed run starts again until it ends.
    """
    command = [sys.executable, __file__, train, str(folder), str(KILLS), *map(str, args)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["killed"] == KILLS
    unbroken, *killed = map(Path, result["runs"])
    assert killed
    return unbroken, killed


def _run(train: Callable[[Path], Any], run_dir: Path, calls: int) -> tuple[int, int]:
    """Exit status of a forked process, killed at its function call number ``calls`` (0: never), and the calls it made."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        made = 0

        def count(frame: Any, event: str, arg: Any) -> None:
            nonlocal made
            made += 1
            if made == calls:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.setprofile(count)
        train(run_dir)
        sys.setprofile(None)
        os.write(writer, str(made).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as lines:
        made = int(lines.read() or 0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), made


def _main(name: str, folder: Path, kills: int, *args: str) -> None:
    module, function = name.split(":")
    chosen = getattr(importlib.import_module(module), function)

    def train(run_dir: Path) -> None:
        chosen(run_dir, *args)

    import torch

    torch.set_num_threads(1)
    rng, killed, runs = random.Random(kills), 0, [folder / "unbroken"]
    status, calls = _run(train, runs[0], 0)
    while status == 0 and killed < kills:
        runs.append(folder / f"killed_{len(runs)}")
        while (status := _run(train, runs[-1], rng.randint(1, calls) if killed < kills else 0)[0]) == -signal.SIGKILL:
            killed += 1
    if status != 0:
        raise SystemExit(f"A run ended with status {status} after {killed} kills.")
    print(json.dumps({"killed": killed, "runs": list(map(str, runs))}))


if __name__ == "__main__":
    _main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
