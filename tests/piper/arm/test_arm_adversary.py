"""A small run of the adversary, and that its check of the frames finds what it should."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

pytest.importorskip("can", reason="needs the extra piper")
pytest.importorskip("piper_sdk", reason="needs the extra piper")

from benchmarks.arm_adversary import broken_limits, run, targets_on_bus
from rawdream_env.piper import geometry as geo
from rawdream_env.piper.arm import frames as fr
from rawdream_env.piper.arm.end_pose import end_pose_from_pose
from rawdream_env.piper.arm.guard import Limits


def test_no_frame_leaves_the_limits():
    seen, bad = run(500, seed=3)
    assert seen > 500 and not bad


@pytest.mark.parametrize(
    ("change", "broken"),
    [
        ({0: 0.41}, {"workspace", "step", "speed", "joint speed"}),
        ({0: 0.28}, {"step"}),
        ({4: 0.31}, {"direction", "step"}),
        ({6: -1.0}, {"gripper"}),
        ({1: 0.0155}, {"step", "acceleration"}),
        ({5: 0.152}, {"step", "acceleration"}),
        ({2: 0.0}, {"workspace", "step", "speed", "joint speed", "table"}),
        ({0: np.nan}, {"not finite"}),
    ],
)
def test_broken_limits_are_found(change, broken):
    pose = geo.HOME_POSE.copy()
    pose[6] = 0.0
    bad = pose.copy()
    bad[list(change)] = list(change.values())
    assert broken <= set(broken_limits(np.array([pose, pose, bad]), Limits()))
    assert not broken_limits(np.array([pose, pose, pose]), Limits())


def test_a_reversal_at_full_speed_is_too_much_acceleration():
    pose, step = geo.HOME_POSE.copy(), np.zeros(7)
    pose[6], step[1] = 0.0, geo.DPOS
    assert broken_limits(np.array([pose, pose + step, pose]), Limits()) == {"acceleration": 1}
    assert not broken_limits(np.array([pose, pose + step, pose + step, pose]), Limits())


def test_frames_that_are_no_targets_are_found():
    bad = Counter()
    target = (*fr.encode_end_pose(end_pose_from_pose(geo.HOME_POSE)), fr.encode_gripper(fr.Gripper(0.03, 1.0, 1)))
    poses = targets_on_bus([*target, fr.encode_stop(), fr.encode_power(False), fr.encode_power(True)], bad)
    np.testing.assert_allclose(poses[0][:6], geo.HOME_POSE[:6], atol=1e-5)
    assert bad == {"frame 0x150": 1, "frame 0x471": 1}
