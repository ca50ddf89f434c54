"""The manufacturer's SDK drives the fake arm over a virtual CAN bus."""

from __future__ import annotations

import time

import numpy as np
import pytest

pytest.importorskip("can", reason="needs the extra piper")
piper_sdk = pytest.importorskip("piper_sdk", reason="needs the extra piper")

from rawdream_env.piper import geometry as geo  # noqa: E402
from rawdream_env.piper.arm import frames  # noqa: E402
from rawdream_env.piper.arm.end_pose import end_pose_from_pose  # noqa: E402
from rawdream_env.piper.arm.fake_bus import FakeArmBus  # noqa: E402
from tests.waiting import wait_until  # noqa: E402


def units(end_pose):
    return [round(x) for x in np.r_[end_pose[:3] * 1e6, np.rad2deg(end_pose[3:]) * 1e3]]


def test_the_sdk_moves_the_fake_arm():
    goal = end_pose_from_pose(np.array([0.30, -0.05, 0.10, 0.0, 0.1, 0.3, 0.0]))
    with FakeArmBus("fake arm") as fake:
        sdk = piper_sdk.C_PiperInterface_V2("fake arm", judge_flag=False, can_auto_init=False)
        sdk.CreateCanBus("fake arm", bustype="virtual", judge_flag=False)
        sdk.ConnectPort(piper_init=False)
        try:
            wait_until(sdk.EnablePiper)  # it reports the state before the command
            assert fake.arm.enabled
            sdk.MotionCtrl_2(0x01, 0x00, 100)
            sdk.EndPoseCtrl(*units(goal))
            sdk.GripperCtrl(50_000, 1_000, 0x01, 0)

            def measured():
                pose = sdk.GetArmEndPoseMsgs().end_pose
                return [getattr(pose, f"{axis}_axis") for axis in ("X", "Y", "Z", "RX", "RY", "RZ")]

            def arrived():
                miss = np.subtract(measured(), units(goal))
                miss[3:] = (miss[3:] + 180_000) % 360_000 - 180_000
                return np.abs(miss).max() <= 3

            wait_until(arrived)
            wait_until(lambda: abs(sdk.GetArmGripperMsgs().gripper_state.grippers_angle - 50_000) <= 1)
            assert sdk.GetArmStatus().arm_status.arm_status == frames.ArmStatus.NORMAL
            sdk.JointCtrl(*[round(x) for x in np.rad2deg(geo.joint_angles(geo.HOME_POSE)) * 1e3])  # in pose mode
            time.sleep(0.1)
            assert arrived()
            sdk.EmergencyStop(0x01)
            wait_until(lambda: sdk.GetArmStatus().arm_status.arm_status == frames.ArmStatus.EMERGENCY_STOP)
        finally:
            sdk.DisconnectPort()
    assert not fake.arm.dropped


def test_a_damaged_frame_is_reported_where_the_context_ends():
    import can

    from rawdream_env.errors import CanFrameError

    with pytest.raises(CanFrameError), FakeArmBus("damaged") as fake, can.Bus("damaged", interface="virtual") as bus:
        bus.send(can.Message(arbitration_id=frames.MODE_ID, data=bytes([9] * 8), is_extended_id=False))
        wait_until(lambda: fake.error is not None)
