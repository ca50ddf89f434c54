"""The driver of a real Piper: actions of the environments in, guarded end poses out, and a watch over everything else.

An action is sent every 0.1 s while a policy is in control (``send_action``); between chunks, or while a person is late, the
driver holds the last commanded pose (``hold``), which it sends again every 0.1 s. A watchdog looks at the feedback every
10 ms. The first fault is latched: the driver holds the last commanded pose, and every further action raises
``ArmFaultError`` until an operator has looked (``clear_fault``). ``stop`` is the arm's own emergency stop, after which it
sinks slowly. The driver never cuts the power and never sends the reset, which makes the arm drop.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from rawdream_env.errors import ArmFaultError, CanBusError, InvalidActionError
from rawdream_env.piper import geometry as geo
from rawdream_env.piper.arm.clock import Clock, WallClock
from rawdream_env.piper.arm.end_pose import FloatArray, pose_from_end_pose
from rawdream_env.piper.arm.faults import PERIOD, DriverConfig, Fault, FaultKind, FeedbackWatch, distance
from rawdream_env.piper.arm.guard import ArmState, Guarded, Limits, Reason, guard, target_pose
from rawdream_env.piper.arm.link import PiperLink

WATCH_PERIOD = 0.01
"""Of the watchdog (s)."""
_AGREE = 0.005
"""End pose and joints of the feedback agree to this (m)."""
_WATCHDOG_TIMEOUT = 1.0
"""Longest wait for a late watchdog (s)."""
_SPACING = 0.8
"""Two targets are at least this many periods apart."""


@dataclass(frozen=True)
class Sent:
    """What was really sent: ``pose`` (7,) commanded, ``action`` (7,) in [-1, 1] that leads there from the pose before, and why
    it differs from what was asked for (0: it does not).
    """

    pose: FloatArray
    action: FloatArray
    reasons: Reason


class PiperDriver:
    """One arm. Call ``enable`` first, ``close`` at the end (or use it as a context).

    Owns: the link, and the watchdog. Its methods may be called from any thread.

    Args:
        link: to the arm.
        clock: default real time.
        limits: of the guard.
        config: times and thresholds.

    Attributes:
        fault: the latched fault, or None.
    """

    def __init__(
        self,
        link: PiperLink,
        *,
        clock: Clock | None = None,
        limits: Limits | None = None,
        config: DriverConfig | None = None,
    ) -> None:
        self.link, self.clock = link, clock or WallClock()
        self.limits, self.config = limits or Limits(), config or DriverConfig()
        self.fault: Fault | None = None
        self._state: ArmState | None = None
        self._following = self._late_is_fault = False
        self._sent_at = self._watched_at = self.clock.now()
        self._watcher = FeedbackWatch(self.config)
        self._checks: list[tuple[FaultKind, Callable[[], str | None]]] = []
        self._lock = threading.RLock()
        self._end_watch = self.clock.every(WATCH_PERIOD, self._watch, f"watchdog of {link.channel}")

    # ---- state ---------------------------------------------------------------------------------------------------------

    @property
    def pose(self) -> FloatArray:
        """The last commanded pose (7,)."""
        return self._commanded.pose.copy()

    @property
    def measured_pose(self) -> FloatArray:
        """The measured pose (7,): tool xyz, roll, pitch, yaw, and the gripper command that gives the measured opening."""
        with self._lock:
            feedback = self.link.feedback
            opening = np.clip((feedback.opening + 0.01) / (geo.MAX_OPENING + 0.01), 0.0, 1.0)
            return pose_from_end_pose(feedback.end_pose, 1.0 - 2.0 * opening)

    @property
    def _commanded(self) -> ArmState:
        if self._state is None:
            raise ArmFaultError("the arm is not enabled; call enable() first.")
        return self._state

    def add_check(self, kind: FaultKind, check: Callable[[], str | None]) -> Callable[[], None]:
        """Let the watchdog ask ``check``, which returns the sentence of a fault or None. Returns what ends this."""
        entry = (kind, check)
        with self._lock:
            self._checks.append(entry)

        def end() -> None:
            with self._lock:
                if entry in self._checks:
                    self._checks.remove(entry)

        return end

    # ---- what a caller does --------------------------------------------------------------------------------------------

    def enable(self) -> None:
        """Power all motors, and hold the arm where it is.

        Raises:
            ArmFaultError: no feedback, a motor without power or a fault of the arm after ``enable_timeout``, or the hand is
                outside the guard's limits.
            CanBusError: the bus does not work.
        """
        end = self.clock.now() + self.config.enable_timeout
        while problem := self._not_ready():
            if self.clock.now() >= end:
                raise ArmFaultError(f"the arm is not ready after {self.config.enable_timeout} s: {problem}")
            with self._lock:
                self.link.enable()
            self.clock.sleep(PERIOD)
            with self._lock:
                self.link.poll(self.clock.now())
        with self._lock:
            self.link.forget_problems()
            self._state = self._standing()
            self._sent_at = self.clock.now() - PERIOD
            self.hold()

    def send_action(self, action: ArrayLike, *, late_is_fault: bool = True) -> Sent:
        """Move by one action (7,) in [-1, 1], as far as the guard allows. Call it every 0.1 s until ``hold``.

        Args:
            action: (7,).
            late_is_fault: whether it is a fault if the next action does not come within ``policy_timeout``, as for a policy.
                Otherwise the arm holds until it comes, as for a person.

        Returns:
            What was really sent.

        Raises:
            ArmFaultError: a fault is latched; the arm holds. InvalidActionError: the action is not finite, or has another
                shape; the arm holds.
        """
        self.clock.sleep(self._sent_at + _SPACING * PERIOD - self.clock.now())
        self._await_watchdog()
        with self._lock:
            self._require_no_fault()
            state = self._commanded
            target = target_pose(state.pose, action)
            if target.shape != (7,) or not np.isfinite(target).all():
                self.hold()
                raise InvalidActionError(f"action {np.asarray(action)} must be 7 finite numbers; the arm holds.")
            sent = guard(state, target, self.limits)
            if not sent.allowed:
                self.hold()
                raise ArmFaultError(f"the guard refuses to move ({Reason(int(sent.reasons))}); the arm holds.")
            self._following, self._late_is_fault = True, late_is_fault
            self._send(sent)
            self._require_no_fault()
            moved = np.clip(geo.action_between(state.pose, sent.pose), -1.0, 1.0)
            return Sent(sent.pose.copy(), moved, Reason(int(sent.reasons)))

    def hold(self) -> None:
        """Hold the last commanded pose until the next action. No action is missed from now on."""
        with self._lock:
            self._following = False

    def move_to(self, pose: ArrayLike, speed: float = 0.4, tolerance: float = 0.01) -> None:
        """Move to a pose (7,) in steps of ``speed`` times the largest action, and wait until the arm is there.

        Raises:
            ArmFaultError: a fault, the guard does not let the arm get there, or it has not arrived within ``tolerance`` (m)
                2 s after the last step.
        """
        goal = np.clip(np.asarray(pose, np.float64), self.limits.pose_low, self.limits.pose_high)
        if not self._go(goal, speed):
            raise ArmFaultError(f"the guard does not let the arm move from {self.pose.round(3)} to {goal.round(3)}.")
        self.hold()
        for _ in range(20):
            if (miss := distance(self.link.feedback, self._commanded)) <= tolerance:
                return
            self.clock.sleep(PERIOD)
            self._require_no_fault()
        raise ArmFaultError(f"the arm is {miss * 1e3:.1f} mm from its target, allowed are {tolerance * 1e3:.1f} mm.")

    def move_over(self, pose: ArrayLike) -> None:
        """As ``move_to``, but first straight up to the height of the pose: out of what stands on the table, then across. A
        tilted tool goes up as far as the joints allow.
        """
        goal = np.asarray(pose, np.float64)
        up = np.append(self.pose[:6], goal[6])
        up[2] = max(up[2], goal[2])
        self._go(up, 0.4)
        self.move_to(goal)

    def _go(self, goal: FloatArray, speed: float) -> bool:
        """Steps towards a pose; False if the guard stops them before it."""
        still = 0
        for _ in range(1000):
            away = geo.action_between(self.pose, goal)[:6]
            if np.abs(away).max() < 1e-9 and self.pose[6] == goal[6]:
                return True
            before = self.pose
            self.send_action(np.append(np.clip(away, -speed, speed), goal[6]), late_is_fault=False)
            self.clock.sleep(PERIOD)
            still = still + 1 if np.allclose(before, self.pose, rtol=0, atol=1e-12) else 0
            if still > 1:  # a reversal stands still for one command
                break
        return False

    def latch(self, kind: FaultKind, message: str) -> None:
        """Latch a fault, unless there is one, and hold; after ``FaultKind.STOP``, the arm's emergency stop instead."""
        with self._lock:
            if self.fault is not None and not (kind == FaultKind.STOP != self.fault.kind):
                return
            self.fault = Fault(kind, message, self.clock.now())
            self._following = False
            self._send_hold()

    def stop(self, message: str = "An operator stopped the arm.") -> None:
        """Damped stop: the arm sinks slowly. It can be used again after its power has been off."""
        self.latch(FaultKind.STOP, message)

    def clear_fault(self) -> None:
        """Go on after a fault that an operator has looked at. Where the arm stands now is its new commanded pose.

        Raises:
            ArmFaultError: the cause is still there, or the arm was stopped.
        """
        with self._lock:
            if self.fault is not None and self.fault.kind == FaultKind.STOP:
                raise ArmFaultError(
                    f"{self.fault.message} Support the arm, switch its power off and on, and start again."
                )
            self.link.forget_problems()
            if problem := self._not_ready():
                raise ArmFaultError(f"the fault cannot be cleared: {problem}")
            self._state = self._standing()
            self.fault = None

    def close(self) -> None:
        """Hold, and let go of the bus. The motors keep their power, and the arm stays where it is. Again: nothing happens."""
        with self._lock:
            if self._state is not None:
                self._following = False
                self._send_hold()
            self._state = None
        self._end_watch()
        self.link.close()

    def __enter__(self) -> PiperDriver:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # ---- inside --------------------------------------------------------------------------------------------------------

    def _require_no_fault(self) -> None:
        if self.fault is not None:
            raise ArmFaultError(f"{self.fault.message} The arm holds; look at it, then call clear_fault().")

    def _await_watchdog(self) -> None:
        """Nothing is sent unwatched. On a busy computer the watchdog may be late; meanwhile the arm holds its last target."""
        end = self.clock.now() + _WATCHDOG_TIMEOUT
        while (late := self.clock.now() - self._watched_at) > PERIOD:
            if self.clock.now() >= end:
                self.latch(FaultKind.BUS, f"The watchdog has not run for {late * 1e3:.0f} ms.")
                return
            self.clock.sleep(WATCH_PERIOD)

    def _send(self, sent: Guarded) -> None:
        self._state = self._commanded.after(sent)
        self._sent_at = self.clock.now()
        try:
            self.link.send_target(sent, self.config.speed_percent)
        except CanBusError as error:
            self.latch(FaultKind.BUS, str(error))

    def _send_hold(self) -> None:
        """The last commanded pose once more; the emergency stop where that was asked for."""
        if self.fault is not None and self.fault.kind == FaultKind.STOP:
            self._sent_at = self.clock.now()
            with suppress(CanBusError):  # sent again in a moment
                self.link.stop()
        elif self._state is not None:
            pose = self._state.pose
            self._send(guard(ArmState(pose, pose), pose, self.limits))

    def _watch(self) -> None:
        """What the watchdog does; it never ends by itself."""
        with self._lock:
            now = self._watched_at = self.clock.now()
            try:
                self.link.poll(now)
                if self._state is None:
                    return
                if self.fault is None and (found := self._watcher.find(self.link.feedback, self._state, now)):
                    self.latch(*found)
                if self._following and (late := now - self._sent_at) > self.config.policy_timeout:
                    self._following = False
                    if self._late_is_fault:
                        self.latch(FaultKind.POLICY, f"No action came for {late * 1e3:.0f} ms.")
                for kind, check in list(self._checks):
                    if message := check():
                        self.latch(kind, message)
            except CanBusError as error:
                self.latch(FaultKind.BUS, str(error))
            except Exception as error:  # noqa: BLE001 - whatever a check raises, the arm must hold
                self.latch(FaultKind.BUS, f"The watchdog failed ({type(error).__name__}: {error}).")
            if not self._following and now - self._sent_at >= PERIOD - 1e-9:
                self._send_hold()

    def _not_ready(self) -> str:
        with self._lock:
            return self._watcher.not_ready(self.link.feedback, self.clock.now())

    def _standing(self) -> ArmState:
        """The arm at rest where it was measured; a hand slightly outside the limits is taken as on them."""
        measured = self.measured_pose
        inside = np.clip(measured, self.limits.pose_low, self.limits.pose_high)
        away, turned = np.abs(inside - measured)[:3].max(), np.abs(inside - measured)[3:6].max()
        state = ArmState.at_rest(inside, self.limits)
        held = guard(state, inside, self.limits)
        joints = geo.forward_kinematics(self.link.feedback.joints)[:3, 3]
        if away > geo.DPOS or turned > geo.DROT or not held.allowed:
            raise ArmFaultError(
                f"the hand stands at xyz {measured[:3].round(3)} m, rpy {measured[3:6].round(2)} rad, outside the limits "
                f"{self.limits.pose_low[:6]} to {self.limits.pose_high[:6]}. Lead it back by hand (teach button)."
            )
        if np.linalg.norm(joints - measured[:3]) > _AGREE:
            raise ArmFaultError(
                f"end pose and joints of the feedback disagree: tool at {measured[:3].round(3)} and {joints.round(3)} m. "
                "Check the arm's zero positions, and that it stands upright on its riser."
            )
        return state
