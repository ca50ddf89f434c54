"""No child process outlives its parent or keeps it from ending."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rawdream_env import processes
from rawdream_env.data.parallel import run_pieces
from rawdream_env.errors import WorkerStoppedError

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks into /proc")


class Sleeper:
    """Writes its process id, then works until it is stopped."""

    def __init__(self, folder, stops=True):
        self.folder, self.stops = folder, stops

    def __call__(self, piece, tick, stopped):
        (Path(self.folder) / str(os.getpid())).touch()
        while not (self.stops and stopped()):
            time.sleep(0.02)
            tick()

    def close(self):
        pass


class Factory:
    """Makes a Sleeper; picklable."""

    def __init__(self, folder, stops=True):
        self.folder, self.stops = folder, stops

    def __call__(self):
        return Sleeper(self.folder, self.stops)


def alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def wait_for(condition, seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if result := condition():
            return result
        time.sleep(0.05)
    return condition()


def started(folder, count):
    assert wait_for(lambda: len(list(Path(folder).iterdir())) == count, 60)
    return [int(path.name) for path in Path(folder).iterdir()]


POOL = """
import sys
sys.path.insert(0, {tests!r})
from test_processes import Factory
from rawdream_env.data.parallel import run_pieces
if __name__ == "__main__":
    for _ in run_pieces(range(2), Factory({folder!r}), workers=2, count=lambda n: None): pass
"""
SIMULATOR = """
import time
from pathlib import Path
from rawdream_env.piper.simulator.workers import PiperWorkers
if __name__ == "__main__":
    workers = PiperWorkers(2, num_workers=2)
    workers.proprio([0, 1])
    for process in workers._processes: Path({folder!r}, str(process.pid)).touch()
    time.sleep(60)
"""
CLIPS = """
import sys
sys.path.insert(0, {tests!r})
import test_processes
from rawdream_env.evaluation.judges import episodes
episodes._play = test_processes.play
if __name__ == "__main__":
    list(episodes.fresh_clips({folder!r}, 2, workers=2))
"""


def play(folder, index):
    """Takes the place of playing an episode."""
    Sleeper(folder)(index, lambda: None, lambda: False)


@pytest.mark.parametrize("script", [POOL, SIMULATOR, CLIPS], ids=["pool", "simulator", "clips"])
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_children_end_with_their_parent(tmp_path, script, how):
    code = script.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    parent = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stderr=subprocess.DEVNULL)
    try:
        pids = started(tmp_path, 2)
        os.kill(pids[0], signal.SIGSTOP)  # a stopped child as well
        assert all(map(alive, pids))
        parent.send_signal(how)
        assert parent.wait(60) == -how
        assert wait_for(lambda: not any(map(alive, pids)), 60)
    finally:
        parent.kill()


STOP_AT_ONCE = """
import os, signal
from pathlib import Path
if __name__ == "__mp_main__":  # a worker, before it has imported anything of its own
    Path({folder!r}, str(os.getpid())).touch()
    os.kill(os.getpid(), signal.SIGSTOP)
"""


@pytest.mark.parametrize("script", [POOL, SIMULATOR, CLIPS], ids=["pool", "simulator", "clips"])
def test_a_child_stopped_before_its_first_import_ends_with_its_parent(tmp_path, script):
    program, pids = tmp_path / "program.py", tmp_path / "pids"
    pids.mkdir()
    program.write_text((STOP_AT_ONCE + script).format(tests=str(Path(__file__).parent), folder=str(pids)))
    parent = subprocess.Popen([sys.executable, str(program)], start_new_session=True, stderr=subprocess.DEVNULL)
    try:
        stopped = started(pids, 2)
        parent.kill()
        parent.wait(60)
        assert wait_for(lambda: not any(map(alive, stopped)), 60)
    finally:
        parent.kill()
        for pid in map(int, os.listdir(pids)):
            if alive(pid):
                os.kill(pid, signal.SIGKILL)


def test_a_child_started_by_a_thread_survives_the_thread(tmp_path):
    """Linux ties the signal of a parent's death to the thread that started the child."""
    code = (
        "import threading\n"
        "from rawdream_env.piper.simulator.workers import PiperWorkers\n"
        "if __name__ == '__main__':\n"
        "    made = []\n"
        "    thread = threading.Thread(target=lambda: made.append(PiperWorkers(1, num_workers=1)))\n"
        "    thread.start(); thread.join()\n"
        "    print(made[0].proprio([0]).shape, made[0].proprio([0]).shape)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "(1, 7) (1, 7)\n", done.stderr


@pytest.mark.parametrize("begun", [True, False], ids=["working", "starting"])
def test_a_stopped_worker_of_a_pool_is_named_in_time(tmp_path, monkeypatch, begun):
    """The others work on, and so does one whose call takes longer than the deadline."""
    monkeypatch.setattr(processes, "_GRACE_S", 1.0)
    pool = processes.WorkerPool(2)
    calls = {pool.submit(play, str(tmp_path), index) for index in range(2)}
    pids = started(tmp_path, 2) if begun else list(pool._pool._processes)
    os.kill(pids[0], signal.SIGSTOP)
    if not begun:
        started(tmp_path, 1)
    monkeypatch.setattr(processes, "PATIENCE_S", 4.0)
    try:
        with pytest.raises(
            WorkerStoppedError, match=rf"worker \d \(process {pids[0]}\) has shown no sign of life for \d+ s"
        ):
            for _ in range(600):
                pool.wait(calls)
    finally:
        pool.close()
    assert wait_for(lambda: not any(map(alive, pids)), 60)


@pytest.mark.parametrize("stops", [True, False], ids=["stopped", "unresponsive"])
def test_a_pool_is_left_within_its_grace(tmp_path, monkeypatch, stops):
    """A worker that is stopped by a signal, or that never looks whether it should return, is killed."""
    monkeypatch.setattr("rawdream_env.processes._GRACE_S", 1.0)
    pieces = run_pieces(
        range(2), Factory(str(tmp_path), stops), workers=2, count=lambda n: _interrupt_when_started(tmp_path, stops)
    )
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        list(pieces)
    assert time.monotonic() - begun < 60
    assert wait_for(lambda: not any(alive(int(path.name)) for path in tmp_path.iterdir()), 60)


def _interrupt_when_started(folder, stops):
    pids = [int(path.name) for path in folder.iterdir()]
    if len(pids) == 2:
        if stops:
            os.kill(pids[0], signal.SIGSTOP)
        raise KeyboardInterrupt
