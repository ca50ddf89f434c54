"""Frames are byte for byte those of the manufacturer's SDK (``make_golden_frames.py``) and come back as they went."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rawdream_env.errors import CanFrameError, InvalidActionError
from rawdream_env.piper.arm.frames import (
    END_POSE_IDS,
    Frame,
    Gripper,
    GripperCode,
    Mode,
    MoveMode,
    StopCode,
    decode_end_pose,
    decode_gripper,
    decode_joints,
    decode_mode,
    decode_power,
    decode_stop,
    encode_end_pose,
    encode_gripper,
    encode_joints,
    encode_mode,
    encode_power,
    encode_stop,
)

GOLDENS = json.loads(Path(__file__).with_name("golden_frames.json").read_text())
IDS = [f"{golden['call']}{golden['arguments']}" for golden in GOLDENS]


def golden_content(golden):
    """The frames and, in SI units, what the SDK was asked for or read; its functions here."""
    frames = tuple(Frame(int(can_id, 16), bytes.fromhex(data)) for can_id, data in golden["frames"])
    numbers = np.array(golden["arguments"], dtype=np.float64)
    call = golden["call"]
    if call == "MotionCtrl_2":
        return frames, Mode(bool(numbers[0]), MoveMode(int(numbers[1])), int(numbers[2])), encode_mode, decode_mode
    if call.startswith("EndPose"):
        content = np.r_[numbers[:3] * 1e-6, np.deg2rad(numbers[3:] * 1e-3)]
        return frames, content, encode_end_pose, decode_end_pose
    if call.startswith("Joint"):
        return frames, np.deg2rad(numbers * 1e-3), encode_joints, decode_joints
    if call == "EnableArm":
        return frames, numbers[1] == 2, encode_power, decode_power
    if call == "EmergencyStop":
        return frames, StopCode.STOP, lambda _: encode_stop(), decode_stop
    return frames, Gripper(numbers[0] * 1e-6, numbers[1] * 1e-3, int(numbers[2])), encode_gripper, decode_gripper


@pytest.mark.parametrize("golden", GOLDENS, ids=IDS)
def test_frames_are_those_of_the_sdk(golden):
    frames, content, encode, decode = golden_content(golden)
    if "Feedback" not in golden["call"]:
        encoded = encode(content)
        assert (encoded if isinstance(encoded, tuple) else (encoded,)) == frames
    decoded = decode(frames if isinstance(content, np.ndarray) else frames[0])
    if isinstance(content, np.ndarray):
        np.testing.assert_allclose(decoded, content, rtol=1e-12, atol=1e-15)
    elif isinstance(content, Gripper):
        assert (decoded.opening, decoded.effort) == pytest.approx((content.opening, content.effort), rel=1e-12)
        assert decoded.code == content.code
    else:
        assert decoded == content


@given(arrays(np.float64, 6, elements=st.floats(-3.2, 3.2)))
def test_decoding_gives_back_what_was_encoded(numbers):
    half_unit = np.r_[np.full(3, 0.5e-6), np.full(3, np.deg2rad(0.5e-3))] * (1 + 1e-6)
    assert (np.abs(decode_end_pose(encode_end_pose(numbers)) - numbers) <= half_unit).all()
    assert (np.abs(decode_joints(encode_joints(numbers)) - numbers) <= half_unit[3]).all()
    assert encode_joints(decode_joints(encode_joints(numbers))) == encode_joints(numbers)


@pytest.mark.parametrize("bad", [[np.nan, 0, 0, 0, 0, 0], [0, np.inf, 0, 0, 0, 0], [1e9] * 6, [0.0] * 5, ["x"] * 6])
def test_what_cannot_be_sent(bad):
    for encode in (encode_joints, encode_end_pose):
        with pytest.raises(InvalidActionError):
            encode(bad)


@pytest.mark.parametrize(
    "gripper",
    [
        Gripper(-0.001, 1.0, GripperCode.ENABLE),
        Gripper(np.nan, 1.0, GripperCode.ENABLE),
        Gripper(0.05, 5.1, GripperCode.ENABLE),
        Gripper(0.05, np.nan, GripperCode.ENABLE),
        Gripper(1e5, 1.0, GripperCode.ENABLE),
        Gripper(0.05, 1.0, 0xAE),
    ],
)
def test_a_gripper_command_that_cannot_be_sent(gripper):
    with pytest.raises(InvalidActionError):
        encode_gripper(gripper)


@pytest.mark.parametrize("speed", [-1, 101, 50.5])
def test_a_speed_that_cannot_be_sent(speed):
    with pytest.raises(InvalidActionError):
        encode_mode(Mode(True, MoveMode.JOINT, speed))


def test_other_frames_are_not_read():
    pose = encode_end_pose(np.zeros(6))
    for frames in (pose[:2], pose[::-1], encode_joints(np.zeros(6)), (Frame(END_POSE_IDS[0], b"short"), *pose[1:])):
        with pytest.raises(CanFrameError):
            decode_end_pose(frames)
    for decode in (decode_gripper, decode_mode, decode_power, decode_stop):
        with pytest.raises(CanFrameError):
            decode(pose[0])
    for data in ("0901000000000000", "0105000000000000", "0101ff0000000000", "010164ad00000000"):
        with pytest.raises(CanFrameError):
            decode_mode(Frame(0x151, bytes.fromhex(data)))
