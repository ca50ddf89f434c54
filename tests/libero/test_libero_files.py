"""Initial states and assets: pickles that run nothing, conversion, and errors that say what is missing."""

from __future__ import annotations

import importlib.util
import os
import pickle
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from rawdream_env.errors import DatasetError, MissingAssetsError, MissingDependencyError
from rawdream_env.libero import install
from rawdream_env.libero.init_states import load_init_states, read_pickled
from rawdream_env.libero.install import Task, find_assets, find_package, instruction_of, tasks_of

STATES = np.arange(12.0).reshape(3, 4)


def pickled(path, value, *, raw=None):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(value, protocol=2) if raw is None else raw)
        archive.writestr("archive/version", "3\n")
    return path


@pytest.fixture
def task(tmp_path, monkeypatch) -> Task:
    monkeypatch.setenv(install.HOME, str(tmp_path / "home"))
    return Task("push", "push", tmp_path / "push.bddl", pickled(tmp_path / "push.pruned_init", STATES))


class Evil:
    def __reduce__(self):
        return os.system, ("touch harmed",)


def test_a_pickle_runs_nothing(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DatasetError, match="it asks for (posix|nt).system"):
        read_pickled(pickled(tmp_path / "evil", Evil()))
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize(
    "value", [[1.0, 2.0], STATES[0], STATES.astype(int), STATES * np.nan, np.zeros((0, 3)), {"a": 1}, b"x"]
)
def test_other_content_is_refused(tmp_path, value) -> None:
    with pytest.raises(DatasetError):
        read_pickled(pickled(tmp_path / "states", value))


@pytest.mark.parametrize("raw", [b"", b"\x80\x02", b"garbage"])
def test_damage_is_named(tmp_path, raw) -> None:
    with pytest.raises(DatasetError, match="is not a file of initial states"):
        read_pickled(pickled(tmp_path / "states", None, raw=raw))
    (tmp_path / "plain").write_bytes(raw)
    with pytest.raises(DatasetError, match="is not a file of initial states"):
        read_pickled(tmp_path / "plain")


def test_states_are_converted_once(task, tmp_path, monkeypatch) -> None:
    np.testing.assert_array_equal(load_init_states("suite", task), STATES)
    (converted,) = (tmp_path / "home").rglob("*.npz")
    assert converted.relative_to(tmp_path / "home").as_posix() == "init_states/suite/push.npz"
    monkeypatch.setattr("rawdream_env.libero.init_states.read_pickled", lambda path: STATES + 1)
    np.testing.assert_array_equal(load_init_states("suite", task), STATES)  # the pickle is not read again
    whole = converted.read_bytes()
    converted.write_bytes(whole[: len(whole) // 2])
    np.testing.assert_array_equal(load_init_states("suite", task), STATES + 1)  # a damaged conversion is repeated
    pickled(task.init_states, STATES + 5)
    monkeypatch.undo()
    monkeypatch.setenv(install.HOME, str(tmp_path / "home"))
    np.testing.assert_array_equal(load_init_states("suite", task), STATES + 5)  # and that of another source
    task.init_states.unlink()
    with pytest.raises(DatasetError, match="cannot be read"):
        load_init_states("suite", task)


def test_what_is_missing_is_named(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv(install.ASSETS, str(tmp_path))
    with pytest.raises(MissingAssetsError, match=r"not in .*Download them .*RAWDREAM_LIBERO_ASSETS=DIR"):
        find_assets(tmp_path)
    for part in install._PARTS:
        (tmp_path / part).mkdir()
    assert find_assets(tmp_path / "elsewhere") == tmp_path.resolve()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'rawdream-env\[libero\]'"):
        find_package()


def test_instructions_leave_the_scene_out() -> None:
    assert instruction_of("KITCHEN_SCENE10_close_the_drawer") == "close the drawer"
    assert instruction_of("turn_on_the_stove") == "turn on the stove"


def test_every_task_has_its_files(libero) -> None:
    counts = {suite: len(tasks_of(suite)) for suite in ("libero_spatial", "libero_object", "libero_goal", "libero_10")}
    assert set(counts.values()) == {10} and len(tasks_of("libero_90")) == 90
    for task in (*tasks_of("libero_goal"), *tasks_of("libero_90")[::30]):
        assert task.bddl.is_file() and len(read_pickled(task.init_states)) == 50


WATCHED = """
import sys
written = []
def watch(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, bytes)):
        mode, flags = arguments[1], arguments[2]
        if (mode and set(mode) & set("wax+")) or (not mode and flags & 3):
            written.append(str(arguments[0]))
    if event.startswith("socket.connect"):
        written.append("network")
sys.addaudithook(watch)
from rawdream_env.libero.install import home, import_simulator
import_simulator()
for path in written:
    if not path.startswith(("/dev", str(home()))):
        print(path)
"""


@pytest.mark.slow
def test_importing_prompts_nothing_and_writes_to_its_own_folder_alone(libero, tmp_path) -> None:
    environment = {
        **os.environ,
        install.HOME: str(tmp_path / "libero"),
        "HOME": str(tmp_path),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    environment.setdefault(install.ASSETS, str(find_assets(find_package())))
    done = subprocess.run(
        [sys.executable, "-c", WATCHED], env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr
    assert (tmp_path / "libero" / "config.yaml").is_file()
    assert "private macro" not in done.stderr
