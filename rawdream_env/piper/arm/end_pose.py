"""Commanded poses of ``geometry`` as end poses of the arm's controller, and back.

The controller's end pose is that of the flange in the frame of the arm's base: xyz (m), and the Euler angles of
Rz(yaw) Ry(pitch) Rx(roll) (rad). Shape letters: B any leading shape.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rawdream_env.piper import geometry as geo

FloatArray = NDArray[np.floating[Any]]

_BASE = np.array([0.0, 0.0, geo.BASE_HEIGHT])
_DOWN = geo.tool_rotation(np.zeros(7))


def end_pose_from_pose(pose: FloatArray) -> FloatArray:
    """End pose (B, 6) of a commanded pose (B, 7)."""
    return _end_pose(geo.tool_rotation(pose), pose[..., :3])


def end_pose_from_joints(joints: FloatArray) -> FloatArray:
    """End pose (B, 6) of joint angles (B, 6) in radians: what the controller measures."""
    tool = geo.forward_kinematics(joints)
    return _end_pose(tool[..., :3, :3], tool[..., :3, 3])


def pose_from_end_pose(end_pose: FloatArray, gripper: FloatArray | float) -> FloatArray:
    """Commanded pose (B, 7) of an end pose (B, 6) and a gripper command (B,)."""
    rotation = geo.rotation_from_rpy(end_pose[..., 3:])
    xyz = end_pose[..., :3] + _BASE + geo.TCP_OFFSET * rotation[..., :, 2]
    command = np.broadcast_to(gripper, xyz.shape[:-1])[..., None]
    return np.concatenate([xyz, _rpy(rotation @ _DOWN.T), command], axis=-1)


def _end_pose(rotation: FloatArray, tool: FloatArray) -> FloatArray:
    flange = tool - _BASE - geo.TCP_OFFSET * rotation[..., :, 2]
    return np.concatenate([flange, _rpy(rotation)], axis=-1)


def _rpy(rotation: FloatArray) -> FloatArray:
    """The inverse of ``geometry.rotation_from_rpy``, pitch in [-pi/2, pi/2]."""
    r = rotation
    roll = np.arctan2(r[..., 2, 1], r[..., 2, 2])
    pitch = np.arctan2(-r[..., 2, 0], np.hypot(r[..., 0, 0], r[..., 1, 0]))
    yaw = np.arctan2(r[..., 1, 0], r[..., 0, 0])
    return np.stack([roll, pitch, yaw], axis=-1)
