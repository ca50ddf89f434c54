"""Write ``golden_frames.json`` and ``golden_end_poses.json``: what the manufacturer's SDK puts on the bus, listened to on a
virtual one, and the flange poses of its forward kinematics.

Needs piper_sdk and python-can, which the package does not:

    pip install --no-deps piper_sdk==0.6.2 "python-can>=4.2,<5" wrapt packaging typing_extensions
    python tests/piper/arm/make_golden_frames.py
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import can
from piper_sdk import C_PiperForwardKinematics, C_PiperInterface_V2

CASES = [
    ("MotionCtrl_2", [0x01, 0, 30]),
    ("MotionCtrl_2", [0x01, 1, 100]),
    ("MotionCtrl_2", [0x01, 2, 0]),
    ("MotionCtrl_2", [0x00, 0, 50]),
    ("EndPoseCtrl", [0, 0, 0, 0, 0, 0]),
    ("EndPoseCtrl", [260_000, -123_456, 160_001, 179_999, -1, -90_000]),
    ("EndPoseCtrl", [-1, 1, 255, 256, 65_535, -65_536]),
    ("JointCtrl", [0, 0, 0, 0, 0, 0]),
    ("JointCtrl", [150_000, 180_000, -170_000, -100_000, 70_000, -120_000]),
    ("JointCtrl", [-1, 255, -256, 12_345, -54_321, 99_999]),
    ("GripperCtrl", [0, 0, 0, 0]),
    ("GripperCtrl", [70_000, 1_000, 1, 0]),
    ("GripperCtrl", [35_001, 5_000, 3, 0]),
    ("EnableArm", [7, 2]),
    ("EnableArm", [7, 1]),
    ("EmergencyStop", [1]),
]
"""Calls of the SDK in its own units: 0.001 mm, 0.001 degree, 0.001 N m."""

FEEDBACK = [
    ("0x2a2", "0003f7a0fffe1dc0"),
    ("0x2a3", "000271010002bf1f"),
    ("0x2a4", "fffffffffffea070"),
    ("0x2a5", "000249f00002bf20"),
    ("0x2a6", "fffd67f0fffe7960"),
    ("0x2a7", "00011170fffe2b40"),
    ("0x2a8", "00011170fc184000"),
]
"""Frames of an arm, for the SDK to read."""

JOINTS = [
    [0.0, 1.6, -0.9, 0.0, 0.95, 0.0],
    [0.5, 1.2, -0.6, 0.3, 0.7, -0.4],
    [-1.1, 2.0, -1.5, -0.8, 1.1, 1.7],
    [2.0, 0.4, -2.5, 1.2, -0.5, -1.9],
]
"""Radians."""


def write(name: str, goldens: list[dict[str, object]]) -> None:
    lines = ",\n".join(json.dumps(golden) for golden in goldens)
    Path(__file__).with_name(name).write_text(f"[\n{lines}\n]\n")


def main() -> None:
    listener = can.Bus("golden", interface="virtual")
    arm = C_PiperInterface_V2("golden", judge_flag=False, can_auto_init=False)
    arm.CreateCanBus("golden", bustype="virtual", judge_flag=False)
    goldens = []
    for call, arguments in CASES:
        while listener.recv(timeout=0.0) is not None:
            pass
        getattr(arm, call)(*arguments)
        messages = iter(lambda: listener.recv(timeout=0.2), None)
        frames = [[hex(message.arbitration_id), bytes(message.data).hex()] for message in messages]
        goldens.append({"call": call, "arguments": arguments, "frames": frames})
    arm.ConnectPort(piper_init=False)
    for can_id, data in FEEDBACK:
        listener.send(can.Message(arbitration_id=int(can_id, 16), data=bytes.fromhex(data), is_extended_id=False))
    time.sleep(1.0)
    pose, joints = arm.GetArmEndPoseMsgs().end_pose, arm.GetArmJointMsgs().joint_state
    gripper = arm.GetArmGripperMsgs().gripper_state
    read = {
        "EndPose": [getattr(pose, f"{axis}_axis") for axis in ("X", "Y", "Z", "RX", "RY", "RZ")],
        "Joint": [getattr(joints, f"joint_{k}") for k in range(1, 7)],
        "Gripper": [gripper.grippers_angle, gripper.grippers_effort, gripper.status_code],
    }
    arm.DisconnectPort()
    groups = (FEEDBACK[:3], FEEDBACK[3:6], FEEDBACK[6:])
    for (call, values), frames in zip(read.items(), groups, strict=True):
        goldens.append({"call": f"{call}Feedback", "arguments": values, "frames": frames})
    write("golden_frames.json", goldens)
    kinematics = C_PiperForwardKinematics()
    end_poses = [[round(x, 9) for x in kinematics.CalFK(joints)[-1]] for joints in JOINTS]  # mm and degrees
    write("golden_end_poses.json", [{"joints": j, "end_pose": e} for j, e in zip(JOINTS, end_poses, strict=True)])


if __name__ == "__main__":
    main()
