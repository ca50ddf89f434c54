"""The fake arm does what it is sent, as far as frames can tell."""

from __future__ import annotations

import numpy as np
import pytest

from rawdream_env.piper import geometry as geo
from rawdream_env.piper.arm import frames as can
from rawdream_env.piper.arm.end_pose import end_pose_from_pose
from rawdream_env.piper.arm.fake import FakeArm
from rawdream_env.piper.arm.guard import ArmState, guard, target_pose


def ready(move_mode, speed=100):
    arm = FakeArm()
    arm.receive(can.encode_power(True))
    arm.receive(can.encode_mode(can.Mode(True, move_mode, speed)))
    return arm


def send(arm, frames, seconds=0.1):
    for frame in frames:
        arm.receive(frame)
    arm.advance(seconds)
    return read(arm)


def read(arm):
    frames = {frame.can_id: frame for frame in arm.feedback()}
    return (
        can.decode_joints([frames[i] for i in can.FEEDBACK_JOINT_IDS]),
        can.decode_end_pose([frames[i] for i in can.FEEDBACK_END_POSE_IDS]),
        can.decode_status(frames[can.FEEDBACK_STATUS_ID]),
    )


def test_guarded_actions_reach_the_arm_inside_every_limit():
    """Guard, frames, arm and feedback together, under actions that ask for too much."""
    rng = np.random.default_rng(0)
    arm, state = ready(can.MoveMode.JOINT), ArmState.at_rest()
    drift = rng.uniform(-2, 2, 7)
    for k in range(300):
        drift = rng.uniform(-2, 2, 7) if k % 15 == 0 else drift
        sent = guard(state, target_pose(state.pose, drift + rng.normal(size=7)))
        joints, end_pose, status = send(arm, can.encode_joints(sent.joints))
        assert status == can.ArmStatus.NORMAL
        np.testing.assert_allclose(joints, sent.joints, atol=2e-5)  # fast enough to follow in one period
        np.testing.assert_allclose(end_pose[:3], end_pose_from_pose(sent.pose)[:3], atol=2e-5)
        state = state.after(sent)


def test_end_poses_and_joints_mean_the_same_pose():
    pose = np.array([0.28, 0.05, 0.12, 0.1, -0.1, 0.4, 0.0])
    by_pose = send(ready(can.MoveMode.POSE), can.encode_end_pose(end_pose_from_pose(pose)), seconds=2.0)
    by_joints = send(ready(can.MoveMode.JOINT), can.encode_joints(geo.joint_angles(pose)), seconds=2.0)
    np.testing.assert_allclose(by_pose[0], by_joints[0], atol=3e-4)  # a micrometre at the wrist turns it by more
    np.testing.assert_allclose(by_pose[1][:3], end_pose_from_pose(pose)[:3], atol=1e-5)


def test_what_is_not_followed():
    home = FakeArm().joints
    elsewhere = can.encode_joints(home + 0.1)
    not_ready, other_mode, lost = FakeArm(), ready(can.MoveMode.POSE), ready(can.MoveMode.JOINT)
    stopped = ready(can.MoveMode.JOINT)
    stopped.receive(can.encode_stop())
    cases = ((not_ready, elsewhere), (other_mode, elsewhere), (lost, elsewhere[::2]), (stopped, elsewhere))
    for arm, frames in cases:
        np.testing.assert_allclose(send(arm, frames)[0], home, atol=1e-5)
    assert read(stopped)[2] == can.ArmStatus.EMERGENCY_STOP


@pytest.mark.parametrize(
    ("move_mode", "frames", "status"),
    [
        (can.MoveMode.JOINT, can.encode_joints(geo.JOINT_HIGH + 0.01), can.ArmStatus.BEYOND_LIMITS),
        (can.MoveMode.POSE, can.encode_end_pose([2.0, 0, 0.2, 0, 0, 0]), can.ArmStatus.NO_SOLUTION),
    ],
)
def test_an_impossible_target_is_reported_and_not_followed(move_mode, frames, status):
    arm = ready(move_mode)
    joints, _, reported = send(arm, frames)
    assert reported == status
    np.testing.assert_allclose(joints, FakeArm().joints, atol=1e-5)


def test_speed_and_gripper():
    arm = ready(can.MoveMode.JOINT, speed=10)
    before = arm.joints
    joints, _, _ = send(arm, can.encode_joints(before + [1.0, 0, 0, 0, 0, 0]))
    np.testing.assert_allclose(joints - before, [0.03, 0, 0, 0, 0, 0], atol=1e-5)
    send(arm, [can.encode_gripper(can.Gripper(0.06, 1.0, can.GripperCode.ENABLE))], seconds=1.0)
    gripper = next(frame for frame in arm.feedback() if frame.can_id == can.FEEDBACK_GRIPPER_ID)
    assert can.decode_gripper(gripper).opening == pytest.approx(0.06)


def test_power():
    arm = FakeArm()
    motors = [can.decode_motor_enabled(f) for f in arm.feedback() if f.can_id in can.FEEDBACK_MOTOR_IDS]
    assert motors == [(k, False) for k in range(6)]
    arm.receive(can.encode_power(True))
    motors = [can.decode_motor_enabled(f) for f in arm.feedback() if f.can_id in can.FEEDBACK_MOTOR_IDS]
    assert motors == [(k, True) for k in range(6)] and not arm.dropped
    arm.receive(can.Frame(can.STOP_ID, bytes([can.StopCode.RESET]) + bytes(7)))
    assert arm.dropped and not arm.enabled
    assert [f.can_id for f in arm.received] == [can.POWER_ID, can.STOP_ID]
