"""The AgileX Piper on its table, as numbers: limits, kinematics, commanded pose and camera.

Pure numpy, no simulator. The MuJoCo twin, the real arm and the world model's arm map all use these functions, so a
commanded pose means the same thing everywhere. World frame: x away from the base, y to the right *in the picture*
(the camera looks back at the arm), z up; metres and radians. The origin lies on the table under the base axis.

A commanded pose is ``(..., 7)``: tool x, y, z (m), roll, pitch, yaw (rad, zero = gripper pointing straight down,
fingers opening along y), gripper command in [-1, 1] (-1 open, +1 closed).

Joint conventions and link lengths are those of the manufacturer's forward kinematics (modified DH).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from rawdream_env.errors import InvalidOptionError

FloatArray = NDArray[np.floating[Any]]

# --- the arm -------------------------------------------------------------------------------------------------------
BASE_HEIGHT: Final = 0.1
"""Riser under the arm (m). Without it joint 5 (+-70 degrees) cannot point the gripper down above z = 0.15."""
DH_A: Final = (0.0, 0.0, 0.28503, -0.02198, 0.0, 0.0)
DH_ALPHA: Final = (0.0, -np.pi / 2, 0.0, np.pi / 2, -np.pi / 2, np.pi / 2)
DH_THETA: Final = (0.0, np.deg2rad(-172.22), np.deg2rad(-102.78), 0.0, 0.0, 0.0)
DH_D: Final = (0.123, 0.0, 0.0, 0.25075, 0.0, 0.091)
JOINT_LOW: Final[NDArray[np.float64]] = np.array([-2.6179, 0.0, -2.967, -1.745, -1.22, -2.0944])
JOINT_HIGH: Final[NDArray[np.float64]] = np.array([2.6179, 3.14, 0.0, 1.745, 1.22, 2.0944])
TCP_OFFSET: Final = 0.125
"""Tool point past the flange along the tool axis (m)."""
FINGER_OVERHANG: Final = 0.008
"""The fingertips reach this far beyond the tool point (m)."""
MAX_OPENING: Final = 0.072
"""Widest distance between the finger faces (m)."""

# --- what an action does -------------------------------------------------------------------------------------------
CONTROL_HZ: Final = 10.0
DPOS: Final = 0.015
"""Metres per control step at action 1."""
DROT: Final = 0.15
"""Radians per control step at action 1."""
WORKSPACE_LOW: Final[NDArray[np.float64]] = np.array([0.17, -0.20, 0.010])
WORKSPACE_HIGH: Final[NDArray[np.float64]] = np.array([0.40, 0.20, 0.20])
RPY_LOW: Final[NDArray[np.float64]] = np.array([-0.3, -0.3, -1.6])
RPY_HIGH: Final[NDArray[np.float64]] = np.array([0.3, 0.3, 1.6])
HOME_POSE: Final[NDArray[np.float64]] = np.array([0.26, 0.0, 0.16, 0.0, 0.0, 0.0, -1.0])

# --- the camera ----------------------------------------------------------------------------------------------------
CAMERA_POSITION: Final[NDArray[np.float64]] = np.array([0.80, 0.0, 0.50])
CAMERA_XYAXES: Final = (0.0, 1.0, 0.0, -0.66, 0.0, 0.75)
"""Camera right and up axes in the world (up not normalised), as MuJoCo takes them."""
CAMERA_FOVY: Final = 33.0
"""Vertical field of view in degrees."""

ARM_POINT_NAMES: Final = ("base", "shoulder", "elbow", "wrist", "flange", "tool", "finger_left", "finger_right")
"""What ``arm_points`` returns along its second-last axis."""

_SHOULDER_Z = BASE_HEIGHT + DH_D[0]
_UPPER = DH_A[2]
FOREARM = float(np.hypot(DH_A[3], DH_D[3]))
_FOREARM_BEND = float(np.arctan2(-DH_A[3], DH_D[3]))
_TOOL_LENGTH = DH_D[5] + TCP_OFFSET
_DH_THETA, _DH_COS, _DH_SIN = np.array(DH_THETA), np.cos(DH_ALPHA), np.sin(DH_ALPHA)
_LINKS = np.zeros((6, 4, 4))
"""What a joint's angle does not change of its link's transform."""
_LINKS[:, 0, 3], _LINKS[:, 3, 3] = DH_A, 1.0
_LINKS[:, 1, 2], _LINKS[:, 1, 3] = -_DH_SIN, -_DH_SIN * DH_D
_LINKS[:, 2, 2], _LINKS[:, 2, 3] = _DH_COS, _DH_COS * DH_D
_BASE, _TOOL = np.eye(4), np.eye(4)
_BASE[2, 3], _TOOL[2, 3] = BASE_HEIGHT, TCP_OFFSET
_DOWN = np.diag([-1.0, 1.0, -1.0])  # tool frame at rpy 0; the other choice, diag(1, -1, -1), saturates joint 6


def integrate_action(pose: FloatArray, action: FloatArray) -> FloatArray:
    """Move a commanded pose by one action.

    Args:
        pose: ``(..., 7)`` commanded pose.
        action: ``(..., 7)`` in [-1, 1] (clipped): delta xyz, delta roll/pitch/yaw, gripper command (absolute).

    Returns:
        The next commanded pose ``(..., 7)`` inside the workspace, in the wider of the two dtypes.
    """
    act = np.clip(action, -1.0, 1.0)
    xyz = np.clip(pose[..., :3] + DPOS * act[..., :3], WORKSPACE_LOW, WORKSPACE_HIGH)
    rpy = np.clip(pose[..., 3:6] + DROT * act[..., 3:6], RPY_LOW, RPY_HIGH)
    moved = np.concatenate([xyz, rpy, np.broadcast_to(act[..., 6:7], (*xyz.shape[:-1], 1))], axis=-1)
    return moved.astype(np.result_type(pose, action), copy=False)


def action_between(pose: FloatArray, goal: FloatArray) -> FloatArray:
    """The action ``(..., 7)``, not clipped, that leads from one commanded pose ``(..., 7)`` to another."""
    moved = (goal - pose)[..., :6] / np.repeat([DPOS, DROT], 3)
    return np.concatenate([moved, goal[..., 6:]], axis=-1)


def integrate_actions(pose: FloatArray, actions: FloatArray) -> FloatArray:
    """Poses after each of K actions: ``pose`` (..., 7), ``actions`` (..., K, 7) -> (..., K, 7)."""
    poses = []
    for k in range(actions.shape[-2]):
        pose = integrate_action(pose, actions[..., k, :])
        poses.append(pose)
    return np.stack(poses, axis=-2)


def rotation_from_rpy(rpy: FloatArray) -> FloatArray:
    """Rotation matrices ``(..., 3, 3)`` = Rz(yaw) Ry(pitch) Rx(roll) of ``rpy`` (..., 3)."""
    cos, sin = np.cos(rpy), np.sin(rpy)
    turns = np.empty((*cos.shape, 3), cos.dtype)
    cr, cp, cy = cos[..., 0], cos[..., 1], cos[..., 2]
    sr, sp, sy = sin[..., 0], sin[..., 1], sin[..., 2]
    turns[..., 0, 0], turns[..., 0, 1], turns[..., 0, 2] = cy * cp, cy * sp * sr - sy * cr, cy * sp * cr + sy * sr
    turns[..., 1, 0], turns[..., 1, 1], turns[..., 1, 2] = sy * cp, sy * sp * sr + cy * cr, sy * sp * cr - cy * sr
    turns[..., 2, 0], turns[..., 2, 1], turns[..., 2, 2] = -sp, cp * sr, cp * cr
    return turns


def tool_rotation(pose: FloatArray) -> FloatArray:
    """World rotation ``(..., 3, 3)`` of the tool frame: z along the fingers, y the direction they open in."""
    return np.asarray(rotation_from_rpy(pose[..., 3:6]) @ _DOWN)


def finger_opening(command: FloatArray) -> FloatArray:
    """Distance (m) between the finger faces that a gripper command asks for, once settled and with nothing held."""
    return np.asarray(np.clip(-0.01 + (1.0 - command) / 2.0 * (MAX_OPENING + 0.01), 0.0, MAX_OPENING))


def _arm_plane(pose: FloatArray, rotation: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
    """Yaw of the arm's plane, elevations of upper arm and forearm, and the wrist centre, from the commanded pose and its
    ``tool_rotation``.
    """
    wrist = pose[..., :3] - _TOOL_LENGTH * rotation[..., :, 2]
    yaw = np.arctan2(wrist[..., 1], wrist[..., 0])
    r, z = np.hypot(wrist[..., 0], wrist[..., 1]), wrist[..., 2] - _SHOULDER_Z
    reach = np.clip(np.hypot(r, z), abs(_UPPER - FOREARM) + 1e-6, _UPPER + FOREARM - 1e-6)
    inner = np.arccos(np.clip((_UPPER**2 + reach**2 - FOREARM**2) / (2 * _UPPER * reach), -1.0, 1.0))
    upper = np.arctan2(z, r) + inner  # elbow up
    fore = np.arctan2(z - _UPPER * np.sin(upper), r - _UPPER * np.cos(upper))
    return yaw, upper, fore, wrist


def joint_angles(pose: FloatArray, *, clip: bool = True) -> FloatArray:
    """Closed-form inverse kinematics: joints ``(..., 6)`` in radians for a commanded pose ``(..., 7)``.

    Elbow up, joint 5 positive: one continuous branch over the whole workspace (the last three axes meet in a point).
    ``clip`` keeps the result within the joint limits; where that bites the pose is met only approximately.
    """
    rotation = tool_rotation(pose)
    joints = _joints(rotation, *_arm_plane(pose, rotation)[:3])
    return np.clip(joints, JOINT_LOW, JOINT_HIGH) if clip else joints


def _joints(rotation: FloatArray, yaw: FloatArray, upper: FloatArray, fore: FloatArray) -> FloatArray:
    theta23 = np.pi / 2 + _FOREARM_BEND - fore
    cos1, sin1, c, s = np.cos(yaw), np.sin(yaw), np.cos(theta23), np.sin(theta23)
    forearm = np.empty((*yaw.shape, 3, 3), yaw.dtype)
    forearm[..., 0, 0], forearm[..., 0, 1], forearm[..., 0, 2] = cos1 * c, -cos1 * s, -sin1
    forearm[..., 1, 0], forearm[..., 1, 1], forearm[..., 1, 2] = sin1 * c, -sin1 * s, cos1
    forearm[..., 2, 0], forearm[..., 2, 1], forearm[..., 2, 2] = -s, -c, 0.0
    hand = np.swapaxes(forearm, -1, -2) @ rotation
    # hand @ Rx(-90 deg) = Ry(-q4) Rz(q5) Ry(-q6); the product moves columns 1, 2 of ``hand`` to -2, 1.
    joints = np.empty((*yaw.shape, 6), hand.dtype)
    joints[..., 0] = yaw
    joints[..., 1] = -upper - DH_THETA[1]
    joints[..., 2] = theta23 + upper - DH_THETA[2]
    joints[..., 3] = np.arctan2(hand[..., 2, 2], hand[..., 0, 2])
    joints[..., 4] = np.arccos(np.clip(-hand[..., 1, 2], -1.0, 1.0))
    joints[..., 5] = np.arctan2(-hand[..., 1, 1], hand[..., 1, 0])
    return (joints + np.pi) % (2 * np.pi) - np.pi


def forward_kinematics(joints: FloatArray) -> FloatArray:
    """Homogeneous world transform ``(..., 4, 4)`` of the tool for joints ``(..., 6)``."""
    turned = joints + _DH_THETA
    c, s = np.cos(turned), np.sin(turned)
    links = np.zeros((*c.shape, 4, 4))
    links[...] = _LINKS
    links[..., 0, 0], links[..., 0, 1] = c, -s
    links[..., 1, 0], links[..., 1, 1] = s * _DH_COS, c * _DH_COS
    links[..., 2, 0], links[..., 2, 1] = s * _DH_SIN, c * _DH_SIN
    total: FloatArray = _BASE
    for i in range(6):
        total = total @ links[..., i, :, :]
    return total @ _TOOL


def arm_points(pose: FloatArray) -> FloatArray:
    """Skeleton of the arm for a commanded pose, to be drawn: ``(..., 7)`` -> ``(..., 8, 3)`` world points (m).

    Order: ``ARM_POINT_NAMES``. The fingertips stand where the command sends them; a held object keeps them wider.
    """
    rotation = tool_rotation(pose)
    yaw, upper, _, wrist = _arm_plane(pose, rotation)
    return _points(pose, rotation, yaw, upper, wrist)


def _points(
    pose: FloatArray, rotation: FloatArray, yaw: FloatArray, upper: FloatArray, wrist: FloatArray
) -> FloatArray:
    axis, side = rotation[..., :, 2], rotation[..., :, 1]
    tool, flat = pose[..., :3], _UPPER * np.cos(upper)
    points = np.zeros((*yaw.shape, 8, 3), np.result_type(pose, rotation))
    points[..., 1, 2] = _SHOULDER_Z
    points[..., 2, 0], points[..., 2, 1] = flat * np.cos(yaw), flat * np.sin(yaw)
    points[..., 2, 2] = _SHOULDER_Z + _UPPER * np.sin(upper)
    points[..., 3, :] = wrist
    points[..., 4, :] = tool - TCP_OFFSET * axis
    points[..., 5, :] = tool
    tip, half = tool + FINGER_OVERHANG * axis, finger_opening(pose[..., 6:7]) / 2 * side
    points[..., 6, :], points[..., 7, :] = tip + half, tip - half
    return points


def joints_and_points(pose: FloatArray) -> tuple[FloatArray, FloatArray]:
    """``joint_angles`` without clipping and ``arm_points``, for little more than one of them."""
    rotation = tool_rotation(pose)
    yaw, upper, fore, wrist = _arm_plane(pose, rotation)
    return _joints(rotation, yaw, upper, fore), _points(pose, rotation, yaw, upper, wrist)


def camera_rotation() -> NDArray[np.float64]:
    """``(3, 3)`` matrix whose columns are the camera's right, up and backward axes in the world."""
    right, up = np.array(CAMERA_XYAXES[:3]), np.array(CAMERA_XYAXES[3:])
    right = right / np.linalg.norm(right)
    up = up - right * (up @ right)
    up = up / np.linalg.norm(up)
    return np.stack([right, up, np.cross(right, up)], axis=1)


@dataclass(frozen=True)
class Camera:
    """A camera that was calibrated, for the square picture that the policy sees.

    ``position`` (m) and ``rotation``, a rotation vector (rad) that turns the world's axes into the camera's right, up and
    backward axes; ``fovy`` in degrees; ``center``: where the optical axis meets the picture, in its sides from the top left.
    """

    position: tuple[float, float, float]
    rotation: tuple[float, float, float]
    fovy: float
    center: tuple[float, float] = (0.5, 0.5)

    @staticmethod
    def of_numbers(numbers: Sequence[float]) -> Camera:
        """The inverse of ``numbers``; ``InvalidOptionError`` where these are not those of a camera."""
        if len(numbers) != 9 or not np.isfinite(numbers).all() or not 0.0 < numbers[6] < 180.0:
            raise InvalidOptionError(
                f"a camera is 9 numbers (position, rotation vector, fovy from 0 to 180, center), not {list(numbers)[:10]}."
            )
        a, b, c, d, e, f, fovy, u, v = map(float, numbers)
        return Camera((a, b, c), (d, e, f), fovy, (u, v))

    @property
    def numbers(self) -> tuple[float, ...]:
        """The nine numbers, as ``ArmMapConfig.camera`` takes them."""
        return (*self.position, *self.rotation, self.fovy, *self.center)

    @property
    def axes(self) -> NDArray[np.float64]:
        """As :func:`camera_rotation`."""
        angle = float(np.linalg.norm(self.rotation))
        x, y, z = np.array(self.rotation) / max(angle, 1e-12)
        cross = np.array([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])
        turned: NDArray[np.float64] = np.eye(3) + np.sin(angle) * cross + (1.0 - np.cos(angle)) * cross @ cross
        return turned


def focal_length(image_size: float, camera: Camera | None = None) -> float:
    """Focal length in pixels of a square picture of ``image_size`` pixels; of the simulator's camera by default."""
    return float(image_size / 2 / np.tan(np.deg2rad(CAMERA_FOVY if camera is None else camera.fovy) / 2))


def project(points: FloatArray, image_size: int, camera: Camera | None = None) -> tuple[FloatArray, FloatArray]:
    """Where world points ``(..., 3)`` appear in a square picture of ``image_size`` pixels, the simulator's without ``camera``.

    Returns:
        pixels ``(..., 2)``: u to the right, v down, (0, 0) the outer corner of the first pixel (its centre is 0.5);
        depth ``(...)`` in metres along the viewing axis; negative is behind the camera.
    """
    if camera is None:
        position, axes, center = CAMERA_POSITION, camera_rotation(), (0.5, 0.5)
    else:
        position, axes, center = np.array(camera.position), camera.axes, camera.center
    local = (points - position) @ axes
    depth = -local[..., 2]
    focal = focal_length(image_size, camera)
    safe = np.where(np.abs(depth) < 1e-6, 1e-6, depth)
    u = image_size * center[0] + focal * local[..., 0] / safe
    v = image_size * center[1] - focal * local[..., 1] / safe
    return np.stack([u, v], axis=-1), depth


def check_image_size(image_size: int) -> None:
    """``InvalidOptionError`` unless the renderer can draw a square picture of ``image_size`` pixels."""
    if not 16 <= image_size <= 640:
        raise InvalidOptionError(f"image_size={image_size} must be from 16 to 640 pixels.")
