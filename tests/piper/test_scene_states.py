"""Collected states of the Piper's scene: no task is ever done in them, and a killed collection resumes."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from rawdream_env.errors import DatasetError
from rawdream_env.files import load_safetensors
from rawdream_env.piper import geometry
from rawdream_env.piper.relations import OBJECTS, TASKS, relation_index, relations
from rawdream_env.piper.scene_states import (
    KINDS,
    Recording,
    ShardSize,
    collect_states,
    let_go_near_target,
    shard_path,
)
from rawdream_env.piper.simulator import layouts
from rawdream_env.piper.simulator.skills import ScriptedExpert
from rawdream_env.piper.simulator.twin import PiperTwin

SIZE = ShardSize(rows=2, batches=1, scripted=3)


def collect(folder: Path, workers: int = 0, seed: int = 4) -> list[bytes]:
    """The shards of a tiny collection."""
    collect_states(folder, 2, seed=seed, workers=workers, size=SIZE, progress=False)
    return [shard_path(folder, i).read_bytes() for i in range(2)]


def rows_with_a_task_done(shard: dict[str, Tensor]) -> int:
    """In how many rows the relation of a task is true, from the stored states."""
    position, rotation, arm, present, length = (
        shard[name].numpy() for name in ("position", "rotation", "arm", "present", "length")
    )
    poses = np.where(np.repeat(present, length, 0)[..., None], np.concatenate([position, rotation], -1), np.nan)
    true = relations(poses, arm[:, 6:].sum(-1), arm[:, :3])
    return int(true[:, [relation_index(task.relation) for task in TASKS]].any(1).sum())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("states")
    collect(path)
    return path


def test_no_task_is_done_in_the_states(folder: Path) -> None:
    shards = [load_safetensors(shard_path(folder, i)) for i in range(2)]
    for shard in shards:
        rows, episodes = len(shard["arm"]), len(shard["length"])
        assert shard["position"].shape == (rows, 7, 3) and shard["length"].sum() == rows
        assert 1 <= episodes <= SIZE.episodes
        assert rows_with_a_task_done(shard) == 0
        absent = ~shard["present"].repeat_interleave(shard["length"], 0)
        assert not shard["position"][absent].any() and not shard["velocity"][absent].any()
    assert KINDS.index("scripted") in shards[0]["kind"] and shards[0]["kind"].min() < KINDS.index("scripted")
    assert not torch.equal(shards[0]["arm"][:10], shards[1]["arm"][:10])


def test_a_recording_ends_before_the_task_is_done() -> None:
    twin, rng = PiperTwin(render=False), np.random.default_rng(0)
    twin.set_scene(layouts.sample_task_layout(TASKS[0], "narrow", rng), geometry.HOME_POSE)
    expert, recording = ScriptedExpert(twin, TASKS[0], rng), Recording(twin, 0)
    while not recording.over and len(recording) < 300:
        recording.step(expert.act())
    steps = len(recording)
    assert twin.relations()[relation_index(TASKS[0].relation)] and steps > 20
    recording.step(expert.act())  # changes nothing
    shard = {name: torch.from_numpy(value) for name, value in recording.arrays().items()}
    assert len(recording) == steps and rows_with_a_task_done(shard) == 0
    assert len(shard["arm"]) == shard["length"] <= steps + 1  # the release is left out too
    held = shard["position"][-1, 0] - shard["position"][-1, 1]
    assert held[:2].norm() < 0.03 and held[2] > 0.02 and shard["command"][-1, 6] > 0


def test_an_episode_ends_where_a_target_may_be_reached() -> None:
    """Whatever comes of it: a blue block is lifted at row 2 and let go at row 5."""
    position, command = np.zeros((8, 7, 3)), np.full((8, 7), -1.0)
    position[2:, 0, 2], command[1:5, 6] = 0.05, 1.0
    present = np.array([name in ("blue_block", "red_block") for name in OBJECTS])
    assert let_go_near_target(position, present, command) == 5
    position[:, 1, 0] = 0.11  # far from the red block
    assert let_go_near_target(position, present, command) == 8
    position[:, 1, 0], present[1] = 0.09, False  # no target
    assert let_go_near_target(position, present, command) == 8


@pytest.mark.slow
def test_worker_processes_make_the_same_shards(folder: Path, tmp_path: Path) -> None:
    assert collect(tmp_path, workers=2) == collect(folder)


@pytest.mark.slow
def test_a_killed_collection_resumes(folder: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from rawdream_env.piper.scene_states import ShardSize, collect_states; "
        f"collect_states(Path({str(tmp_path)!r}), 2, seed=4, size={SIZE!r}, progress=False)"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    first, deadline = shard_path(tmp_path, 0), time.monotonic() + 500
    while not first.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    before = first.stat().st_mtime_ns
    assert collect(tmp_path) == collect(folder)
    assert first.stat().st_mtime_ns == before
    assert {path.suffix for path in tmp_path.iterdir()} <= {".safetensors", ".json"}  # no litter


def test_another_collection_is_not_mixed_in(folder: Path) -> None:
    with pytest.raises(DatasetError, match=r"was collected with seed=4, now it is 5"):
        collect(folder, seed=5)
