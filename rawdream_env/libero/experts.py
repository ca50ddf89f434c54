"""Scripted experts for three tasks of LIBERO-Goal: pick and place, an articulated object, and a push.

An expert sees the simulator's state (``LiberoSimVectorEnv.truth``) before every chunk and plans the chunk's actions from it.
It is a ``Policy``, so that everything that runs a policy in the simulator runs it too::

    env = make_env("rawdream/LiberoGoalSim-v0", 4, task="turn_on_the_stove")
    for rollout in run_episodes(env, starts, LiberoExpert()):
        print(rollout.success_any)

A task's script is a generator: it is sent what it sees and yields where the gripper moves during the next chunk. Positions are
in metres in the world's frame: x points away from the robot, y to its left, z up.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rawdream_env.errors import InvalidOptionError
from rawdream_env.libero.scene import SceneTruth
from rawdream_env.seeding import NoiseKey
from rawdream_env.types import ACTION_DIM, PolicyOutput

Position = NDArray[np.float64]
_OPEN, _CLOSED = -1.0, 1.0
_FULL_STEP = 0.013
"""How far (m) the gripper moves in a control step of an action of 1, once it is in motion."""
_UP = np.array([0.0, 0.0, 1.0])


@dataclass(frozen=True)
class Aim:
    """Where the gripper moves during the next chunk, with which fingers, at which share of full speed; ``turn`` is the
    action about the vertical axis.
    """

    target: Position
    fingers: float
    speed: float = 1.0
    turn: float = 0.0


Script = Generator[Aim, SceneTruth, None]


def put_bowl_on_plate(see: SceneTruth) -> Script:
    """Pinch the bowl's rim, lift it, lower it onto the plate. Try again when it has slipped."""
    bowl, plate = "akita_black_bowl_1_main", "plate_1_main"
    rim = np.array([0.0, 0.045, 0.022])  # from the middle of the bowl's foot to its rim, at the robot's left

    def over_plate(see: SceneTruth) -> Position:
        return see.bodies[plate] + see.gripper - see.bodies[bowl]

    while True:
        see = yield from reach(see, lambda s: s.bodies[bowl] + rim + 0.09 * _UP, _OPEN)
        see = yield from reach(see, lambda s: s.bodies[bowl] + rim, _OPEN, speed=0.5)
        see = yield from rest(see, _CLOSED)
        height = see.bodies[bowl][2]
        see = yield from reach(see, lambda s: s.gripper * [1, 1, 0] + 1.06 * _UP, _CLOSED)
        if see.bodies[bowl][2] < height + 0.05:
            continue
        see = yield from reach(see, lambda s: over_plate(s) + 0.1 * _UP, _CLOSED)
        see = yield from reach(see, lambda s: over_plate(s) + 0.015 * _UP, _CLOSED, speed=0.5)
        see = yield from rest(see, _OPEN)
        see = yield from reach(see, lambda s: s.gripper * [1, 1, 0] + 1.05 * _UP, _OPEN)


def turn_on_stove(see: SceneTruth) -> Script:
    """Grasp the bar of the knob and turn the wrist."""
    knob = see.bodies["flat_stove_1_button"] + 0.035 * _UP
    see = yield from reach(see, lambda _: knob + 0.1 * _UP, _OPEN)
    see = yield from reach(see, lambda _: knob, _OPEN, speed=0.5)
    see = yield from rest(see, _CLOSED)
    for _ in range(8):
        if see.joints["flat_stove_1_button"] > 0.8:
            break
        see = yield Aim(knob, _CLOSED, turn=0.5)
    see = yield from rest(see, _OPEN)
    see = yield from reach(see, lambda s: s.gripper * [1, 1, 0] + 1.1 * _UP, _OPEN)


def push_plate_to_stove_front(see: SceneTruth) -> Script:
    """Pinch the plate's rim at the robot's left and slide it over the table. Try again when it has slipped."""
    plate, goal = "plate_1_main", "main_table_stove_front_region"
    rim = np.array([0.0, 0.06, 0.012])

    def way(see: SceneTruth) -> Position:
        return (see.sites[goal] - see.bodies[plate]) * [1, 1, 0]

    while np.linalg.norm(way(see)) > 0.02:
        see = yield from reach(see, lambda s: s.bodies[plate] + rim + 0.07 * _UP, _OPEN, within=0.03)
        see = yield from reach(see, lambda s: s.bodies[plate] + rim, _OPEN, speed=0.7, chunks=4)
        see = yield from rest(see, _CLOSED)
        held = see.gripper - see.bodies[plate]
        for _ in range(8):
            if np.linalg.norm(way(see)) < 0.02 or np.linalg.norm(see.gripper - see.bodies[plate] - held) > 0.03:
                break
            see = yield Aim(see.gripper * [1, 1, 0] + way(see) + 0.905 * _UP, _CLOSED, 0.5)
        see = yield from rest(see, _OPEN)
        see = yield from reach(see, lambda s: s.gripper * [1, 1, 0] + 1.0 * _UP, _OPEN, within=0.03)


SCRIPTS: dict[str, Callable[[SceneTruth], Script]] = {
    "put_the_bowl_on_the_plate": put_bowl_on_plate,
    "turn_on_the_stove": turn_on_stove,
    "push_the_plate_to_the_front_of_the_stove": push_plate_to_stove_front,
}
"""Name of a task of ``libero_goal`` -> its script."""


def reach(
    see: SceneTruth,
    target: Callable[[SceneTruth], Position],
    fingers: float,
    speed: float = 1.0,
    within: float = 0.012,
    chunks: int = 8,
) -> Generator[Aim, SceneTruth, SceneTruth]:
    """Move until the gripper is ``within`` so many metres of ``target`` (computed once per chunk), for at most so many
    chunks.
    """
    for _ in range(chunks):
        if np.linalg.norm(target(see) - see.gripper) < within:
            break
        see = yield Aim(target(see), fingers, speed)
    return see


def rest(see: SceneTruth, fingers: float) -> Generator[Aim, SceneTruth, SceneTruth]:
    """Open or close the fingers for a chunk."""
    see = yield Aim(see.gripper, fingers)
    return see


class LiberoExpert:
    """Carries out the scripts of ``SCRIPTS``; rows of other tasks are an error. It has no log-probabilities.

    Args:
        chunk_len: control steps in a chunk of the environment.

    Raises:
        InvalidOptionError: a row's task has no script.
    """

    def __init__(self, chunk_len: int = 8) -> None:
        self.chunk_len = chunk_len
        self._scripts: dict[NoiseKey, Script] = {}
        self._seen: list[SceneTruth | None] = []

    def look(self, env: Any, rows: Sequence[int]) -> None:
        """See :class:`SupportsLook`; ``env`` is a ``LiberoSimVectorEnv``."""
        self._seen = env.unwrapped.truth(rows)

    def act(
        self, images: Any, instructions: Sequence[str], *, temperature: float, keys: Sequence[NoiseKey]
    ) -> PolicyOutput:
        """The next chunk of every row; ``temperature`` has no effect."""
        import torch

        chunks = [self._chunk(*row) for row in zip(instructions, keys, self._seen, strict=True)]
        actions = torch.from_numpy(np.stack(chunks).astype(np.float32))
        nothing = torch.zeros(len(chunks), self.chunk_len * ACTION_DIM)
        return PolicyOutput(actions, nothing.long(), nothing)

    def logprobs(self, images: Any, instructions: Sequence[str], tokens: Any, *, temperature: float) -> Any:
        """A script has none."""
        raise InvalidOptionError("a scripted expert has no log-probabilities; train another policy.")

    def _chunk(self, instruction: str, key: NoiseKey, see: SceneTruth | None) -> NDArray[np.float64]:
        still = np.zeros((self.chunk_len, ACTION_DIM))
        still[:, -1] = _OPEN
        if see is None:
            return still
        episode = key.at(chunk=0)
        try:
            if key.chunk == 0:
                self._scripts[episode] = script_of(instruction)(see)
                return _steps(next(self._scripts[episode]), see, self.chunk_len)
            return _steps(self._scripts[episode].send(see), see, self.chunk_len)
        except (StopIteration, KeyError):  # the script is over
            self._scripts.pop(episode, None)
            return still


def script_of(instruction: str) -> Callable[[SceneTruth], Script]:
    """The script of a task, by its name or instruction.

    Raises:
        InvalidOptionError: there is none.
    """
    name = instruction.replace(" ", "_")
    if name not in SCRIPTS:
        raise InvalidOptionError(f"there is no scripted expert for {name!r}; choose among {', '.join(SCRIPTS)}.")
    return SCRIPTS[name]


def _steps(aim: Aim, see: SceneTruth, count: int) -> NDArray[np.float64]:
    """``count`` actions towards an aim: half of what is left in every control step, as far as the speed allows."""
    actions = np.zeros((count, ACTION_DIM))
    position = see.gripper.copy()
    for action in actions:
        action[:3] = np.clip((aim.target - position) / (2 * _FULL_STEP), -aim.speed, aim.speed)
        action[5], action[6] = aim.turn, aim.fingers
        position = position + action[:3] * _FULL_STEP
    return actions
