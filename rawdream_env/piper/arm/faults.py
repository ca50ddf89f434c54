"""The faults of a real arm, and how they are found in its feedback."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np

from rawdream_env.errors import InvalidOptionError
from rawdream_env.piper import geometry as geo
from rawdream_env.piper.arm.frames import ArmStatus
from rawdream_env.piper.arm.guard import ArmState

if TYPE_CHECKING:
    from rawdream_env.piper.arm.link import Feedback

PERIOD = 1.0 / geo.CONTROL_HZ
_MOVED = 0.005
"""Distance (m) from the commanded pose that a moving arm leaves within ``frozen_timeout``."""
_JUMP = 0.05
"""Change of a joint (rad) between two feedbacks, beyond what the arm can do, that counts as a jump."""
_GAP = 0.05
"""Between two looks at the feedback (s); after a longer one on a busy computer, the time of a frozen arm counts anew."""
_MOTOR_AGE = 1.0
"""Motors report less often than joints (s)."""


class FaultKind(StrEnum):
    """What has gone wrong."""

    SILENT = "silent"
    """No complete feedback for ``feedback_timeout``."""
    FROZEN = "frozen"
    """Feedback does not change although the arm is sent elsewhere."""
    JUMP = "jump"
    """Feedback jumps further than the arm can move."""
    LOSS = "loss"
    """Frames of the feedback are missing."""
    LAG = "lag"
    """The measured pose is far from the commanded one: the arm is blocked, or the feedback is late."""
    BUS = "bus"
    """The CAN bus is off, down or gone."""
    ARM = "arm"
    """The arm's controller reports a fault, or a motor has lost its power."""
    POLICY = "policy"
    """The next action did not come."""
    CAMERA = "camera"
    """The camera is frozen or gone."""
    STOP = "stop"
    """An operator pressed the stop key."""


@dataclass(frozen=True)
class Fault:
    """A latched fault: its kind, one sentence, and when it was latched (s of the driver's clock)."""

    kind: FaultKind
    message: str
    at: float


@dataclass(frozen=True)
class DriverConfig:
    """Times and thresholds of the driver."""

    speed_percent: int = 50
    """Of the arm's own speed limit (100 is about 3 rad/s per joint). Begin with 10 on a new set-up."""
    feedback_timeout: float = 0.05
    """Feedback older than this is missing (s). The arm sends it every 5 ms."""
    policy_timeout: float = 0.15
    """Longest time between two actions (s)."""
    frozen_timeout: float = 0.15
    """Time in which an arm that is sent elsewhere begins to move (s)."""
    max_lag: float = 0.04
    """Distance of the measured tool from the commanded one (m). A full step is 0.025 m."""
    max_loss: float = 0.05
    """Share of feedback frames that may be missing."""
    enable_timeout: float = 5.0
    """Longest wait for feedback and for power on all motors (s)."""

    def __post_init__(self) -> None:
        if self.speed_percent not in range(1, 101):
            raise InvalidOptionError(f"speed_percent={self.speed_percent} must be a whole number from 1 to 100.")
        for name, value in vars(self).items():
            if not 0 < value < float("inf"):
                raise InvalidOptionError(f"{name}={value} must be positive and finite.")
        if self.policy_timeout <= PERIOD:
            raise InvalidOptionError(f"policy_timeout={self.policy_timeout} must exceed the period, {PERIOD} s.")


class FeedbackWatch:
    """Finds faults in the feedback of an arm that is being commanded."""

    def __init__(self, config: DriverConfig) -> None:
        self.config = config
        self._near_at = self._asked_at = float("-inf")

    def find(self, feedback: Feedback, commanded: ArmState, now: float) -> tuple[FaultKind, str] | None:
        """The first fault at ``now``, as kind and sentence; None without one. Call it often."""
        config = self.config
        gap, self._asked_at = now - self._asked_at, now
        if (age := now - feedback.complete_at) > config.feedback_timeout:
            return FaultKind.SILENT, f"The arm has sent no complete feedback for {age * 1e3:.0f} ms."
        if feedback.jump > _JUMP:
            return FaultKind.JUMP, f"A measured joint jumped {feedback.jump:.2f} rad further than the arm can move."
        if feedback.loss > config.max_loss:
            return FaultKind.LOSS, f"{feedback.loss:.0%} of the feedback's frames are missing."
        if problem := arm_problem(feedback):
            return FaultKind.ARM, problem
        if (miss := distance(feedback, commanded)) > config.max_lag:
            return (
                FaultKind.LAG,
                f"The tool is {miss * 1e3:.0f} mm from where it was sent: blocked, or feedback is late.",
            )
        if miss <= _MOVED or gap > _GAP:  # what happened in a gap is not known
            self._near_at = now
        if miss > _MOVED and (still := now - max(feedback.changed_at, self._near_at)) > config.frozen_timeout:
            return (
                FaultKind.FROZEN,
                f"The measured joints have not changed for {still * 1e3:.0f} ms, {miss * 1e3:.0f} mm off.",
            )
        return None

    def not_ready(self, feedback: Feedback, now: float) -> str:
        """Why an arm that is not commanded cannot be used; empty if it can."""
        if now - feedback.complete_at > self.config.feedback_timeout or now - feedback.motors_at.min() > _MOTOR_AGE:
            return "no feedback. Check that the arm is powered and its cable is plugged in."
        return arm_problem(feedback)


def distance(feedback: Feedback, commanded: ArmState) -> float:
    """Of the measured tool (m) from the last commanded one, or from the one before, which it may be leaving."""
    tool = geo.forward_kinematics(feedback.joints)[:3, 3]
    return float(min(np.linalg.norm(tool - pose[:3]) for pose in (commanded.pose, commanded.before)))


def arm_problem(feedback: Feedback) -> str:
    """What the arm itself reports as a fault; empty without one."""
    if feedback.status != ArmStatus.NORMAL:
        known = feedback.status in list(ArmStatus)
        name = ArmStatus(feedback.status).name.lower().replace("_", " ") if known else f"code {feedback.status}"
        return f"The arm's controller reports a fault ({name})."
    if not feedback.motors.all():
        return f"The motors of joints {(np.flatnonzero(~feedback.motors) + 1).tolist()} have no power."
    return ""
