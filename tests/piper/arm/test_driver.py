"""The driver against the fake arm, through the SDK: motion, and every fault of the hardware page with its latency."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections import deque
from contextlib import contextmanager

import numpy as np
import pytest

pytest.importorskip("can", reason="needs the extra piper")
pytest.importorskip("piper_sdk", reason="needs the extra piper")

from rawdream_env.errors import ArmFaultError, CanBusError, CanFrameError, InvalidActionError, InvalidOptionError
from rawdream_env.piper import geometry as geo
from rawdream_env.piper.arm import frames as fr
from rawdream_env.piper.arm.clock import LockstepClock, WallClock
from rawdream_env.piper.arm.driver import PiperDriver
from rawdream_env.piper.arm.end_pose import end_pose_from_pose, pose_from_end_pose
from rawdream_env.piper.arm.fake_bus import FakeArmBus
from rawdream_env.piper.arm.faults import DriverConfig, FaultKind
from rawdream_env.piper.arm.link import PiperLink
from tests.piper.arm.causes import FAULTS, silent
from tests.waiting import wait_until

PATIENT = DriverConfig(policy_timeout=1.5, feedback_timeout=20.0, frozen_timeout=20.0, max_lag=0.2)
"""In real time on a busy computer."""
FORTH, BACK = np.array([0.6, 0.3, -0.3, 0, 0, 0.2, 1.0]), np.array([-0.6, -0.3, 0.3, 0, 0, -0.2, 1.0])


class Rig:
    """A driver and a fake arm; ``seen`` has every frame on the bus with its time."""

    def __init__(self, clock, config=None):
        self.clock, self.seen = clock, []
        self.bus = FakeArmBus("rig", clock=clock, commands=self._see)
        self.bus.__enter__()
        self.driver = PiperDriver(PiperLink("rig", "virtual"), clock=clock, config=config)

    def _see(self, frame):
        self.seen.append((self.clock.now(), frame))
        return True

    def targets(self):
        """(time, end pose (6,)) of every target on the bus."""
        found, parts = [], []
        for at, frame in self.seen:
            parts = [*parts, frame] if frame.can_id in fr.END_POSE_IDS[1:] else [frame]
            if [f.can_id for f in parts] == list(fr.END_POSE_IDS):
                found.append((at, fr.decode_end_pose(parts)))
        return found

    def follow(self, seconds):
        """Be a policy that moves forth and back."""
        for k in range(round(seconds * 10)):
            self.driver.send_action(FORTH if k % 8 < 4 else BACK)
            self.clock.sleep(0.1)


@contextmanager
def rig(clock=None, config=None):
    made = Rig(clock or LockstepClock(), config)
    try:
        yield made
    finally:
        made.driver.close()
        made.bus.close()
    assert made.bus.error is None
    stops = [f for _, f in made.seen if f.can_id == fr.STOP_ID]
    assert all(fr.decode_stop(f) != fr.StopCode.RESET for f in stops), "ResetPiper was sent"
    assert all(fr.decode_power(f) for _, f in made.seen if f.can_id == fr.POWER_ID), "the power was cut"
    assert not made.bus.arm.dropped


@pytest.mark.parametrize(("clock", "config"), [(LockstepClock, None), (WallClock, PATIENT)])
def test_the_arm_is_enabled_and_moved(clock, config):
    goal = np.array([0.30, 0.05, 0.12, 0.1, 0.0, 0.3, 0.5])
    with rig(clock(), config) as r:
        r.driver.enable()
        assert r.bus.arm.enabled
        np.testing.assert_allclose(r.driver.pose[:6], geo.HOME_POSE[:6], atol=1e-5)
        r.driver.move_to(goal, speed=1.0)
        r.clock.sleep(0.1)
        wait_until(lambda: np.abs(r.driver.measured_pose - goal).max() < 2e-3)
        assert r.driver.fault is None


def test_what_is_sent_is_what_is_returned():
    with rig() as r:
        r.driver.enable()
        start, count = r.driver.pose, len(r.targets())
        sent = r.driver.send_action([5.0, 0.2, 0, 0, 0, 0, -1.0])
        r.clock.sleep(0.02)
        assert len(r.targets()) == count + 1
        on_bus = pose_from_end_pose(r.targets()[-1][1], sent.pose[6])
        np.testing.assert_allclose(on_bus, sent.pose, atol=1e-5)
        assert sent.reasons and 0.9 < sent.action[0] <= 1.0 and sent.pose[6] == -0.95
        again = geo.integrate_action(start, sent.action)
        np.testing.assert_allclose(again, sent.pose, atol=1e-9)
        gripper = next(f for _, f in reversed(r.seen) if f.can_id == fr.GRIPPER_ID)
        assert fr.decode_gripper(gripper).opening == pytest.approx(0.06995, abs=1e-5)
        modes = [k for k, (_, f) in enumerate(r.seen) if f.can_id == fr.MODE_ID]
        firsts = [k for k, (_, f) in enumerate(r.seen) if f.can_id == fr.END_POSE_IDS[0]]
        assert [k + 1 for k in modes] == firsts, "the mode comes before every target"


def test_a_move_over_reverses_and_goes_up_as_far_as_a_tilted_tool_can():
    tilted = np.array([0.26, -0.03, 0.12, 0.0, 0.3, 0.0, -0.95])
    with rig() as r:
        r.driver.enable()
        r.driver.move_to(tilted)
        with pytest.raises(ArmFaultError, match="the guard does not let the arm move from"):
            r.driver.move_to([*tilted[:2], 0.2, *tilted[3:]])
        r.driver.move_to(tilted)
        r.driver.send_action([0, 0, -0.4, 0, 0, 0, -0.95])
        r.driver.move_over(geo.HOME_POSE)
        np.testing.assert_allclose(r.driver.pose[:6], geo.HOME_POSE[:6], atol=1e-9)


def test_targets_are_a_period_apart_and_a_pause_holds():
    with rig() as r:
        r.driver.enable()
        r.driver.send_action(FORTH)
        r.driver.send_action(FORTH)  # at once: the driver waits
        r.driver.hold()
        r.clock.sleep(1.0)
        times, poses = zip(*r.targets(), strict=True)
        assert np.diff(times).min() >= 0.08 - 1e-9
        assert (np.array(poses[-8:]) == poses[-1]).all() and r.driver.fault is None
        np.testing.assert_allclose(poses[-1], end_pose_from_pose(r.driver.pose), atol=1e-5)


def test_nothing_passes_the_link_that_the_guard_has_not_seen():
    with rig() as r:
        r.driver.enable()
        r.clock.sleep(0.1)
        sdk, before = r.driver.link._sdk, {f for _, f in r.seen}
        calls = [
            sdk.ResetPiper,
            sdk.DisablePiper,
            lambda: sdk.EndPoseCtrl(300_000, 0, 50_000, 180_000, 0, 180_000),
            lambda: sdk.JointCtrl(0, 0, 0, 0, 0, 0),
            lambda: sdk.GripperCtrl(90_000, 1000, 1, 0),
            lambda: sdk.MotionCtrl_2(1, 1, 100),
            lambda: sdk.MasterSlaveConfig(0xFA, 0, 0, 0),
        ]
        for call in calls:
            with pytest.raises(CanFrameError):
                call()
        r.clock.sleep(0.05)
        assert {f for _, f in r.seen} == before
        with pytest.raises(InvalidActionError):
            r.driver.send_action([np.nan] * 7)


def test_enable_needs_feedback_power_and_a_hand_inside_the_limits():
    with rig(config=DriverConfig(enable_timeout=1.0)) as r:
        r.bus.feedback = lambda frames: []
        with pytest.raises(ArmFaultError, match="no feedback"):
            r.driver.enable()
        r.bus.feedback = lambda frames: [f if f.can_id != 0x263 else fr.Frame(f.can_id, bytes(8)) for f in frames]
        with pytest.raises(ArmFaultError, match=r"joints \[3\] have no power"):
            r.driver.enable()
        r.bus.feedback = lambda frames: frames
        r.bus.arm.joints = np.zeros(6)
        r.driver.link.forget_problems()
        with pytest.raises(ArmFaultError, match="outside the limits"):
            r.driver.enable()
        with pytest.raises(ArmFaultError, match="not enabled"):
            r.driver.send_action(FORTH)
    with pytest.raises(InvalidOptionError, match="policy_timeout"):
        DriverConfig(policy_timeout=0.05)
    with pytest.raises(CanBusError):
        PiperLink("no such adapter", "socketcan")


# ---- faults ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "cause", "kind", "known"), FAULTS, ids=[f[0] for f in FAULTS])
def test_faults_are_latched_and_the_arm_holds(name, cause, kind, known):
    with rig() as r:
        r.driver.enable()
        r.follow(0.8)
        cause(r)
        begin = r.clock.now()
        with pytest.raises(ArmFaultError) as raised:
            for _ in range(12):
                r.driver.send_action(FORTH)
                r.clock.sleep(0.1)
        fault = r.driver.fault
        latched = fault.at - begin - known
        assert fault.kind == kind and latched <= 0.1, f"{name}: {fault.kind} after {latched:.3f} s"
        assert fault.message.count(".") <= 2 and fault.message in str(raised.value)
        held = r.driver.pose
        r.clock.sleep(0.5)
        with pytest.raises(ArmFaultError):
            r.driver.send_action(BACK)
        np.testing.assert_array_equal(r.driver.pose, held)
        if name != "unplugged":  # nothing can be sent any more
            after = [(at, pose) for at, pose in r.targets() if at > fault.at]
            holding = end_pose_from_pose(held)
            assert after[0][0] - begin - known <= 0.2 and len(after) >= 3
            assert all(np.abs(pose - holding)[:3].max() < 1e-5 for _, pose in after)


def test_feedback_that_was_always_late_is_found_when_the_arm_moves():
    with rig() as r:
        late = deque([r.bus.arm.feedback()] * 60)
        r.bus.feedback = lambda frames: (late.append(frames), late.popleft())[1]
        r.driver.enable()
        r.clock.sleep(0.5)
        begin = r.clock.now()
        with pytest.raises(ArmFaultError):
            r.follow(1.0)
        assert r.driver.fault.kind in {FaultKind.FROZEN, FaultKind.LAG}
        assert r.driver.fault.at - begin <= 0.25 + 0.1


def test_a_fault_is_cleared_by_the_operator_alone():
    with rig() as r:
        r.driver.enable()
        silent(r)
        r.clock.sleep(0.3)
        assert r.driver.fault.kind == FaultKind.SILENT
        with pytest.raises(ArmFaultError, match="cannot be cleared: no feedback"):
            r.driver.clear_fault()
        r.bus.feedback = lambda frames: frames
        r.clock.sleep(0.3)
        with pytest.raises(ArmFaultError, match="no complete feedback"):
            r.driver.send_action(FORTH)
        r.driver.clear_fault()
        r.follow(0.5)


def test_stop_lets_the_arm_sink_and_cannot_be_cleared():
    with rig() as r:
        r.driver.enable()
        pressed = []
        r.driver.add_check(FaultKind.STOP, lambda: "An operator pressed the stop key." if pressed else None)
        r.follow(0.5)
        pressed.append(True)
        begin = r.clock.now()
        with pytest.raises(ArmFaultError, match="pressed the stop key"):
            r.follow(0.5)
        stops = [at for at, f in r.seen if f.can_id == fr.STOP_ID]
        assert stops[0] - begin <= 0.1
        assert all(at < stops[0] for at, _ in r.targets())
        assert r.bus.arm.status == fr.ArmStatus.EMERGENCY_STOP
        with pytest.raises(ArmFaultError, match="switch its power off and on"):
            r.driver.clear_fault()


def test_a_policy_that_is_late_is_lost():
    with rig() as r:
        r.driver.enable()
        r.driver.send_action(FORTH)
        begin = r.clock.now()
        r.clock.sleep(1.0)
        fault = r.driver.fault
        assert fault.kind == FaultKind.POLICY and fault.at - begin <= 0.15 + 0.1
        assert next(at for at, _ in r.targets() if at > fault.at) - begin <= 0.15 + 0.2


def test_a_person_who_is_late_finds_the_arm_holding():
    with rig() as r:
        r.driver.enable()
        r.driver.send_action(FORTH, late_is_fault=False)
        begin, pose = r.clock.now(), r.driver.pose
        r.clock.sleep(1.0)
        assert r.driver.fault is None and (r.driver.pose == pose).all()
        held = [at for at, _ in r.targets() if at > begin + 0.1]
        assert held[0] - begin <= 0.2 and len(held) >= 8
        r.driver.send_action(BACK, late_is_fault=False)
        assert (r.driver.pose != pose).any()


def test_nothing_is_sent_while_the_watchdog_is_late():
    with rig(WallClock(), PATIENT) as r:
        r.driver.enable()
        late, go_on = threading.Event(), threading.Event()

        def check():
            late.set()
            go_on.wait()

        end = r.driver.add_check(FaultKind.BUS, check)
        late.wait()
        before = r.clock.now()
        threading.Timer(0.3, go_on.set).start()
        r.driver.send_action(FORTH, late_is_fault=False)
        assert r.clock.now() - before >= 0.3 and r.driver.fault is None
        end()


def test_a_policy_process_that_is_killed_leaves_an_arm_that_holds():
    program = "import time\nwhile True:\n    print(0.3, 0, 0, 0, 0, 0, 1, flush=True)\n    time.sleep(0.1)"
    with rig(WallClock(), PATIENT) as r:
        r.driver.enable()
        policy = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
        for count, line in enumerate(policy.stdout):
            r.driver.send_action([float(x) for x in line.split()])
            if count == 5:
                policy.kill()
                killed = r.clock.now()
        policy.wait()

        def held():
            fault = r.driver.fault
            return fault and any(at > fault.at - 1e-3 for at, _ in r.targets())

        while not held():
            assert r.clock.now() - killed < 60
            r.clock.sleep(0.05)
        assert r.driver.fault.kind == FaultKind.POLICY and r.driver.fault.at - killed > 1.5 - 0.5
