"""Two scripted drivers of the twin: an expert that carries out one relation, and play without a goal.

Both see the true object poses; neither is a policy. The expert makes demonstrations and bounds what is possible, play
makes the world model's data: grasps, placements, pushes, drops and mistakes in proportion.
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from rawdream_env.errors import InvalidOptionError
from rawdream_env.piper import geometry as geo
from rawdream_env.piper.relations import CONTAINERS, MOVABLE, SHAPES, Task, find_task, relation_index
from rawdream_env.piper.simulator.motions import (
    CLOSE,
    OPEN,
    Waypoint,
    follow,
    object_position,
    pick_waypoints,
    place_waypoints,
    top_height,
)
from rawdream_env.piper.simulator.twin import PiperTwin
from rawdream_env.types import Float32Array

FloatArray = NDArray[np.floating[Any]]

NOISE_SCALE: Final = np.array([1.0, 1.0, 1.0, 0.3, 0.3, 0.3])
"""Noise of an action's motion: a third of it on rotations."""


class ScriptedExpert:
    """Picks up object a, places it on or into object b, releases it, retreats and then hovers.

    Args:
        twin: a twin that has been reset with both objects on the table.
        task: a task, its name, or any ``on:a:b`` / ``in:a:b`` relation.
        rng: for the action noise only.
        noise: standard deviation of Gaussian noise on the motion (of the action range; a third of it on rotation).

    Closed loop: a grasp or placement that failed is tried again.
    """

    def __init__(self, twin: PiperTwin, task: str | Task, rng: np.random.Generator, noise: float = 0.0) -> None:
        self.task = find_task(task)
        if not {self.task.object_a, self.task.object_b} <= set(twin.present):
            raise InvalidOptionError(
                f"{self.task.name} needs {self.task.object_a} and {self.task.object_b}, but the table has "
                f"{', '.join(twin.present) or 'no objects (reset the twin first)'}."
            )
        self._twin, self._rng, self._noise = twin, rng, noise
        self._inside = self.task.relation.startswith("in:")
        self._holding = relation_index(f"holding:{self.task.object_a}")
        self._goal = relation_index(self.task.relation)
        self._queue: list[Waypoint] = []
        self._waited = 0
        self._stage = "start"

    @property
    def done(self) -> bool:
        """Released and retreated with the relation established."""
        return self._stage == "hover"

    def act(self) -> Float32Array:
        """Next action (7,)."""
        while True:
            if not self._queue:
                self._next_stage()
            waypoint = self._queue[0]
            action, reached = follow(self._twin.pose, waypoint)
            if waypoint.wait:
                self._waited += 1
                if self._waited >= waypoint.wait:
                    self._pop()
                break
            if not reached:
                break
            if self._stage == "hover":
                break
            self._pop()
        if self._noise:
            action[:6] += self._rng.normal(0.0, self._noise, 6) * NOISE_SCALE
        return np.clip(action, -1.0, 1.0).astype(np.float32)

    def _pop(self) -> None:
        self._queue.pop(0)
        self._waited = 0

    def _next_stage(self) -> None:
        twin, a, b = self._twin, self.task.object_a, self.task.object_b
        truth = twin.relations()
        if self._stage in ("place", "hover") and truth[self._goal]:
            self._stage = "hover"
            self._queue = [Waypoint(twin.pose[:3].copy(), float(twin.pose[5]), OPEN)]
        elif self._stage == "pick" and truth[self._holding]:
            self._stage = "place"
            self._queue = place_waypoints(twin, a, b, inside=self._inside, error=np.zeros(2))
        else:
            self._stage = "pick"
            lift = max(0.02, min(0.05, top_height(twin, b) - 0.005))
            self._queue = pick_waypoints(twin, a, offset=np.zeros(3), lift=lift)


class PlayPolicy:
    """Goal-free play: an endless sequence of random skills with random speed, noise and mistakes.

    Empty-handed it mostly grasps (also pushes, reaches, wanders, works the gripper); with an object it puts it on or
    into another, sets it down, drops it or carries it about. About seven grasps and placements in ten are precise, the
    others miss by 1 to 2 cm. Works with any objects of the scene.
    """

    def __init__(self, twin: PiperTwin, rng: np.random.Generator) -> None:
        self._twin, self._rng = twin, rng
        self._queue: list[Waypoint] = []
        self._steps = 0
        self._wander_left = 0
        self._drift = np.zeros(6)
        self._gripper = OPEN
        self._last_placed: str | None = None
        self.skill = "start"
        """Name of the skill in progress."""
        self._noise = 0.0

    def act(self) -> Float32Array:
        """Next action (7,)."""
        if not self._queue and not self._wander_left:
            self._choose()
        if self._wander_left:
            action = self._wander()
        else:
            waypoint = self._queue[0]
            action, reached = follow(self._twin.pose, waypoint)
            action[:6] += self._rng.normal(0.0, self._noise, 6) * NOISE_SCALE
            self._steps += 1
            slack = waypoint.tolerance + 0.3 * self._noise * geo.DPOS
            near = waypoint.xyz is None or bool(np.abs(waypoint.xyz - self._twin.pose[:3]).max() < slack)
            arrived = self._steps >= waypoint.wait if waypoint.wait else reached or near
            if arrived or self._steps >= waypoint.max_steps:
                self._queue.pop(0)
                self._steps = 0
        self._gripper = float(action[6])
        return np.clip(action, -1.0, 1.0).astype(np.float32)

    # --- choosing ----------------------------------------------------------------------------------------------------
    def _choose(self) -> None:
        rng = self._rng
        self._noise = float(rng.choice([0.0, 0.05, 0.12, 0.25], p=[0.35, 0.4, 0.18, 0.07]))
        speed = 1.0 if rng.random() < 0.5 else float(rng.uniform(0.6, 1.0))
        held = self._in_hand()
        self._steps = 0
        if held is not None:
            skills, odds = ["place_on", "place", "drop", "wander"], [0.57, 0.20, 0.09, 0.14]
        else:
            skills, odds = ["pick", "push", "reach", "wander", "grip"], [0.64, 0.11, 0.09, 0.11, 0.05]
        self.skill = str(rng.choice(skills, p=odds))
        if self.skill == "wander":
            self._wander_left = int(rng.integers(5, 14))
            if held is None and rng.random() < 0.3:
                self._gripper = -self._gripper
        elif held is not None:
            self._queue = self._with_object(held, speed)
        else:
            self._queue = self._empty_handed(speed)

    def _in_hand(self) -> str | None:
        if self._gripper < 0:
            return None
        truth = self._twin.relations()
        return next((n for n in self._twin.present if n != "stove" and truth[relation_index(f"holding:{n}")]), None)

    def _error(self, size: int, precise: float) -> FloatArray:
        """A small error, or in three cases of ten one of 1 to 2 cm."""
        rng = self._rng
        if rng.random() < 0.7:
            return rng.normal(0.0, precise, size)
        direction = rng.normal(size=size)
        return np.asarray(direction / np.linalg.norm(direction) * rng.uniform(0.008, 0.022))

    def _with_object(self, held: str, speed: float) -> list[Waypoint]:
        rng, twin = self._rng, self._twin
        others = [n for n in twin.present if n != held and self._reachable(n)]
        if self.skill == "drop":
            spot = self._spot(float(rng.uniform(0.05, 0.13)))
            yaw = float(twin.pose[5])
            return [Waypoint(spot, yaw, CLOSE, tolerance=0.015, speed=speed), Waypoint(None, yaw, OPEN, wait=3)]
        drop, retreat = float(rng.uniform(0.001, 0.009)), float(rng.uniform(0.04, 0.09))
        self._last_placed = held
        if self.skill == "place_on" and others:
            support = self._choose_support(held, others)
            inside = support in CONTAINERS and held not in CONTAINERS
            return place_waypoints(
                twin,
                held,
                support,
                inside=inside,
                error=self._error(2, 0.0035),
                drop=drop,
                clearance=float(rng.uniform(0.010, 0.035)),
                speed=speed,
                retreat=retreat,
            )
        self.skill = "place"
        return place_waypoints(
            twin,
            held,
            None,
            spot=self._spot(0.1)[:2],
            error=np.zeros(2),
            drop=drop,
            clearance=float(rng.uniform(0.02, 0.07)),
            speed=speed,
            turn=float(rng.normal(0.0, 0.4)),
            retreat=retreat,
        )

    def _choose_support(self, held: str, others: list[str]) -> str:
        """Any object; a sensible one (that can carry the held one) is three times as likely."""
        weights = np.array([3.0 if self._sensible(held, b) else 1.0 for b in others])
        return str(self._rng.choice(others, p=weights / weights.sum()))

    @staticmethod
    def _sensible(a: str, b: str) -> bool:
        return b == "stove" or (a not in CONTAINERS and b != "spoon" and not (a == "spoon" and b not in CONTAINERS))

    def _empty_handed(self, speed: float) -> list[Waypoint]:
        rng, twin = self._rng, self._twin
        yaw = float(twin.pose[5])
        candidates = [n for n in twin.present if n in MOVABLE and self._reachable(n)]
        if self.skill == "grip":
            return [Waypoint(None, yaw, -self._gripper, wait=int(rng.integers(2, 5)))]
        if self.skill == "reach" or not candidates:
            gripper = float(rng.choice([OPEN, CLOSE]))
            return [Waypoint(self._spot(), yaw + float(rng.normal(0, 0.5)), gripper, tolerance=0.01, speed=speed)]
        weights = np.array([0.35 if n == self._last_placed else 1.0 for n in candidates])  # leave what was just placed
        name = str(rng.choice(candidates, p=weights / weights.sum()))
        if self.skill == "push":
            return self._push(name, yaw, speed)
        offset = np.append(self._error(2, 0.0025), abs(rng.normal(0.0, 0.002)))
        return pick_waypoints(
            twin,
            name,
            offset=offset,
            turn=float(rng.normal(0.0, 0.08)),
            hover=float(rng.uniform(0.035, 0.065)),
            lift=float(rng.uniform(0.02, 0.07)),
            speed=speed,
            squeeze=int(rng.integers(3, 6)),
        )

    def _push(self, name: str, yaw: float, speed: float) -> list[Waypoint]:
        """Come down beside an object and sweep through it, low (slides it) or high (tumbles it)."""
        rng = self._rng
        at = object_position(self._twin, name)
        angle = float(rng.uniform(-math.pi, math.pi))
        along = np.array([math.cos(angle), math.sin(angle)])
        reach = SHAPES[name].half[0] + 0.035
        height = max(0.012, float(at[2]) + float(rng.choice([0.0, 0.012])))
        gripper = float(rng.choice([OPEN, CLOSE]))
        begin, end = at[:2] - reach * along, at[:2] + float(rng.uniform(-0.01, 0.05)) * along
        return [
            Waypoint(np.append(begin, 0.085), yaw, gripper, tolerance=0.01, speed=speed),
            Waypoint(np.append(begin, height), yaw, gripper, speed=speed),
            Waypoint(np.append(end, height), yaw, gripper, speed=speed, max_steps=12),
            Waypoint(np.append(end, 0.09), yaw, gripper, tolerance=0.02, speed=speed),
        ]

    def _reachable(self, name: str) -> bool:
        x, y, z = object_position(self._twin, name)
        return bool(0.18 < x < 0.39 and abs(y) < 0.185 and z > -0.01)

    def _spot(self, height: float | None = None) -> FloatArray:
        rng = self._rng
        z = float(rng.uniform(0.02, 0.18)) if height is None else height
        return np.array([rng.uniform(0.21, 0.36), rng.uniform(-0.14, 0.14), z])

    def _wander(self) -> FloatArray:
        """Smooth random motion, drawn back to the middle of the workspace."""
        pose = self._twin.pose
        self._wander_left -= 1
        kick = self._rng.normal(size=6) * np.array([0.42, 0.42, 0.3, 0.09, 0.09, 0.24])
        self._drift = 0.8 * self._drift + kick
        action = np.append(self._drift, self._gripper)
        action[:2] += 4.0 * (np.array([0.29, 0.0]) - pose[:2])
        action[2] += 0.3 * (pose[2] < 0.04) - 0.3 * (pose[2] > 0.15)
        action[3:6] -= 0.5 * pose[3:6]
        return action
