"""The simulator itself: bit-equal to hf-libero's own environment, whatever else its process simulates."""

from __future__ import annotations

import logging
import os
import signal
from dataclasses import replace

import mujoco
import numpy as np
import pytest

from rawdream_env.libero import SUITES
from rawdream_env.libero.envs import LiberoDreamVectorEnv, LiberoSimVectorEnv
from rawdream_env.libero.init_states import load_init_states
from rawdream_env.libero.install import tasks_of
from rawdream_env.libero.protocols import SETTLE_ACTION
from rawdream_env.libero.scene import LiberoScene
from rawdream_env.starts.export import ExportStartsConfig, export_starts
from rawdream_env.starts.pack import PackStarts
from rawdream_env.testing.check_vector_env import check_vector_env
from rawdream_env.world_models.null import NullWorldModel
from tests.libero.conftest import SETTLE, SIDE, TASK
from tests.waiting import gone, wait_until

OTHER = 3


def sim(num_envs=1, **options) -> LiberoSimVectorEnv:
    given = {"suite": "libero_goal", "task": TASK, "image_size": SIDE, "settle_steps": SETTLE, "chunk_len": 2}
    return LiberoSimVectorEnv(num_envs, **{**given, **options})


def upright(observation):
    return observation["agentview_image"][::-1, ::-1]


def test_states_and_pictures_are_those_of_hf_libero(libero, group) -> None:
    task = tasks_of("libero_goal")[OTHER]  # the scene was built for TASK
    bare = libero.OffScreenRenderEnv(
        bddl_file_name=str(task.bddl), camera_names=["agentview"], camera_heights=SIDE, camera_widths=SIDE
    )
    try:
        bare.seed(0)
        bare.reset()
        bare.sim._render_context_offscreen.gl_ctx.make_current()
        observation = bare.set_init_state(load_init_states("libero_goal", task)[3])
        for _ in range(SETTLE):
            observation = bare.step(SETTLE_ACTION)[0]
        scene = group._scene(OTHER)
        other = scene.begin(TASK, 5, 0)
        scene.step(other.state, np.ones((2, 7), np.float32), False)
        start = scene.begin(OTHER, 3, SETTLE)  # not the first: nothing is left of what the scene did before
        assert np.array_equal(start.frame, upright(observation)) and start.frame.std() > 10
        np.testing.assert_allclose(start.proprio[:3], observation["robot0_eef_pos"], atol=1e-3)
        rng = np.random.default_rng(0)
        state, neighbour = start.state, other.state
        for _ in range(2):
            actions = rng.uniform(-1, 1, (3, 7)).astype(np.float32)
            neighbour = scene.step(neighbour, rng.uniform(-1, 1, (2, 7)).astype(np.float32), False).state
            step = scene.step(state, actions, True)
            state = step.state
            bare.sim._render_context_offscreen.gl_ctx.make_current()
            for action, frame in zip(actions, step.frames, strict=True):
                observation, _, done, _ = bare.step(action)
                assert np.array_equal(frame, upright(observation))
            assert np.array_equal(scene._env.get_sim_state(), bare.get_sim_state())
            assert step.success_end == done == bare.check_success()
    finally:
        bare.sim._render_context_offscreen.gl_ctx.make_current()  # it frees what is current
        bare.close()


STILL = np.array([SETTLE_ACTION], np.float32)


def burn(scene, state):
    """The state with the stove's knob turned."""
    scene._load(state)
    model, data = scene._base.sim.model._model, scene._base.sim.data._data
    (knob,) = (j for j in range(model.njnt) if "flat_stove" in mujoco.mj_id2name(model, mujoco.mjtObj.mjOBJ_JOINT, j))
    data.qpos[model.jnt_qposadr[knob]] = model.jnt_range[knob][1]
    return scene._capture()


def test_success_is_what_libero_checks(group) -> None:
    """A turned knob is a burning stove."""
    scene = group._scene(TASK)
    start = scene.begin(TASK, 0, SETTLE)
    assert not scene.step(start.state, STILL, False).success_any and not scene.check_success()
    step = scene.step(burn(scene, start.state), STILL, False)
    assert step.success_any and step.success_end and scene.check_success()
    glowing = scene.step(step.state, STILL, False).frames[-1].astype(int)
    dark = scene.step(start.state, STILL, False).frames[-1].astype(int)
    assert np.abs(glowing - dark).max() > 50, "the burner is shown"
    again = scene.step(step.state, STILL, False).frames[-1]
    assert np.array_equal(glowing, again), "the glow follows the state"


def test_tasks_of_one_scene_share_it(group) -> None:
    """The stove burns: that is a success of its own task alone, and each task has its initial states."""
    scene = group._scene(TASK)
    assert group._scene(OTHER) is scene
    start = scene.begin(OTHER, 0, SETTLE)
    assert not np.array_equal(start.frame, scene.begin(TASK, 0, SETTLE).frame)
    burning = burn(scene, scene.begin(TASK, 0, SETTLE).state)
    assert scene.step(burning, STILL, False).success_end
    assert not scene.step(replace(burning, task=OTHER), STILL, False).success_end
    assert scene.step(burning, STILL, False).success_end


def test_contract(group) -> None:
    report = check_vector_env(
        lambda num_envs, autoreset_mode: sim(num_envs, autoreset_mode=autoreset_mode, max_episode_steps=1),
        modes=("SameStep",),
        num_envs=(1, 2),
        chunks=2,
        strict=True,
        skip=("aliasing", "order", "closing"),  # tests/libero/test_env_logic.py
    )
    assert not report.skipped


def test_the_dream_shows_the_same_starts_and_a_pack_needs_no_simulator(group, tmp_path, monkeypatch) -> None:
    def dream(**options):
        protocol = env._rules
        model = NullWorldModel((SIDE, SIDE, 3))
        return LiberoDreamVectorEnv(
            2, suite="libero_goal", world_model=model, judge="scripted", task=TASK, protocol=protocol, **options
        )

    env = sim(2, init_states="train")
    true, imagined = env.reset(seed=3)[0], dream().reset(seed=3)[0]
    assert np.array_equal(true["image"], imagined["image"])
    name = tasks_of("libero_goal")[TASK].name
    pack = export_starts(
        ExportStartsConfig(
            tmp_path / "goal.safetensors", "libero_goal", (name,), 2, SIDE, options={"protocol": "openvla-oft"}
        )
    )
    found = PackStarts(pack)
    assert found.provenance["protocol"]["name"] == "openvla-oft" and found.provenance["versions"]["hf-libero"]
    assert [int(seed) % 1000 for seed in found.seeds] == [0, 1] and set(found.task_ids) == {TASK}
    monkeypatch.setattr("rawdream_env.libero.starts.LiberoWorkers", None)
    packed = dream(starts=str(pack))
    packed.reset(seed=0)
    again, _ = sim(2, settle_steps=10).reset(options={"starts": [packed.start_of(0), packed.start_of(1)]})
    assert np.array_equal(again["image"][1], packed.start_of(1).frame)


@pytest.mark.slow
def test_a_killed_worker_voids_its_episodes_alone(libero, caplog) -> None:
    caplog.set_level(logging.WARNING)
    env = sim(2, num_workers=2, autoreset_mode="SameStep", max_episode_steps=3)
    reference = sim(2, autoreset_mode="SameStep", max_episode_steps=3)
    try:
        first, same = env.reset(seed=0)[0], reference.reset(seed=0)[0]
        assert np.array_equal(first["image"], same["image"]), "workers change nothing"
        os.kill(env._workers._processes[1].pid, signal.SIGKILL)
        actions = np.full((2, 2, 7), 0.5, np.float32)
        here, there = env.step(actions), reference.step(actions)
        assert here[4]["final_info"]["valid"].tolist() == [False, False] and here[3].tolist() == [False, True]
        assert np.array_equal(here[0]["image"][0], there[0]["image"][0])
        assert "libero_goal worker 1 (rows [1], tasks [7]" in caplog.text
        assert env.step(actions)[4]["valid"].all()
    finally:
        env.close()
        reference.close()


@pytest.mark.slow
def test_a_stopped_worker_is_replaced_and_200_episodes_leak_no_descriptor(libero) -> None:
    env = sim(2, num_workers=1, autoreset_mode="SameStep", max_episode_steps=1)
    try:
        env.reset(seed=0)
        (stopped,) = (process.pid for process in env._workers._processes)
        os.kill(stopped, signal.SIGSTOP)
        env._workers._timeout_s = 1.0
        lost = env._workers.step([0, 1], [STILL, STILL]).lost
        assert lost.all()
        wait_until(lambda: gone(stopped))
        env._workers._timeout_s = 300.0
        assert env.reset(seed=0)[1]["valid"].all()
        (worker,) = (process.pid for process in env._workers._processes)

        def held() -> list[int]:
            return [len(os.listdir(f"/proc/{pid}/fd")) for pid in ("self", worker)]

        before = held()
        for _ in range(100):
            assert env.step(np.zeros((2, 2, 7), np.float32))[4]["final_info"]["valid"].all()
        assert held() == before
    finally:
        env.close()


@pytest.mark.slow
def test_rows_of_many_scenes_are_those_of_their_own(libero) -> None:
    """One scene is kept for the rows of three: scenes are built again, and no row notices."""
    options = {"suite": "libero_spatial", "task": "all", "autoreset_mode": "Disabled", "max_episode_steps": 4}
    few, many = (sim(4, max_scenes=kept, **options) for kept in (1, 10))
    try:
        (a, infos), (b, _) = few.reset(seed=3), many.reset(seed=3)
        assert len(set(infos["task_id"])) > 2
        for _ in range(2):
            assert np.array_equal(a["image"], b["image"])
            a, b = (env.step(np.full((4, 2, 7), 0.3, np.float32))[0] for env in (few, many))
        assert np.array_equal(a["image"], b["image"])
    finally:
        few.close()
        many.close()


@pytest.mark.slow
@pytest.mark.parametrize("suite", SUITES)
def test_every_suite_builds_resets_and_steps(libero, suite) -> None:
    scene = LiberoScene(suite, 0, SIDE, 0)
    try:
        start = scene.begin(0, 1, 1)
        step = scene.step(start.state, np.array([SETTLE_ACTION] * 2, np.float32), True)
        assert step.frames.shape == (2, SIDE, SIDE, 3) and step.frames.std() > 10
        assert not step.success_end
    finally:
        scene.close()
