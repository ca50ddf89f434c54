"""Poses of the controller: those of the manufacturer's kinematics (``make_golden_frames.py``), and back again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from rawdream_env.piper import geometry as geo
from rawdream_env.piper.arm.end_pose import end_pose_from_joints, end_pose_from_pose, pose_from_end_pose

GOLDENS = json.loads(Path(__file__).with_name("golden_end_poses.json").read_text())


@pytest.mark.parametrize("golden", GOLDENS)
def test_kinematics_are_those_of_the_sdk(golden):
    end_pose = end_pose_from_joints(np.array(golden["joints"]))
    np.testing.assert_allclose(end_pose[:3] * 1e3, golden["end_pose"][:3], atol=1e-6)
    np.testing.assert_allclose(np.rad2deg(end_pose[3:]), golden["end_pose"][3:], atol=1e-6)


def test_a_pose_comes_back():
    rng = np.random.default_rng(0)
    low, high = (np.r_[xyz, rpy, g] for xyz, rpy, g in _corners())
    pose = rng.uniform(low, high, (200, 7))
    end_pose = end_pose_from_pose(pose)
    np.testing.assert_allclose(pose_from_end_pose(end_pose, pose[:, 6]), pose, atol=1e-12)
    np.testing.assert_allclose(pose_from_end_pose(end_pose[0], pose[0, 6]), pose[0], atol=1e-12)
    joints = geo.joint_angles(pose, clip=False)
    inside = ((joints >= geo.JOINT_LOW) & (joints <= geo.JOINT_HIGH)).all(axis=1)
    wrist = np.linalg.norm(geo.arm_points(pose)[:, 3] - geo.arm_points(pose)[:, 1], axis=1)
    near = inside & (wrist < 0.53)
    measured, commanded = end_pose_from_joints(joints[near]), end_pose[near]
    np.testing.assert_allclose(measured[:, :3], commanded[:, :3], atol=1e-9)
    np.testing.assert_allclose(np.exp(1j * measured[:, 3:]), np.exp(1j * commanded[:, 3:]), atol=1e-6)


def _corners():
    return (geo.WORKSPACE_LOW, geo.RPY_LOW, -1.0), (geo.WORKSPACE_HIGH, geo.RPY_HIGH, 1.0)
