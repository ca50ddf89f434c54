"""Whatever is asked of the guard, what it lets through is inside every limit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rawdream_env.errors import InvalidActionError, InvalidOptionError
from rawdream_env.piper import geometry as geo
from rawdream_env.piper.arm.guard import ArmState, Limits, Reason, guard, target_pose

LIMITS = Limits()
ANY_FLOAT = st.floats(width=64) | st.floats(-1.0, 1.0)
TURNS = np.r_[np.full(3, geo.DPOS), np.full(3, geo.DROT)]
EPS = 1e-8


def assert_inside_every_limit(pose, state, limits=LIMITS):
    """The limits once more, from forward kinematics of the joints instead of the guard's own way."""
    assert (pose >= limits.pose_low).all() and (pose <= limits.pose_high).all()
    joints, joints_before = (np.asarray(geo.joint_angles(p, clip=False)) for p in (pose, state.pose))
    assert (joints >= limits.joint_low).all() and (joints <= limits.joint_high).all()
    tool = geo.forward_kinematics(joints)
    np.testing.assert_allclose(tool[:, :3, 3], pose[:, :3], atol=1e-6)  # the joints do reach the pose
    np.testing.assert_allclose(tool[:, :3, :3], geo.tool_rotation(pose), atol=1e-6)
    step, last = (pose - state.pose)[:, :6], (state.pose - state.before)[:, :6]
    assert (np.abs(step) <= TURNS + EPS).all()
    assert (np.abs(step - last) <= TURNS + EPS).all()
    assert (np.linalg.norm(step[:, :3], axis=-1) <= 0.025 + EPS).all()
    assert (np.abs(joints - joints_before) <= 0.3 + EPS).all()
    half = geo.finger_opening(pose[:, 6]) / 2
    assert (half <= 0.035).all()
    tips = tool[:, None, :3, 3] + geo.FINGER_OVERHANG * tool[:, None, :3, 2]
    tips = tips + np.stack([half, -half], axis=1)[..., None] * tool[:, None, :3, 1]
    assert (tips[..., 2] >= limits.table_clearance - EPS).all()
    wrist = tool[:, :3, 3] - (geo.TCP_OFFSET + geo.DH_D[5]) * tool[:, :3, 2]
    reach = np.linalg.norm(wrist - [0, 0, geo.BASE_HEIGHT + geo.DH_D[0]], axis=-1)
    assert (reach <= geo.DH_A[2] + geo.FOREARM - limits.min_reach_margin + EPS).all()
    assert (joints[:, 4] >= limits.min_wrist_bend).all()


def attack(kind, state, rng):
    """Targets (B, 7) meant to break a limit."""
    n = len(state.pose)
    if kind == "noise":
        return rng.normal(size=(n, 7)) * 10.0 ** rng.integers(-3, 300, (n, 1))
    if kind == "jumps":
        return rng.uniform(LIMITS.pose_low - 0.3, LIMITS.pose_high + 0.3, (n, 7))
    if kind == "corners":
        return np.where(rng.random((n, 7)) < 0.5, LIMITS.pose_low, LIMITS.pose_high)
    if kind == "not finite":
        target = state.pose.copy()
        target[np.arange(n), rng.integers(0, 7, n)] = rng.choice([np.nan, np.inf, -np.inf], n)
        return target
    if kind == "steps":  # full actions, half of them straight on: towards a limit and along it
        action = np.where(rng.random((n, 1)) < 0.5, np.sign(state.pose - state.before), rng.uniform(-1.5, 1.5, (n, 7)))
        return target_pose(state.pose, np.c_[action[:, :6], rng.uniform(-2, 2, n)])
    centre, angle = (LIMITS.pose_low + LIMITS.pose_high) / 2, rng.uniform(0, 2 * np.pi, (n, 7))  # spirals outwards
    away = (state.pose - centre) * 1.05
    return centre + away + 0.01 * np.cos(angle)


ATTACKS = ("noise", "jumps", "corners", "not finite", "steps", "spirals")


def run_attack(num_arms, num_steps, seed=0):
    rng = np.random.default_rng(seed)
    state = ArmState.at_rest(np.tile(geo.HOME_POSE, (num_arms, 1)))
    seen, kinds = 0, ATTACKS
    for k in range(num_steps):
        if k % 4 == 0:  # each arm meets a kind four times in a row
            kinds = rng.permutation(ATTACKS)
        parts = np.array_split(np.arange(num_arms), len(kinds))
        target = np.concatenate(
            [attack(kind, ArmState(state.pose[i], state.before[i]), rng) for kind, i in zip(kinds, parts, strict=True)]
        )
        sent = guard(state, target)
        np.testing.assert_array_equal(sent.allowed, np.isfinite(target).all(axis=-1))  # nothing else is refused
        ok = sent.allowed
        assert_inside_every_limit(sent.pose[ok], ArmState(state.pose[ok], state.before[ok]))
        again = guard(ArmState(state.pose[ok], state.before[ok]), sent.pose[ok])  # deterministic and idempotent
        np.testing.assert_array_equal(again.pose, sent.pose[ok])
        np.testing.assert_array_equal(again.joints, sent.joints[ok])
        assert not again.reasons.any()
        unchanged = ok & (sent.reasons == 0)
        np.testing.assert_array_equal(sent.pose[unchanged], target[unchanged])
        assert np.isnan(sent.pose[~ok]).all() and np.isnan(sent.joints[~ok]).all()
        seen |= int(np.bitwise_or.reduce(sent.reasons))
        state = state.after(sent)
    return seen


def test_attacks_stay_inside_every_limit():
    seen = run_attack(num_arms=500, num_steps=40)
    assert Reason(seen) == ~Reason(0) & ~Reason.STATE  # every limit was met


@pytest.mark.slow
def test_a_million_attacks_stay_inside_every_limit():
    run_attack(num_arms=10_000, num_steps=100, seed=1)


@settings(max_examples=40)
@given(arrays(np.float64, (6, 7), elements=ANY_FLOAT))
def test_any_sequence_of_targets(targets):
    state = ArmState.at_rest()
    for target in targets:
        sent, again = guard(state, target), guard(state, target)
        np.testing.assert_array_equal(sent.pose, again.pose)
        assert sent.allowed == np.isfinite(target).all()
        if sent.allowed:
            assert_inside_every_limit(sent.pose[None], ArmState(state.pose[None], state.before[None]))
            assert guard(state, sent.pose).reasons == 0
        state = state.after(sent)


def test_rows_do_not_depend_on_each_other():
    rng = np.random.default_rng(3)
    state = ArmState.at_rest(np.tile(geo.HOME_POSE, (50, 1)))
    target = np.concatenate([attack(kind, state, rng)[:8] for kind in ATTACKS])
    state = ArmState.at_rest(np.tile(geo.HOME_POSE, (len(target), 1)))
    together = guard(state, target)
    for i, row in enumerate(target):
        alone = guard(ArmState.at_rest(), row)
        np.testing.assert_array_equal(alone.pose, together.pose[i])
        assert alone.reasons == together.reasons[i]


def test_an_ordinary_action_does_what_it_does_in_the_simulator():
    state = ArmState.at_rest()
    for action in ([0.5, -0.8, 0.3, 0.2, -0.1, 1.0, 1.0], [0.9, 0.0, -0.4, 0.3, 0.0, 0.5, -0.5]):
        sent = guard(state, target_pose(state.pose, action))
        assert sent.reasons == 0
        np.testing.assert_array_equal(sent.pose, geo.integrate_action(state.pose, np.array(action)))
        state = state.after(sent)


@pytest.mark.parametrize(
    ("start", "action", "reason"),
    [
        ([0.26, 0, 0.16, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0, -1], Reason.GRIPPER),
        ([0.40, 0, 0.16, 0, 0, 0, 1], [1, 0, 0, 0, 0, 0, 1], Reason.WORKSPACE),
        ([0.26, 0, 0.16, 0.3, 0, 0, 1], [0, 0, 0, 1, 0, 0, 1], Reason.DIRECTION),
        ([0.26, 0, 0.16, 0, 0, 0, 1], [0, 0, 0, 0, 0, 1.1, 1], Reason.STEP | Reason.ACCELERATION),
        ([0.26, 0, 0.16, 0, 0, 0, 1], [1, 1, 1, 0, 0, 0, 1], Reason.SPEED),
        ([0.17, 0, 0.20, 0, 0, 0, 1], [0, 0, 0, 0, 1, 0, 1], Reason.JOINT_LIMIT),
        ([0.26, 0, 0.010, 0, 0, 0, 0], [0, 0, 0, 0.4, 0, 0, 0], Reason.TABLE),
        ([0.26, 0, 0.16, 0, 0, 0, 1], [np.nan, 0, 0, 0, 0, 0, 1], Reason.NOT_FINITE),
        ([0.60, 0, 0.16, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0, 1], Reason.STATE),
        ([np.nan, 0, 0.16, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0, 1], Reason.STATE | Reason.NOT_FINITE),
    ],
)
def test_reasons(start, action, reason):
    state = ArmState.at_rest(start)
    assert Reason(int(guard(state, target_pose(state.pose, action)).reasons)) == reason


def test_a_reversal_stops_first():
    state = ArmState.at_rest()
    forward = guard(state, target_pose(state.pose, [1, 0, 0, 0, 0, 0, 1]))
    state = state.after(forward)
    back = guard(state, target_pose(state.pose, [-1, 0, 0, 0, 0, 0, 1]))
    assert Reason(int(back.reasons)) == Reason.ACCELERATION
    np.testing.assert_allclose(back.pose[0], state.pose[0], atol=1e-12)


@pytest.mark.parametrize("before", [-np.inf, np.nan, 1e308, 0.0])
def test_a_state_too_fast_to_stop_is_refused(before):
    state = ArmState(geo.HOME_POSE + [0, 0, 0, 0, 0, 0, 0.5], np.full(7, before))
    sent = guard(state, state.pose)
    assert Reason(int(sent.reasons)) == Reason.STATE and np.isnan(sent.pose).all()
    np.testing.assert_array_equal(state.after(sent).pose, state.pose)  # it holds


def test_a_wrist_at_its_limit_does_not_stop_the_hand():
    state = ArmState.at_rest([0.26, 0, 0.010, 0, 0, 0, 0])
    sent = guard(
        state, target_pose(state.pose, [0.5, 0.5, 0, 0.4, 0, 0, 0])
    )  # the roll would put a finger on the table
    np.testing.assert_allclose(sent.pose[:2], state.pose[:2] + 0.5 * geo.DPOS)
    assert 0 <= sent.pose[3] < 0.4 * geo.DROT and sent.reasons == int(Reason.TABLE)


@pytest.mark.parametrize("bad", [np.zeros(6), ["x"] * 7, None])
def test_not_a_pose(bad):
    with pytest.raises(InvalidActionError):
        guard(ArmState.at_rest(), bad)


@pytest.mark.parametrize(
    "options",
    [
        {"max_acceleration": 1.0},  # cannot stop from full speed in one period
        {"max_step": -0.01},
        {"table_clearance": np.nan},
        {"workspace_low": np.ones(3)},
        {"joint_low": np.zeros(5)},
        {"gripper_low": -2.0},
    ],
)
def test_limits_that_make_no_sense(options):
    with pytest.raises(InvalidOptionError):
        Limits(**options)
