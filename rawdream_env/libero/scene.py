"""One LIBERO scene in hf-libero's own environment, shared by the rows of a process and by the tasks of the scene.

Building an environment takes seconds and hundreds of megabytes, so a process builds each scene once and switches rows in and
out: a row is a :class:`SceneState`. Tasks that differ in their goal alone (all ten of ``libero_goal``) are tasks of one scene.
States and pictures are bit-equal to those of an environment of the row's own.
"""

from __future__ import annotations

import atexit
import json
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rawdream_env.errors import DatasetError, RendererError, SimulatorError
from rawdream_env.libero.init_states import load_init_states
from rawdream_env.libero.install import import_simulator, tasks_of
from rawdream_env.libero.protocols import SETTLE_ACTION
from rawdream_env.types import Float32Array, UInt8Array

_CAMERA = "agentview"
_GOAL = ("goal_state", "language_instruction", "obj_of_interest")
_PLACEMENTS = 20
"""How often the simulator may try to place the objects."""
_KEPT_STARTS = 64
"""Settled starts that a scene remembers: the episodes of a group begin alike."""


@dataclass(frozen=True)
class SceneState:
    """All that the future of a row depends on. The controller's measurements are part of it: the first control step after an
    initial state uses those of the reset before.
    """

    task: int
    physics: NDArray[np.float64]
    controller: dict[str, Any]
    gripper: NDArray[np.float64]
    camera_clock: tuple[float, bool]
    clock: tuple[float, int]


@dataclass(frozen=True)
class SceneStart:
    """A settled initial state: ``frame`` uint8 (H, W, 3); ``proprio`` float32 (8,): gripper position xyz in metres and
    axis-angle, both finger positions.
    """

    state: SceneState
    frame: UInt8Array
    proprio: Float32Array


@dataclass(frozen=True)
class SceneStep:
    """``frames`` uint8 (K, H, W, 3), or (1, H, W, 3); ``proprio`` float32 (K, 8); ``success_any``: the goal held after some
    control step; ``success_end``: after the last one.
    """

    state: SceneState
    frames: UInt8Array
    proprio: Float32Array
    success_any: bool
    success_end: bool


@dataclass(frozen=True)
class SceneTruth:
    """What is behind a picture, in metres in the world's frame: ``gripper`` (3,), the point between the finger tips;
    ``opening`` between the fingers; ``bodies``: name -> position (3,); ``sites``, likewise; ``joints``: name of a hinge or
    slide -> radians or metres.
    """

    gripper: NDArray[np.float64]
    opening: float
    bodies: dict[str, NDArray[np.float64]]
    sites: dict[str, NDArray[np.float64]]
    joints: dict[str, float]


@lru_cache(maxsize=256)
def scene_of(suite: str, task: int) -> str:
    """All that makes up the scene of a task; equal for tasks that differ in their goal alone."""
    return json.dumps({key: value for key, value in _problem(suite, task).items() if key not in _GOAL})


def _problem(suite: str, task: int) -> dict[str, Any]:
    import_simulator()
    from libero.libero.envs.bddl_utils import robosuite_parse_problem

    problem: dict[str, Any] = robosuite_parse_problem(str(tasks_of(suite)[task].bddl))
    return problem


class LiberoScene:
    """The environment of a task and of all others with the same scene.

    Args:
        suite: such as "libero_goal".
        task: number of one of its tasks.
        image_size: side of the pictures in pixels.
        scene_seed: seed of the furniture's places.

    Raises:
        MissingDependencyError, MissingAssetsError: hf-libero or its assets are not here. RendererError: no OpenGL.
        SimulatorError: the objects cannot be placed. DatasetError: the initial states are damaged.
    """

    def __init__(self, suite: str, task: int, image_size: int, scene_seed: int) -> None:
        envs = import_simulator()
        import mujoco

        self._mujoco = mujoco
        self._what = int(mujoco.mjtState.mjSTATE_INTEGRATION)
        self._suite, self._tasks = suite, tasks_of(suite)
        self._goals: dict[int, Any] = {}
        self._init_states: dict[int, NDArray[np.float64]] = {}
        self._task = task
        with _own_random_state(), _renderer_errors():
            self._env = envs.OffScreenRenderEnv(
                bddl_file_name=str(self._tasks[task].bddl),
                camera_names=[_CAMERA],
                camera_heights=image_size,
                camera_widths=image_size,
                ignore_done=True,  # the horizon is ours
            )
            atexit.register(self.close)  # before OpenGL ends, which has registered its own hook
            self._base = self._env.env
            self._env.seed(scene_seed)
            self._place()
        self._context = self._base.sim._render_context_offscreen
        for name, observable in self._base._observables.items():
            observable._enabled = name == f"{_CAMERA}_image"  # the others are not asked for
        self._camera = self._base._observables[f"{_CAMERA}_image"]
        look = partial(self._look)
        look.__modality__ = "image"  # type: ignore[attr-defined]
        self._sensor, self._camera._sensor = self._camera._sensor, look
        self._wanted = False
        self._fresh = self._capture()
        self._starts: OrderedDict[tuple[int, int, int], SceneStart] = OrderedDict()

    def begin(self, task: int, number: int, settle_steps: int) -> SceneStart:
        """Initial state ``number`` of a task after ``settle_steps`` control steps."""
        key = task, number, settle_steps
        if key not in self._starts:
            self._starts[key] = self._settle(*key)
            if len(self._starts) > _KEPT_STARTS:
                self._starts.popitem(last=False)
        self._starts.move_to_end(key)
        return self._starts[key]

    def step(self, state: SceneState, actions: Float32Array, every_frame: bool) -> SceneStep:
        """Carry out ``actions`` (K, 7) from ``state``."""
        self._load(state)
        frames, proprio, done, success = [], [], False, False
        for k, action in enumerate(actions):
            self._wanted = every_frame or k == len(actions) - 1
            observation, _, done, _ = self._base.step(action)
            success = success or bool(done)
            proprio.append(self._proprio())
            if self._wanted:
                frames.append(_upright(observation))
        return SceneStep(self._capture(), np.stack(frames), np.stack(proprio), success, bool(done))

    def truth(self, state: SceneState) -> SceneTruth:
        """What is behind the picture of a state, read without touching the simulation."""
        mujoco, model, robot = self._mujoco, self._base.sim.model._model, self._base.robots[0]
        data = mujoco.MjData(model)
        mujoco.mj_setState(model, data, state.physics, self._what)
        mujoco.mj_kinematics(model, data)

        def named(kind: int, count: int, positions: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
            return {mujoco.mj_id2name(model, kind, i): positions[i].copy() for i in range(count)}

        joints = [j for j in range(model.njnt) if model.jnt_type[j] != mujoco.mjtJoint.mjJNT_FREE]
        left, right = data.qpos[robot._ref_gripper_joint_pos_indexes]
        return SceneTruth(
            data.site_xpos[robot.eef_site_id].copy(),
            float(left - right),
            named(mujoco.mjtObj.mjOBJ_BODY, model.nbody, data.xpos),
            named(mujoco.mjtObj.mjOBJ_SITE, model.nsite, data.site_xpos),
            {model.joint(j).name: float(data.qpos[model.jnt_qposadr[j]]) for j in joints},
        )

    def check_success(self) -> bool:
        """What hf-libero says about the state that was stepped last."""
        return bool(self._env.check_success())

    def close(self) -> None:
        """Free the simulator and its OpenGL context. Closing again does nothing."""
        if self._env is not None:
            atexit.unregister(self.close)
            self._context.gl_ctx.make_current()
            self._env.close()
            self._env = self._base = self._context = self._camera = self._sensor = None

    # --- inside ------------------------------------------------------------------------------------------------------
    def _place(self) -> None:
        """Reset; hf-libero's own loop around this never ends when the objects cannot be placed."""
        from robosuite.utils.errors import RandomizationError

        for _ in range(_PLACEMENTS):
            try:
                self._base.reset()
            except RandomizationError:
                continue
            return
        name = self._tasks[self._task].name
        raise SimulatorError(f"the objects of {name} could not be placed in {_PLACEMENTS} attempts.")

    def _settle(self, task: int, number: int, settle_steps: int) -> SceneStart:
        flat = self._initial(task, number)
        self._load(replace(self._fresh, task=task))
        self._wanted = not settle_steps
        observation = self._env.set_init_state(flat)
        for k in range(settle_steps):
            self._wanted = k == settle_steps - 1
            observation = self._base.step(SETTLE_ACTION)[0]
        return SceneStart(self._capture(), _upright(observation), self._proprio())

    def _initial(self, task: int, number: int) -> NDArray[np.float64]:
        """A flat initial state that fits the scene."""
        name, model = self._tasks[task].name, self._base.sim.model
        if task not in self._init_states:
            self._init_states[task] = load_init_states(self._suite, self._tasks[task])
        states, size = self._init_states[task], 1 + model.nq + model.nv
        if not 0 <= number < len(states):
            raise DatasetError(
                f"{name} has {len(states)} initial states, so there is no number {number}. The last three digits of a "
                "start's seed are the number of its initial state."
            )
        if states.shape[1] != size:
            raise DatasetError(
                f"the initial states of {name} have {states.shape[1]} numbers, its scene has {size}; install hf-libero again."
            )
        flat: NDArray[np.float64] = states[number]
        return flat

    def _look(self, cache: Any) -> Any:
        """The camera, which draws only what is asked for."""
        if not self._wanted:
            return np.zeros(())
        self._context.gl_ctx.make_current()  # another scene may have drawn last
        image = self._sensor(cache)
        if error := self._mujoco.mjr_getError():
            raise RendererError(
                f"OpenGL error {error} while drawing {self._tasks[self._task].name}: memory ran out, or its context was freed. "
                "Create a new environment, and run hf-libero's own environments in other processes."
            )
        return image

    def _capture(self) -> SceneState:
        sim, robot = self._base.sim, self._base.robots[0]
        physics = np.empty(self._mujoco.mj_stateSize(sim.model._model, self._what))
        self._mujoco.mj_getState(sim.model._model, sim.data._data, physics, self._what)
        return SceneState(
            self._task,
            physics,
            {
                name: copy(value)
                for name, value in vars(robot.controller).items()
                if isinstance(value, np.ndarray | bool)
            },
            np.array(robot.gripper.current_action),
            (self._camera._time_since_last_sample, self._camera._sampled),
            (self._base.cur_time, self._base.timestep),
        )

    def _load(self, state: SceneState) -> None:
        self._task = state.task
        if state.task not in self._goals:
            self._goals[state.task] = {key: _problem(self._suite, state.task)[key] for key in _GOAL}
        self._base.parsed_problem.update(self._goals[state.task])
        sim, robot = self._base.sim, self._base.robots[0]
        self._mujoco.mj_setState(sim.model._model, sim.data._data, state.physics, self._what)
        vars(robot.controller).update({name: copy(value) for name, value in state.controller.items()})
        robot.gripper.current_action = state.gripper.copy()
        self._camera._time_since_last_sample, self._camera._sampled = state.camera_clock
        self._base.cur_time, self._base.timestep = state.clock
        self._base._post_process()  # what is shown of the state, such as the glow of a stove

    def _proprio(self) -> Float32Array:
        from robosuite.utils.transform_utils import quat2axisangle

        sim, robot = self._base.sim, self._base.robots[0]
        quat = sim.data.get_body_xquat(robot.robot_model.eef_name)[[1, 2, 3, 0]]
        fingers = sim.data.qpos[robot._ref_gripper_joint_pos_indexes]
        return np.concatenate([sim.data.site_xpos[robot.eef_site_id], quat2axisangle(quat), fingers]).astype(np.float32)


def _upright(observation: Any) -> UInt8Array:
    """The camera's picture, which comes upside down."""
    image: UInt8Array = np.ascontiguousarray(observation[f"{_CAMERA}_image"][::-1, ::-1])
    return image


@contextmanager
def _own_random_state() -> Iterator[None]:
    """hf-libero draws from numpy's global generator; put it back afterwards."""
    before = np.random.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(before)  # noqa: NPY002


@contextmanager
def _renderer_errors() -> Iterator[None]:
    try:
        yield
    except (ImportError, RuntimeError, AttributeError) as error:  # each OpenGL backend fails in its own way
        if "GL" not in f"{error} {type(error).__name__}" and "Mesa" not in str(error):
            raise
        raise RendererError(
            f"no OpenGL renderer for LIBERO ({type(error).__name__}: {str(error)[:200]}); install libegl1 libgles2, or "
            "libosmesa6 with MUJOCO_GL=osmesa."
        ) from error
