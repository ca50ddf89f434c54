"""The Piper twin: kinematics against the DH table, determinism, expert and play, errors, worker processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from rawdream_env.errors import (
    ClosedEnvironmentError,
    InvalidActionError,
    InvalidOptionError,
    RendererError,
    ResetNeededError,
    SimulatorError,
)
from rawdream_env.piper import geometry as geo
from rawdream_env.piper.relations import OBJECTS, RELATION_NAMES, SHAPES, TASK_NAMES, TASKS, find_task, object_index
from rawdream_env.piper.scene import arm_state
from rawdream_env.piper.simulator import layouts
from rawdream_env.piper.simulator.skills import PlayPolicy, ScriptedExpert
from rawdream_env.piper.simulator.twin import PiperTwin, new_model
from rawdream_env.piper.simulator.view import PiperView
from rawdream_env.piper.simulator.workers import PiperWorkers

STAY = np.array([0, 0, 0, 0, 0, 0, -1.0])


def random_poses(n: int, tilt: float = 0.3) -> np.ndarray:
    rng = np.random.default_rng(0)
    low = np.r_[geo.WORKSPACE_LOW, -tilt, -tilt, geo.RPY_LOW[2], -1]
    return rng.uniform(low, np.r_[geo.WORKSPACE_HIGH, tilt, tilt, geo.RPY_HIGH[2], 1], (n, 7))


@pytest.fixture(scope="module")
def blind() -> PiperTwin:
    return PiperTwin(render=False)


@pytest.fixture(scope="module")
def twin() -> Iterator[PiperTwin]:
    made = PiperTwin()
    yield made
    made.close()


# --- geometry --------------------------------------------------------------------------------------------------------
def test_inverse_kinematics_meets_the_pose_and_the_limits() -> None:
    poses = random_poses(2000, tilt=0.0)
    reached = geo.forward_kinematics(geo.joint_angles(poses, clip=False))
    np.testing.assert_allclose(reached[:, :3, 3], poses[:, :3], atol=1e-9)
    np.testing.assert_allclose(reached[:, :3, :3], geo.tool_rotation(poses), atol=1e-9)
    joints = geo.joint_angles(poses, clip=False)
    within = ((joints >= geo.JOINT_LOW) & (joints <= geo.JOINT_HIGH)).all(axis=1)
    assert within.mean() > 0.95  # the rest: far and high at the edge of joint 5
    assert within[poses[:, 2] < 0.14].mean() > 0.99


def test_model_matches_the_forward_kinematics(blind: PiperTwin) -> None:
    import mujoco

    rng = np.random.default_rng(1)
    model = new_model()
    data = mujoco.MjData(model)
    for joints in rng.uniform(geo.JOINT_LOW, geo.JOINT_HIGH, (20, 6)):
        for i in range(6):
            data.joint(f"joint{i + 1}").qpos[0] = joints[i]
        mujoco.mj_kinematics(model, data)
        np.testing.assert_allclose(data.site("tool").xpos, geo.forward_kinematics(joints)[:3, 3], atol=1e-9)


def test_arm_points_are_the_links_of_the_model(blind: PiperTwin) -> None:
    for pose in random_poses(5, tilt=0.0):
        pose[2] = min(pose[2], 0.12)
        pose[6] = -1.0
        blind.set_scene({"cup": (0.9, 0.0, 0.0)}, pose)
        points = dict(zip(geo.ARM_POINT_NAMES, geo.arm_points(pose), strict=True))
        for name, body in (("elbow", "link3"), ("wrist", "link5"), ("flange", "link6")):
            assert np.linalg.norm(points[name] - blind.data.body(body).xpos) < 0.005
        finger = blind.data.geom("finger_left")
        face = finger.xpos + finger.xmat.reshape(3, 3) @ np.array([0.0, -0.005, 0.044])
        assert np.linalg.norm(points["finger_left"] - face) < 0.006


def test_integrate_action_clips_and_broadcasts() -> None:
    pose = geo.HOME_POSE
    moved = geo.integrate_action(pose, np.array([1, -1, 0.5, 0, 0, 2.0, 1]))
    np.testing.assert_allclose(moved - pose, [0.015, -0.015, 0.0075, 0, 0, 0.15, 2.0])
    far = geo.integrate_actions(np.tile(pose, (3, 1)), np.ones((3, 50, 7)))
    np.testing.assert_allclose(far[:, -1, :6], np.tile(np.r_[geo.WORKSPACE_HIGH, geo.RPY_HIGH], (3, 1)))
    assert geo.integrate_action(pose.astype(np.float32), np.ones(7, np.float32)).dtype == np.float32


def test_projection_agrees_with_the_picture(twin: PiperTwin) -> None:
    twin.set_scene({"red_block": (0.35, 0.08, 0.0)}, geo.HOME_POSE)
    frame = twin.frame().astype(int)
    red = (frame[..., 0] > 120) & (frame[..., 1] < 60)
    rows, columns = np.nonzero(red)
    pixel, depth = geo.project(np.array([0.35, 0.08, 0.018]), 64)
    assert np.hypot(pixel[0] - columns.mean() - 0.5, pixel[1] - rows.mean() - 0.5) < 1.0
    assert depth == pytest.approx(np.linalg.norm(geo.CAMERA_POSITION - [0.35, 0.08, 0.018]), abs=0.02)


# --- twin ------------------------------------------------------------------------------------------------------------
def test_episode_depends_on_seed_and_actions_alone(twin: PiperTwin) -> None:
    actions = np.random.default_rng(0).uniform(-1, 1, (8, 7))
    first = twin.reset(3, task="place_cup")
    frames, state = twin.step_chunk(actions), twin.data.qpos.copy()
    twin.reset(4)
    twin.step_chunk(actions)
    np.testing.assert_array_equal(twin.reset(3, task="place_cup"), first)
    np.testing.assert_array_equal(twin.step_chunk(actions), frames)
    np.testing.assert_array_equal(twin.data.qpos, state)
    assert frames.shape == (8, 64, 64, 3)
    assert frames.dtype == np.uint8
    assert (twin.reset(5, task="place_cup") != first).any()


def test_a_drawn_state_looks_like_the_episode(twin: PiperTwin) -> None:
    twin.reset(3, task="put_spoon")
    twin.step_chunk(np.random.default_rng(0).uniform(-1, 1, (8, 7)))
    arm = np.r_[arm_state(twin.tool_pose(), twin.gripper_opening())[:6], twin.finger_positions()]
    view = PiperView(64)
    np.testing.assert_array_equal(view.draw(twin.object_poses()[None], arm[None])[0], twin.frame())
    view.close()


def test_observations(blind: PiperTwin) -> None:
    blind.reset(0, task="stack_block")
    start = blind.pose
    action = np.array([0.5, -0.5, -1, 0, 0, 0.5, 1])
    assert blind.step(action) is None
    np.testing.assert_allclose(blind.proprio(), geo.integrate_action(start, action), rtol=1e-6)
    assert blind.proprio().dtype == np.float32
    poses = blind.object_poses()
    assert np.isnan(poses).all(axis=1).tolist() == [name not in ("blue_block", "red_block") for name in OBJECTS]
    assert poses[0, 2] == pytest.approx(0.015, abs=1e-3)
    assert blind.tool_pose().shape == (7,)
    assert np.linalg.norm(blind.tool_pose()[:3] - blind.pose[:3]) < 0.02
    for _ in range(8):
        blind.step(np.r_[np.zeros(6), 1.0])
    assert blind.gripper_opening() < 0.001
    assert blind.relations().shape == (len(RELATION_NAMES),)
    assert not blind.success()


def test_layouts_keep_their_promise(blind: PiperTwin) -> None:
    for task in TASKS:
        for seed in range(5):
            blind.reset(seed, task=task.name)
            for name, (x, y, _) in zip((task.object_a, task.object_b), layouts.CANONICAL[task.name], strict=True):
                assert np.abs(blind.object_poses()[object_index(name), :2] - (x, y)).max() < 0.0305
    counts = set()
    for seed in range(25):
        blind.reset(seed)
        poses = blind.object_poses()
        counts.add(len(blind.present))
        xy = poses[~np.isnan(poses[:, 0]), :2]
        gaps = np.linalg.norm(xy[:, None] - xy[None], axis=-1)
        assert gaps[gaps > 0].min() > 0.04
    assert counts == {2, 3, 4}


def test_objects_stay_where_they_stand(blind: PiperTwin) -> None:
    blind.reset(8, task="on:red_block:cup", layout="wide")  # here a cup once fell over by itself
    before = blind.object_poses()
    for _ in range(30):
        blind.step(STAY)
    np.testing.assert_allclose(blind.object_poses(), before, atol=1e-3)


@pytest.mark.parametrize("bad", [np.zeros(6), np.full(7, np.nan), np.full(7, np.inf), np.full(7, 1.5), "text", None])
def test_bad_actions_are_refused(blind: PiperTwin, bad: object) -> None:
    blind.reset(0)
    pose = blind.pose.copy()
    with pytest.raises(InvalidActionError):
        blind.step(bad)
    np.testing.assert_array_equal(blind.pose, pose)


def test_options_are_checked(blind: PiperTwin) -> None:
    with pytest.raises(ResetNeededError):
        PiperTwin(render=False).step(STAY)
    with pytest.raises(RendererError, match="render=True"):
        blind.frame()
    with pytest.raises(InvalidOptionError, match="not both"):
        blind.reset(0, task="place_cup", objects=["cup"])
    with pytest.raises(InvalidOptionError, match="tidy"):
        blind.reset(0, layout="tidy")
    with pytest.raises(InvalidOptionError, match="stove alone"):
        blind.reset(0, objects=["stove"])
    blind.reset(0, objects=["cup", "pot"])
    with pytest.raises(InvalidOptionError, match="name the task"):
        blind.success()


def test_missing_opengl_says_what_to_install() -> None:
    code = "from rawdream_env.piper.simulator.twin import PiperTwin\nPiperTwin(render=False).reset(0)\nPiperTwin().reset(0)"
    env = {**os.environ, "MUJOCO_GL": "glfw", "DISPLAY": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert done.returncode != 0
    assert "RendererError" in done.stderr
    assert "libegl1" in done.stderr


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere mujoco chooses OpenGL itself")
def test_a_library_that_imported_mujoco_earlier_does_not_choose_the_renderer(opengl: None) -> None:
    code = "import mujoco\nfrom rawdream_env.piper.simulator.twin import PiperTwin\nprint(PiperTwin().reset(0).shape)"
    env = {name: value for name, value in os.environ.items() if name not in ("MUJOCO_GL", "DISPLAY")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert done.stdout.strip() == "(64, 64, 3)", done.stderr


# --- expert and play -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("task", [*TASK_NAMES, "in:spoon:pot", "on:cup:red_block"])
def test_expert_succeeds_in_time(blind: PiperTwin, task: str) -> None:
    for seed in (0, 1):
        blind.reset(seed, task=task, layout="wide" if seed else "narrow")
        expert = ScriptedExpert(blind, task, np.random.default_rng(seed), noise=0.1 * seed)
        moved, target = find_task(task).object_a, find_task(task).object_b
        assert not blind.lifted(moved)
        for _ in range(58):
            blind.step(expert.act())
        assert blind.success(task), f"{task} seed {seed}"
        assert blind.lifted(moved) and not blind.lifted(target)
        assert expert.done
        settled = blind.object_poses()
        for _ in range(6):
            blind.step(expert.act())
        np.testing.assert_allclose(blind.object_poses(), settled, atol=2e-3)


def test_expert_needs_its_objects(blind: PiperTwin) -> None:
    blind.reset(0, objects=["cup", "spoon"])
    with pytest.raises(InvalidOptionError, match="needs blue_block and red_block, but the table has spoon, cup"):
        ScriptedExpert(blind, "stack_block", np.random.default_rng(0))


def test_play_moves_things_and_keeps_them_on_the_table(blind: PiperTwin) -> None:
    lifts, skills, outside, objects = 0, set(), 0, 0
    lifted = [i for i, name in enumerate(RELATION_NAMES) if name.startswith("lifted")]
    for seed in range(6):
        blind.reset(seed)
        play = PlayPolicy(blind, np.random.default_rng(seed))
        seen = False
        for t in range(96):
            action = play.act()
            assert action.shape == (7,)
            assert np.abs(action).max() <= 1.0
            blind.step(action)
            skills.add(play.skill)
            seen |= t % 4 == 0 and bool(blind.relations()[lifted].any())
        lifts += seen
        poses = blind.object_poses()
        poses = poses[~np.isnan(poses[:, 0])]
        objects += len(poses)
        outside += int(((np.abs(poses[:, 1]) > 0.22) | (poses[:, 2] < 0)).sum())
    assert lifts >= 5
    assert outside / objects < 0.15
    assert {"pick", "place_on"} <= skills


# --- workers ---------------------------------------------------------------------------------------------------------
def test_rows_are_the_same_in_process_and_in_workers() -> None:
    actions = np.random.default_rng(0).uniform(-1, 1, (3, 8, 7)).astype(np.float32)
    outcomes = []
    for num_workers in (0, 2):
        with PiperWorkers(3, num_workers, layout="wide") as workers:
            frames = workers.reset([0, 1, 2], [5, 6, 7], ["stack_block", None, "place_cup"])
            step = workers.step([2, 0, 1], actions)
            last = workers.step([1], actions[:1], every_frame=False)
            outcomes.append((frames, step.frames, step.success, step.proprio, step.relations, last.frames))
            outcomes[-1] += (workers.proprio([2, 0]), step.lifted)
    for a, b in zip(*outcomes, strict=True):
        np.testing.assert_array_equal(a, b)
    assert outcomes[0][1].shape == (3, 8, 64, 64, 3)
    assert outcomes[0][5].shape == (1, 1, 64, 64, 3)


def test_worker_calls_are_checked() -> None:
    workers = PiperWorkers(2)
    with pytest.raises(ResetNeededError, match=r"rows \[1\]"):
        workers.step([1], np.zeros((1, 8, 7)))
    workers.reset([0, 1], [0, 1], ["stack_block", "place_pot"])
    bad = np.zeros((2, 8, 7))
    bad[1, 3] = np.nan
    with pytest.raises(InvalidActionError, match=r"rows \[1\]"):
        workers.step([0, 1], bad)
    with pytest.raises(InvalidActionError, match=r"\(2, K, 7\)"):
        workers.step([0, 1], np.zeros((1, 8, 7)))
    with pytest.raises(InvalidOptionError, match="distinct numbers from 0 to 1"):
        workers.proprio([2])
    workers.close()
    workers.close()
    with pytest.raises(ClosedEnvironmentError):
        workers.proprio([0])


def test_a_dead_worker_is_named() -> None:
    workers = PiperWorkers(3, num_workers=2)
    workers.reset([0, 1, 2], [0, 1, 2], [None] * 3)
    pids = [process.pid for process in workers._processes]
    os.kill(pids[1], signal.SIGKILL)
    with pytest.raises(SimulatorError, match=r"worker 1 \(rows \[1\], exit code -9\)"):
        workers.step([0, 1, 2], np.zeros((3, 8, 7)))
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    workers.close()


def test_shapes_rest_on_the_table(blind: PiperTwin) -> None:
    for name in OBJECTS[:3]:
        blind.reset(0, objects=[name])
        assert blind.object_poses()[object_index(name), 2] == pytest.approx(SHAPES[name].half[2], abs=5e-4)
