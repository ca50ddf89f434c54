"""Adversarial targets against the driver of the arm: every command frame on the virtual CAN bus is inside the limits.

python -m benchmarks.arm_adversary --targets 1000000 --workers 2

Targets are asked of ``PiperDriver`` one by one; its frames go through the manufacturer's SDK to the fake arm. What arrives
there is decoded and checked once more against the limits, from forward kinematics, up to the rounding of a frame (0.001 mm,
0.001 degree). Speeds and accelerations are first and second differences of successive targets, one period apart.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import count
from multiprocessing import get_context

import numpy as np

from rawdream_env.errors import ArmFaultError, InvalidActionError
from rawdream_env.piper import geometry as geo
from rawdream_env.piper.arm import frames as fr
from rawdream_env.piper.arm.driver import PiperDriver
from rawdream_env.piper.arm.end_pose import FloatArray, pose_from_end_pose
from rawdream_env.piper.arm.fake_bus import FakeArmBus
from rawdream_env.piper.arm.faults import PERIOD, DriverConfig
from rawdream_env.piper.arm.guard import Limits
from rawdream_env.piper.arm.link import PiperLink

ATTACKS = ("noise", "jumps", "corners", "not finite", "straight on", "spirals", "small")
_PIECE = 10_000
"""Targets of one driver."""
_BLOCK = 2000
"""Targets between two checks of the frames."""
_ROUNDING = 4e-5
"""Of a pose that went through frames (m, rad); a difference of two poses has twice this, a second difference four times.
Joints are held against the arm's own limits, without tolerance."""
_MOTORS_EVERY = 5
"""Rounds of feedback from one report of the motors to the next; the driver wants one within 10."""
_SCALE = np.repeat([geo.DPOS, geo.DROT], 3)


class CoarseClock:
    """Lockstep time with one tick per control period: the arm answers once per target."""

    lockstep = True

    def __init__(self) -> None:
        self._now, self._calls = 0.0, list[Callable[[], None]]()

    def now(self) -> float:
        return self._now

    def sleep(self, seconds: float) -> None:
        if seconds > 1e-9:
            self._now += PERIOD
            for call in list(self._calls):
                call()

    def every(self, period: float, call: Callable[[], None], name: str) -> Callable[[], None]:
        self._calls.append(call)
        return lambda: self._calls.remove(call)


def attack(kind: str, pose: FloatArray, before: FloatArray, limits: Limits, rng: np.random.Generator) -> FloatArray:
    """An action (7,) meant to break a limit."""
    if kind == "noise":
        return rng.normal(size=7) * 10.0 ** rng.integers(-3, 300, 7)
    if kind == "not finite":
        action = rng.uniform(-1, 1, 7)
        action[rng.integers(7)] = rng.choice([np.nan, np.inf, -np.inf])
        return action
    if kind == "small":
        return rng.uniform(-0.2, 0.2, 7)
    if kind == "straight on":
        return np.append(np.sign(pose - before)[:6] * rng.uniform(0.5, 3.0), rng.uniform(-3, 3))
    target = rng.uniform(limits.pose_low - 0.3, limits.pose_high + 0.3)
    if kind == "corners":
        target = np.where(rng.random(7) < 0.5, limits.pose_low, limits.pose_high)
    if kind == "spirals":
        centre = (limits.pose_low + limits.pose_high) / 2
        target = centre + (pose - centre) * 1.05 + 0.01 * np.cos(rng.uniform(0, 2 * np.pi, 7))
    return np.append((target - pose)[:6] / _SCALE, target[6])


def broken_limits(poses: FloatArray, limits: Limits) -> Counter[str]:
    """How many of successive commanded poses (N, 7), as read from the bus, break each limit; the first two are not counted."""
    before, last, pose = poses[:-2], poses[1:-1], poses[2:]
    joints = np.asarray(geo.joint_angles(pose, clip=False))
    tool = geo.forward_kinematics(joints)
    wrist = tool[:, :3, 3] - (geo.TCP_OFFSET + geo.DH_D[5]) * tool[:, :3, 2]
    reach = np.linalg.norm(wrist - [0, 0, geo.BASE_HEIGHT + geo.DH_D[0]], axis=-1)
    half = geo.finger_opening(pose[:, 6]) / 2
    tips = tool[:, :3, 3] + geo.FINGER_OVERHANG * tool[:, :3, 2]
    lowest = tips[:, 2] - half * np.abs(tool[:, 2, 1])
    step = np.abs(pose - last)[:, :6]
    change = np.abs(pose - 2 * last + before)[:, :6]
    most = np.repeat([limits.max_acceleration, limits.max_turn_acceleration], 3) * limits.period**2
    turned = np.abs(joints - np.asarray(geo.joint_angles(last, clip=False))).max(-1)
    bad = {
        "not finite": ~np.isfinite(pose).all(-1),
        "workspace": ((pose < limits.pose_low - _ROUNDING) | (pose > limits.pose_high + _ROUNDING))[:, :3].any(-1),
        "direction": ((pose < limits.pose_low - _ROUNDING) | (pose > limits.pose_high + _ROUNDING))[:, 3:6].any(-1),
        "gripper": geo.finger_opening(pose[:, 6]) > geo.finger_opening(np.float64(limits.gripper_low)) + 1e-6,
        "joints": ((joints < geo.JOINT_LOW) | (joints > geo.JOINT_HIGH)).any(-1),
        "kinematics": np.abs(tool[:, :3, 3] - pose[:, :3]).max(-1) > _ROUNDING,
        "step": (step > _SCALE + 2 * _ROUNDING).any(-1),
        "speed": np.linalg.norm(step[:, :3], axis=-1) > limits.max_speed * limits.period + 2 * _ROUNDING,
        "acceleration": (change > most + 4 * _ROUNDING).any(-1),
        "joint speed": turned > limits.max_joint_speed * limits.period + 10 * _ROUNDING,
        "table": lowest < limits.table_clearance - _ROUNDING,
        "reach": reach > geo.DH_A[2] + geo.FOREARM - limits.min_reach_margin + _ROUNDING,
        "wrist": np.abs(joints[:, 4]) < limits.min_wrist_bend - 10 * _ROUNDING,
    }
    return Counter({name: int(rows.sum()) for name, rows in bad.items() if rows.any()})


def run(targets: int, seed: int = 0) -> tuple[int, Counter[str]]:
    """Ask for ``targets`` targets: how many targets were seen on the bus, and how many frames broke which limit."""
    rng, clock, limits = np.random.default_rng(seed), CoarseClock(), Limits()
    seen, bad = 0, Counter[str]()
    before, rounds = geo.HOME_POSE, count()
    with (
        FakeArmBus(
            f"adversary {seed}",
            clock=clock,
            feedback=lambda frames: (
                [f for f in frames if f.can_id not in fr.FEEDBACK_MOTOR_IDS] if next(rounds) % _MOTORS_EVERY else frames
            ),
        ) as bus,
        PiperDriver(
            PiperLink(f"adversary {seed}", "virtual"), clock=clock, config=DriverConfig(speed_percent=100)
        ) as arm,
    ):
        arm.enable()
        last: list[FloatArray] = []
        kind = ATTACKS[0]
        for begin in range(0, targets, _BLOCK):
            for k in range(begin, min(begin + _BLOCK, targets)):
                if k % 4 == 0:  # each kind four times in a row
                    kind = ATTACKS[int(rng.integers(len(ATTACKS)))]
                pose = arm.pose
                try:
                    arm.send_action(attack(kind, pose, before, limits, rng))
                except InvalidActionError:
                    pass  # refused; the arm holds
                except ArmFaultError:
                    clock.sleep(10 * PERIOD)
                    arm.clear_fault()
                before = pose
                clock.sleep(PERIOD)
            poses = [*last, *targets_on_bus(bus.arm.received, bad)]
            bus.arm.received.clear()
            bad += broken_limits(np.array(poses), limits)
            seen, last = seen + len(poses) - len(last), poses[-2:]
    return seen, bad


def targets_on_bus(frames: Sequence[fr.Frame], bad: Counter[str]) -> list[FloatArray]:
    """Commanded poses (7,) in successive frames; frames of any other kind than mode, target and power on are counted as bad."""
    poses, parts = [], list[fr.Frame]()
    for frame in frames:
        if frame.can_id in fr.END_POSE_IDS:
            parts.append(frame)
        elif frame.can_id == fr.GRIPPER_ID:
            opening = fr.decode_gripper(frame).opening
            command = 1.0 - 2.0 * (opening + 0.01) / (geo.MAX_OPENING + 0.01)
            poses.append(pose_from_end_pose(fr.decode_end_pose(parts), command))
            parts = []
        elif not (frame.can_id == fr.MODE_ID or (frame.can_id == fr.POWER_ID and fr.decode_power(frame))):
            bad[f"frame 0x{frame.can_id:X}"] += 1
    return poses


def main(arguments: Sequence[str] | None = None) -> int:
    """Attack; returns 1 when a frame broke a limit."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.arm_adversary", description=__doc__.split("\n")[0])
    parser.add_argument("--targets", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    begin, total, asked, bad = time.perf_counter(), 0, 0, Counter[str]()
    sizes = [min(_PIECE, options.targets - k) for k in range(0, options.targets, _PIECE)]
    seeds = range(options.seed, options.seed + len(sizes))
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        for size, (seen, found) in zip(sizes, pool.map(run, sizes, seeds), strict=True):
            asked, total, bad = asked + size, total + seen, bad + found
            print(
                f"{asked} targets asked, {total} seen on the bus, outside the limits: {dict(bad) or 0} "
                f"({time.perf_counter() - begin:.0f} s)",
                flush=True,
            )
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
