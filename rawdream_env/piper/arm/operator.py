"""The person beside the arm: prepares scenes, says whether a task is done, and stops the arm."""

from __future__ import annotations

import atexit
import os
import sys
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from rawdream_env.errors import ArmFaultError, RawDreamError, shorten

if TYPE_CHECKING:
    from rawdream_env.piper.arm.fake_twin import TwinArm

STOP_KEYS = " \x1b"
"""Space and Escape."""
SUCCESS_KEY = "s"


class Operator(Protocol):
    """What ``PiperReal-v0`` asks. Methods that wait are called while the arm holds."""

    def arrange(self, instruction: str, task_id: int, seed: int) -> None:
        """The arm is home: arrange the scene, and return when hands are off the table. May raise, which ends the reset."""
        ...

    def watch(self, on: bool) -> None:
        """Look at keys from now on (the arm moves), or no longer (the episode is over). Questions end it, too."""
        ...

    def stop_requested(self) -> bool:
        """Whether to stop the arm now. Never waits; asked every 10 ms by the watchdog while the arm moves."""
        ...

    def done(self) -> bool:
        """Whether the task has been seen done. Never waits; asked after every chunk."""
        ...

    def success(self, instruction: str) -> bool | None:
        """Asked at the end of an episode: whether the task is done; None where that cannot be said."""
        ...

    def clear(self, fault: str) -> None:
        """The arm holds because of ``fault``: return when it may move again. May raise, which ends the reset."""
        ...


def ask_operator(operator: Operator, question: str, *about: Any) -> Any:
    """What the method ``question`` of an operator answers: True, False or None.

    Raises:
        ArmFaultError: the operator's code failed, or gave another answer.
    """
    try:
        answer = getattr(operator, question)(*about)
    except RawDreamError:
        raise
    except Exception as error:
        raise ArmFaultError(f"The operator's {question}() failed ({type(error).__name__}: {error}).") from error
    if answer is None or isinstance(answer, bool | np.bool_):
        return answer
    raise ArmFaultError(f"The operator's {question}() returned {shorten(answer)}, expected True, False or None.")


class TerminalOperator:
    """Asks in the terminal. While the arm moves, space or Escape stops it, and "s" says that the task is done."""

    def __init__(self) -> None:
        self._keys = ""
        self._mode: list[Any] | None = None

    def arrange(self, instruction: str, task_id: int, seed: int) -> None:
        """See :class:`Operator`."""
        self._ask(f"Arrange the scene for: {instruction!r}. Hands off the table, then Enter.", ("",))

    def watch(self, on: bool) -> None:
        """See :class:`Operator`; without a terminal there are no keys."""
        if not sys.stdin.isatty():
            return
        import termios
        import tty

        if on and self._mode is None:
            self._keys, self._mode = "", termios.tcgetattr(sys.stdin)
            tty.setcbreak(sys.stdin)
            atexit.register(self.watch, False)
        elif not on and self._mode is not None:
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, self._mode)
            self._mode = None

    def stop_requested(self) -> bool:
        """See :class:`Operator`."""
        if self._mode is not None:
            import select

            while select.select([sys.stdin], [], [], 0)[0] and (keys := os.read(sys.stdin.fileno(), 64)):
                self._keys += keys.decode("ascii", "ignore")
        return any(key in self._keys for key in STOP_KEYS)

    def done(self) -> bool:
        """See :class:`Operator`."""
        return SUCCESS_KEY in self._keys

    def success(self, instruction: str) -> bool | None:
        """See :class:`Operator`."""
        if self.done():
            return True
        answer = self._ask(f"Is it done: {instruction!r}? y, n, or x if it cannot be said:", ("y", "n", "x"))
        return {"y": True, "n": False}.get(answer)

    def clear(self, fault: str) -> None:
        """See :class:`Operator`."""
        if self._ask(f"{fault} The arm holds. Remove the cause; c to go on, q to give up:", ("c", "q")) == "q":
            raise ArmFaultError(f"{fault} The operator gave up.")

    def _ask(self, question: str, answers: tuple[str, ...]) -> str:
        self.watch(False)
        while True:
            try:
                answer = input(f"{question} ").strip().lower()
            except EOFError as error:
                raise ArmFaultError(f"there is no terminal to ask: {question} Pass operator= instead.") from error
            if answer in answers:
                return answer


class TwinOperator:
    """Stands beside a fake arm: arranges the twin's scenes, and sees at once when a task is done."""

    def __init__(self, arm: TwinArm, tasks: tuple[str, ...], layout: str) -> None:
        self.arm, self.tasks, self.layout = arm, tasks, layout

    def arrange(self, instruction: str, task_id: int, seed: int) -> None:
        """See :class:`Operator`."""
        self.arm.begin(seed, self.tasks[task_id], self.layout)

    def watch(self, on: bool) -> None:
        """See :class:`Operator`; there are no keys."""

    def stop_requested(self) -> bool:
        """See :class:`Operator`."""
        return False

    def done(self) -> bool:
        """See :class:`Operator`."""
        return self.arm.success()

    def success(self, instruction: str) -> bool | None:
        """See :class:`Operator`."""
        return self.arm.success()

    def clear(self, fault: str) -> None:
        """See :class:`Operator`; always."""
