"""What a person can hold: keyboard, gamepad, or a file of key presses. Each gives one action per control step (10 Hz).

Directions are those of the picture, which shows the arm from the front: left is left in the picture (-y), and "away" is
towards the base (-x). Without a key for the gripper, its command stays.
"""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from rawdream_env.errors import InvalidOptionError, MissingDependencyError
from rawdream_env.files import read_text
from rawdream_env.piper.geometry import FloatArray
from rawdream_env.types import ACTION_DIM, Float32Array

X, Y, Z, ROLL, PITCH, YAW, GRIPPER = range(ACTION_DIM)
MOTIONS: dict[str, tuple[int, float]] = {
    "w": (X, -1.0), "s": (X, 1.0), "a": (Y, -1.0), "d": (Y, 1.0), "r": (Z, 1.0), "f": (Z, -1.0),
    "q": (YAW, -1.0), "e": (YAW, 1.0), "t": (PITCH, 1.0), "g": (PITCH, -1.0), "y": (ROLL, 1.0), "h": (ROLL, -1.0),
}  # fmt: skip
"""Key -> component of the action and its sign."""
GRIPPER_KEYS = {"space": 1.0, "o": -1.0}
"""Closes and opens."""
SPEEDS = {"1": 0.25, "2": 0.5, "3": 1.0}
"""Of full speed, from this key on."""
HELP = (
    "w s a d: move in the picture; r f: up, down; q e: turn; t g y h: tilt; space: close, o: open; 1 2 3: speed;\n"
    "enter: end and keep the episode; backspace: end and discard it; escape: quit."
)


class Event(Enum):
    """What the person wants besides motion."""

    KEEP = "keep"
    DISCARD = "discard"
    QUIT = "quit"


EVENT_KEYS = {"enter": Event.KEEP, "backspace": Event.DISCARD, "escape": Event.QUIT}
_KEYS = {*MOTIONS, *GRIPPER_KEYS, *SPEEDS, *EVENT_KEYS}


@dataclass(frozen=True)
class Command:
    """One control step: ``action`` (7,) in [-1, 1]. With an ``event`` it is not carried out."""

    action: Float32Array
    event: Event | None = None


class Operator(Protocol):
    """The person."""

    def command(self, pose: FloatArray) -> Command:
        """The command for an arm whose commanded pose is ``pose`` (7,); does not wait."""
        ...

    def close(self) -> None:
        """Free the device. Closing again does nothing."""
        ...


def hold(pose: FloatArray) -> Float32Array:
    """The action (7,) that changes nothing."""
    action = np.zeros(ACTION_DIM, np.float32)
    action[GRIPPER] = pose[GRIPPER]
    return action


class Keys:
    """Pressed keys as commands; the speed is kept from step to step."""

    def __init__(self) -> None:
        self.speed = 1.0

    def command(self, keys: Collection[str], pose: FloatArray) -> Command:
        """The command of the ``keys`` that are pressed in this step."""
        action = hold(pose)
        for key in keys:
            self.speed = SPEEDS.get(key, self.speed)
            action[GRIPPER] = GRIPPER_KEYS.get(key, action[GRIPPER])
        for key in keys & MOTIONS.keys():
            axis, sign = MOTIONS[key]
            action[axis] += sign * self.speed
        return Command(action, next((EVENT_KEYS[key] for key in EVENT_KEYS if key in keys), None))


class Keyboard:
    """Keys of the terminal: a step's keys are those that arrived since the step before.

    A terminal repeats a held key after a pause of its own, so a tap is one step.

    Args:
        fd: the terminal, default the standard input.

    Raises:
        InvalidOptionError: there is no terminal.
    """

    _NAMES = {" ": "space", "\r": "enter", "\n": "enter", "\x7f": "backspace", "\b": "backspace"}  # noqa: RUF012
    _SEQUENCES = {"\x1b[A": "w", "\x1b[B": "s", "\x1b[C": "d", "\x1b[D": "a", "\x1b": "escape"}  # noqa: RUF012

    def __init__(self, fd: int | None = None) -> None:
        import termios
        import tty

        self.fd = sys.stdin.fileno() if fd is None else fd
        if not os.isatty(self.fd):
            raise InvalidOptionError("the keyboard needs a terminal; run in one, or give a file of key presses.")
        self._before: list[Any] | None = termios.tcgetattr(self.fd)
        self._keys = Keys()
        tty.setcbreak(self.fd)

    def command(self, pose: FloatArray) -> Command:
        """See :class:`Operator`."""
        text = ""
        while select.select([self.fd], [], [], 0.0)[0]:
            got = os.read(self.fd, 1024).decode(errors="ignore")
            if not got:  # the terminal is gone
                return Command(hold(pose), Event.QUIT)
            text += got
        keys = set()
        for sequence, key in self._SEQUENCES.items():
            if sequence in text:
                keys.add(key)
                text = text.replace(sequence, "")
        return self._keys.command(keys | {self._NAMES.get(c, c.lower()) for c in text}, pose)

    def close(self) -> None:
        """Give the terminal back as it was."""
        import termios

        if self._before is not None:
            termios.tcsetattr(self.fd, termios.TCSANOW, self._before)
            self._before = None


class ScriptedKeys:
    """Key presses of a file, step by step; at its end it quits.

    A line is a number of steps and the keys pressed in each of them, such as ``12 w r`` or ``1 enter``. Text after # is a
    comment.

    Raises:
        InvalidOptionError: a line is not readable; the message has its number.
    """

    def __init__(self, path: Path) -> None:
        self._steps: list[set[str]] = []
        for number, line in enumerate(read_text(path).splitlines(), start=1):
            words = line.partition("#")[0].split()
            if not words:
                continue
            unknown = sorted(set(words[1:]) - _KEYS)
            if not words[0].isdecimal() or unknown or int(words[0]) > 100_000:
                raise InvalidOptionError(
                    f"{path}, line {number}: {line.strip()[:60]!r} is not a number of steps and keys "
                    f"({', '.join(unknown) or words[0][:20]}). Keys: {' '.join(sorted(_KEYS))}."
                )
            self._steps += [set(words[1:])] * int(words[0])
        self._keys, self._next = Keys(), 0

    def command(self, pose: FloatArray) -> Command:
        """See :class:`Operator`."""
        if self._next == len(self._steps):
            return Command(hold(pose), Event.QUIT)
        self._next += 1
        return self._keys.command(self._steps[self._next - 1], pose)

    def close(self) -> None:
        """Nothing to free."""


class Gamepad:
    """A gamepad (package ``pygame``). Left stick: move in the picture. Right stick: up, down and turn. Cross: tilt. A: close,
    B: open. Start: end and keep the episode; Back: end and discard it; Guide: quit.

    Raises:
        MissingDependencyError: pygame is not installed. InvalidOptionError: no gamepad is plugged in.
    """

    _STICKS: Sequence[tuple[int, int, float]] = ((1, X, 1.0), (0, Y, 1.0), (4, Z, -1.0), (3, YAW, 1.0))
    _EVENTS = {7: Event.KEEP, 6: Event.DISCARD, 8: Event.QUIT}  # noqa: RUF012
    _DEAD = 0.12
    """A stick at rest does not read exactly 0."""

    def __init__(self, number: int = 0) -> None:
        try:
            import pygame
        except ModuleNotFoundError as error:
            raise MissingDependencyError("a gamepad needs pygame: pip install pygame.") from error
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # no window
        pygame.init()
        if pygame.joystick.get_count() <= number:
            found = pygame.joystick.get_count()
            raise InvalidOptionError(f"gamepad {number} is not there ({found} found); plug it in, or use the keyboard.")
        self._pygame, self._pad = pygame, pygame.joystick.Joystick(number)
        self._held: set[int] = set()

    def command(self, pose: FloatArray) -> Command:
        """See :class:`Operator`."""
        self._pygame.event.pump()
        action = hold(pose)
        for stick, axis, sign in self._STICKS:
            value = self._pad.get_axis(stick)
            action[axis] = sign * np.clip(value, -1, 1) if abs(value) > self._DEAD else 0.0
        if self._pad.get_numhats():
            action[ROLL], action[PITCH] = self._pad.get_hat(0)
        for button, gripper in ((0, 1.0), (1, -1.0)):
            action[GRIPPER] = gripper if self._pad.get_button(button) else action[GRIPPER]
        held = {button for button in self._EVENTS if self._pad.get_button(button)}
        pressed, self._held = held - self._held, held  # a button that stays down is one event
        return Command(action, next((self._EVENTS[button] for button in sorted(pressed)), None))

    def close(self) -> None:
        """Free the gamepad."""
        self._pygame.quit()
