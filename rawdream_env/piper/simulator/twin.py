"""MuJoCo simulation of the Piper tabletop.

10 Hz control, 4 ms physics. An action moves a commanded tool pose (``geometry.integrate_action``), closed-form
inverse kinematics turns it into joint targets and position servos follow, so the arm lags the command by about 7 mm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# Before mujoco, whose OpenGL backend it chooses.
from rawdream_env.piper.simulator.renderer import PiperRenderer, new_model  # isort: skip

import mujoco
import numpy as np
from numpy.typing import NDArray

from rawdream_env.errors import InvalidActionError, InvalidOptionError, RendererError, ResetNeededError, SimulatorError
from rawdream_env.piper import geometry as geo
from rawdream_env.piper.relations import MOVABLE, OBJECTS, SHAPES, BoolArray, Task, find_task, relation_index, relations
from rawdream_env.piper.simulator import layouts
from rawdream_env.piper.simulator.model import TIMESTEP
from rawdream_env.robots import LIFT_RISE
from rawdream_env.seeding import mix
from rawdream_env.types import ACTION_DIM, Float32Array, UInt8Array

FloatArray = NDArray[np.floating[Any]]

_SUBSTEPS = round(1.0 / geo.CONTROL_HZ / TIMESTEP)
SERVO_KNOTS = 5
"""The joint target moves in this many equal parts during a control step."""
_SETTLE_STEPS = 40
_WHOLE_STATE = mujoco.mjtState.mjSTATE_INTEGRATION
_ACTION_LIMIT = 1.0 + 1e-4
_FINGER_CLOSED = -0.005
"""Target of a closed finger (m): beyond contact, so that the servo keeps squeezing."""


def _numbers(action: Any) -> FloatArray:
    try:
        return np.asarray(action, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InvalidActionError(f"an action must be numbers of shape (..., {ACTION_DIM}): {error}.") from error


@dataclass(frozen=True)
class TwinState:
    """The complete state of an episode: with equal actions, equal states have equal futures."""

    physics: FloatArray
    warnings: int
    present: tuple[str, ...]
    task: Task | None
    pose: FloatArray
    joints: FloatArray
    heights: FloatArray


class PiperTwin:
    """The simulated tabletop: seven objects, of which an episode shows two to four.

    Args:
        image_size: side of the square picture in pixels.
        render: False makes a twin that cannot draw and needs no OpenGL.
        renderer: share this one instead of opening another (then ``close`` leaves it open).

    An episode depends only on the arguments of ``reset`` and the actions, never on what the twin did before.
    """

    def __init__(self, image_size: int = 64, render: bool = True, renderer: PiperRenderer | None = None) -> None:
        geo.check_image_size(image_size)
        self._renderer = renderer or (PiperRenderer(image_size) if render else None)
        self._owns_renderer = renderer is None
        self.image_size = self._renderer.image_size if self._renderer else image_size
        self.model = new_model()
        self.data = mujoco.MjData(self.model)
        self._scratch = mujoco.MjData(self.model)
        model = self.model
        self._arm_qpos = np.array([model.joint(f"joint{i}").qposadr[0] for i in range(1, 7)])
        self._arm_dofs = np.array([model.joint(f"joint{i}").dofadr[0] for i in range(1, 7)])
        self._finger_qpos = np.array([model.joint(n).qposadr[0] for n in ("finger_left", "finger_right")])
        self._tool = model.site("tool").id
        self._bodies = [model.body(name).id for name in OBJECTS]
        self._geoms = [np.flatnonzero(model.geom_bodyid == body) for body in self._bodies]
        self._collides = [(model.geom_contype[g].copy(), model.geom_conaffinity[g].copy()) for g in self._geoms]
        self._joints: FloatArray = np.zeros(6)
        self.present: tuple[str, ...] = ()
        self.task: Task | None = None
        self.pose: FloatArray = geo.HOME_POSE.copy()
        """Commanded tool pose (7,): xyz, roll pitch yaw, gripper command."""
        self._heights: FloatArray = np.zeros((2, len(OBJECTS)))
        """Of the objects' origins (m): at the start, and the highest after any control step."""

    # --- episode -----------------------------------------------------------------------------------------------------
    def reset(
        self, seed: int, *, task: str | Task | None = None, objects: Sequence[str] | None = None, layout: str = "narrow"
    ) -> UInt8Array:
        """Begin an episode.

        Args:
            seed: any integer; the same seed and options give the same scene.
            task: a task (or ``on:a:b`` / ``in:a:b`` relation) whose two objects lie on the table.
            objects: free play with these objects, laid out at random. With neither, 2 to 4 objects are drawn.
            layout: "narrow" (each object within 3 cm and 0.3 rad of its canonical place) or "wide" (whole workspace).

        Returns:
            The first frame uint8 (H, W, 3); zeros when made with ``render=False``.

        Raises:
            InvalidOptionError: unknown task, object or layout.
        """
        layouts.check_layout(layout)
        if task is not None and objects is not None:
            raise InvalidOptionError("give reset either task= or objects=, not both.")
        rng = np.random.default_rng(mix(int(seed), 0x7AB1E))
        self.task = None if task is None else find_task(task)
        if self.task is not None:
            places = layouts.sample_task_layout(self.task, layout, rng)
        else:
            chosen = layouts.sample_play_objects(rng) if objects is None else layouts.check_objects(objects)
            places = layouts.sample_wide_layout(chosen, rng)
        return self.set_scene(places, layouts.sample_tool(rng))

    def set_scene(self, places: dict[str, layouts.Pose2D], pose: FloatArray) -> UInt8Array:
        """Put objects at (x, y, yaw) on the table and the tool at a commanded pose (7,); returns the first frame."""
        mujoco.mj_resetData(self.model, self.data)
        self.present = tuple(name for name in OBJECTS if name in places)
        for i, name in enumerate(OBJECTS):
            self._place(i, name, places.get(name))
        self.pose = np.array(pose, dtype=np.float64)
        self._joints = geo.joint_angles(self.pose)
        self.data.qpos[self._arm_qpos] = self._joints
        self.data.qpos[self._finger_qpos] = geo.finger_opening(self.pose[6]) / 2
        self.data.ctrl[:6] = self._joints
        self.data.ctrl[6:] = self._finger_target(self.pose[6])
        mujoco.mj_step(self.model, self.data, nstep=_SETTLE_STEPS)
        self.data.time = 0.0
        self._refresh()
        self._heights = np.tile(self.data.xpos[self._bodies, 2], (2, 1))
        return self.frame() if self._renderer else self._blank()

    def pose_scene(self, poses: FloatArray, arm: FloatArray) -> None:
        """Show a state, to be drawn and not to be continued from: object poses (7, 7), NaN for absent ones, and the arm (8,):
        tool xyz, roll pitch yaw, positions of the fingers.
        """
        mujoco.mj_resetData(self.model, self.data)
        self.present = ()
        for i, (name, pose) in enumerate(zip(OBJECTS, poses, strict=True)):
            self._place(i, name, None)
            if np.isfinite(pose).all():
                self._set_pose(i, name, pose)
        self.data.qpos[self._arm_qpos] = geo.joint_angles(np.append(arm[:6], 0.0))
        self.data.qpos[self._finger_qpos] = arm[6:]
        self._refresh()

    def _place(self, i: int, name: str, place: layouts.Pose2D | None) -> None:
        here = place is not None
        self._set_collisions(i, here)
        x, y, yaw = place if place is not None else (-2.0, 0.3 * i, 0.0)
        z = SHAPES[name].half[2] + (0.0 if name == "stove" else 0.0005) if here else -1.0
        self._set_pose(i, name, (x, y, z, np.cos(yaw / 2), 0.0, 0.0, np.sin(yaw / 2)))

    def _set_pose(self, i: int, name: str, pose: Sequence[float] | FloatArray) -> None:
        if name == "stove":
            mocap = self.model.body_mocapid[self._bodies[i]]
            self.data.mocap_pos[mocap], self.data.mocap_quat[mocap] = pose[:3], pose[3:]
        else:
            at = self.model.joint(name).qposadr[0]
            self.data.qpos[at : at + 7] = pose

    def _set_collisions(self, i: int, here: bool) -> None:
        contype, conaffinity = self._collides[i]
        self.model.geom_contype[self._geoms[i]] = contype if here else 0
        self.model.geom_conaffinity[self._geoms[i]] = conaffinity if here else 0
        # A parked object hovers, so it costs and changes nothing.
        self.model.body_gravcomp[self._bodies[i]] = 0.0 if here else 1.0

    def step(self, action: Any, render: bool = True) -> UInt8Array | None:
        """One control step (0.1 s).

        Args:
            action: (7,) in [-1, 1]: delta xyz, delta roll pitch yaw, gripper (-1 open, +1 close).
            render: False skips the picture.

        Returns:
            The frame uint8 (H, W, 3) after the step, or None when not rendered.

        Raises:
            InvalidActionError: wrong shape, out of range or not finite.
            ResetNeededError: no episode yet.
            SimulatorError: the physics diverged.
        """
        act = _numbers(action)
        if act.shape != (ACTION_DIM,) or not np.isfinite(act).all() or np.abs(act).max() > _ACTION_LIMIT:
            raise InvalidActionError(
                f"action of shape {act.shape} with values {np.array2string(act.ravel()[:8], precision=3)} is not a "
                f"finite ({ACTION_DIM},) vector in [-1, 1]; clip it to the action space."
            )
        if not self.present:
            raise ResetNeededError("step() was called before reset(); call reset() first.")
        self.pose = geo.integrate_action(self.pose, act)
        before, self._joints = self._joints, self._solve(self._joints)
        data = self.data
        data.ctrl[6:] = self._finger_target(self.pose[6])
        for k in range(1, SERVO_KNOTS + 1):
            data.ctrl[:6] = before + (self._joints - before) * (k / SERVO_KNOTS)
            mujoco.mj_step(self.model, data, nstep=_SUBSTEPS // SERVO_KNOTS)
        self._after_physics()
        return self.frame() if render and self._renderer else None

    def step_chunk(self, actions: Any) -> UInt8Array:
        """K control steps: ``actions`` (K, 7) -> frames uint8 (K, H, W, 3)."""
        acts = _numbers(actions)
        if acts.ndim != 2 or acts.shape[1] != ACTION_DIM or not len(acts):
            raise InvalidActionError(f"a chunk must have shape (K, {ACTION_DIM}), got {acts.shape}.")
        frames = [self.step(action) for action in acts]
        return np.stack([self._blank() if frame is None else frame for frame in frames])

    def drive(self, joints: FloatArray, gripper: float, substeps: int) -> None:
        """Physics alone, for a fake arm that is sent joint angles: servo targets (6,) in radians and a gripper command, held
        for ``substeps`` of 4 ms. ``pose`` stays as it is.
        """
        self.data.ctrl[:6], self.data.ctrl[6:] = joints, self._finger_target(gripper)
        mujoco.mj_step(self.model, self.data, nstep=substeps)
        self._after_physics()

    def _after_physics(self) -> None:
        data = self.data
        self._refresh()
        if data.warning[mujoco.mjtWarning.mjWARN_BADQACC].number or not np.isfinite(data.qpos).all():
            raise SimulatorError(f"the physics diverged at t = {data.time:.2f} s; reset with another seed.")
        np.maximum(self._heights[1], data.xpos[self._bodies, 2], out=self._heights[1])

    # --- what can be observed ----------------------------------------------------------------------------------------
    def frame(self) -> UInt8Array:
        """What the camera sees now, uint8 (H, W, 3)."""
        if self._renderer is None:
            raise RendererError(
                "this PiperTwin was created with render=False; create one with render=True to draw frames."
            )
        return self._renderer.draw(self.data)

    def proprio(self) -> Float32Array:
        """Commanded tool pose, float32 (7,)."""
        return self.pose.astype(np.float32)

    def object_poses(self) -> FloatArray:
        """(7, 7): xyz (m) and quaternion wxyz of ``OBJECTS``; NaN rows for absent ones."""
        poses = np.full((len(OBJECTS), 7), np.nan)
        for i, name in enumerate(OBJECTS):
            if name in self.present:
                poses[i, :3] = self.data.xpos[self._bodies[i]]
                poses[i, 3:] = self.data.xquat[self._bodies[i]]
        return poses

    def joint_positions(self) -> FloatArray:
        """Measured joint angles (6,) in radians."""
        return np.array(self.data.qpos[self._arm_qpos])

    def gripper_opening(self) -> float:
        """Measured distance between the finger faces (m)."""
        return float(self.data.qpos[self._finger_qpos].sum())

    def finger_positions(self) -> FloatArray:
        """Measured positions (2,) of the left and the right finger (m); their sum is the opening."""
        return np.asarray(self.data.qpos[self._finger_qpos])

    def object_velocities(self) -> FloatArray:
        """(7, 6): linear (m/s) and angular (rad/s) velocity of ``OBJECTS`` in the world frame; zeros for absent ones."""
        velocities = np.zeros((len(OBJECTS), 6))
        for i, name in enumerate(OBJECTS):
            if name in self.present and name in MOVABLE:
                at = self.model.joint(name).dofadr[0]
                rotation = self.data.xmat[self._bodies[i]].reshape(3, 3)
                velocities[i, :3] = self.data.qvel[at : at + 3]
                velocities[i, 3:] = rotation @ self.data.qvel[at + 3 : at + 6]
        return velocities

    def tool_pose(self) -> FloatArray:
        """Measured tool pose (7,): xyz (m) and quaternion wxyz."""
        quat = np.zeros(4)
        mujoco.mju_mat2Quat(quat, self.data.site_xmat[self._tool])
        return np.concatenate([self.data.site_xpos[self._tool], quat])

    def relations(self) -> BoolArray:
        """Bool (R,) in the order of ``relations.RELATION_NAMES``."""
        return relations(self.object_poses(), self.gripper_opening(), self.data.site_xpos[self._tool])

    def success(self, task: str | Task | None = None) -> bool:
        """Whether a task's relation holds now (default: the task of this episode)."""
        goal = self.task if task is None else find_task(task)
        if goal is None:
            raise InvalidOptionError("this episode is free play; name the task to check.")
        return bool(self.relations()[relation_index(goal.relation)])

    def lifted(self, name: str) -> bool:
        """Whether an object has been ``robots.LIFT_RISE`` above its start after any control step of this episode."""
        start, highest = self._heights[:, OBJECTS.index(name)]
        return bool(highest - start >= LIFT_RISE)

    def close(self) -> None:
        """Free the renderer. Closing again does nothing."""
        if self._renderer is not None and self._owns_renderer:
            self._renderer.close()

    # --- state -------------------------------------------------------------------------------------------------------
    def state(self) -> TwinState:
        """The state now; ``restore`` takes it, in this twin or another."""
        physics = np.empty(mujoco.mj_stateSize(self.model, _WHOLE_STATE))
        mujoco.mj_getState(self.model, self.data, physics, _WHOLE_STATE)
        warnings = int(self.data.warning[mujoco.mjtWarning.mjWARN_BADQACC].number)
        return TwinState(
            physics, warnings, self.present, self.task, self.pose.copy(), self._joints.copy(), self._heights.copy()
        )

    def restore(self, state: TwinState) -> None:
        """Continue from ``state``; frames and later states are bit-identical."""
        self.present, self.task = state.present, state.task
        self.pose, self._joints = state.pose.copy(), state.joints.copy()
        self._heights = state.heights.copy()
        mujoco.mj_resetData(self.model, self.data)
        for i, name in enumerate(OBJECTS):
            self._set_collisions(i, name in state.present)
        mujoco.mj_setState(self.model, self.data, state.physics, _WHOLE_STATE)
        self.data.warning[mujoco.mjtWarning.mjWARN_BADQACC].number = state.warnings
        self._refresh()

    def __getstate__(self) -> dict[str, Any]:
        """The state and the options; the MuJoCo objects are made again."""
        options = {"image_size": self.image_size, "render": False, "renderer": self._renderer}
        return {"options": options, "owns_renderer": self._owns_renderer, "state": self.state()}

    def __setstate__(self, pickled: dict[str, Any]) -> None:
        """A twin in the pickled state."""
        self.__init__(**pickled["options"])  # type: ignore[misc]
        self._owns_renderer = pickled["owns_renderer"]
        self.restore(pickled["state"])

    # --- inside ------------------------------------------------------------------------------------------------------
    def _blank(self) -> UInt8Array:
        return np.zeros((self.image_size, self.image_size, 3), np.uint8)

    @staticmethod
    def _finger_target(command: float) -> float:
        return _FINGER_CLOSED + (1.0 - command) / 2.0 * (geo.MAX_OPENING / 2 - _FINGER_CLOSED)

    def _refresh(self) -> None:
        """Positions after a step belong to the step's beginning; bring them up to date."""
        mujoco.mj_kinematics(self.model, self.data)
        mujoco.mj_camlight(self.model, self.data)

    def _solve(self, start: FloatArray) -> FloatArray:
        """Joint targets for the commanded pose: closed form, or the nearest reachable pose where limits bite."""
        joints = geo.joint_angles(self.pose, clip=False)
        if ((joints >= geo.JOINT_LOW) & (joints <= geo.JOINT_HIGH)).all() and np.abs(joints - start).max() < 0.6:
            return joints
        model, scratch = self.model, self._scratch
        target = geo.tool_rotation(self.pose)
        jac_pos, jac_rot = np.zeros((3, model.nv)), np.zeros((3, model.nv))
        for _ in range(6):  # damped least squares, position before direction
            scratch.qpos[self._arm_qpos] = start
            mujoco.mj_kinematics(model, scratch)
            mujoco.mj_comPos(model, scratch)
            turn = target @ scratch.site_xmat[self._tool].reshape(3, 3).T
            quat, rotvec = np.zeros(4), np.zeros(3)
            mujoco.mju_mat2Quat(quat, turn.ravel())
            mujoco.mju_quat2Vel(rotvec, quat, 1.0)
            mujoco.mj_jacSite(model, scratch, jac_pos, jac_rot, self._tool)
            jac = np.vstack([jac_pos[:, self._arm_dofs], 0.1 * jac_rot[:, self._arm_dofs]])
            error = np.concatenate([self.pose[:3] - scratch.site_xpos[self._tool], 0.1 * rotvec])
            move = jac.T @ np.linalg.solve(jac @ jac.T + 1e-4 * np.eye(6), error)
            start = np.clip(start + np.clip(move, -0.3, 0.3), geo.JOINT_LOW, geo.JOINT_HIGH)
        return start
