"""Named errors. Each message states what happened, with the numbers, and what to do next.

Errors that a user can cause also derive from ``ValueError`` or ``RuntimeError``, so that ordinary handlers catch them.
"""

from __future__ import annotations

MAX_MESSAGE = 600
"""Characters of an error's message: about three lines of a terminal and a path."""


class RawDreamError(Exception):
    """Base of every error this package raises on purpose.

    Messages quote foreign files. ``str`` replaces control characters and shortens the middle, so that what happened and
    what to do next stay readable; ``args`` has the whole text.
    """

    def __str__(self) -> str:
        """The message, printable and at most about ``MAX_MESSAGE`` long."""
        text = "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in super().__str__())
        if text.count("\n") > 2:  # of another library: three lines are enough
            text = " ".join(text.split())
        if len(text) <= MAX_MESSAGE:
            return text
        return f"{text[: MAX_MESSAGE - 200]} ... {text[-190:]}"


class InvalidActionError(RawDreamError, ValueError):
    """Actions of the wrong shape, dtype or range, or not finite."""


class CanFrameError(RawDreamError, ValueError):
    """A CAN frame has another identifier, length or content than expected."""


class CameraError(RawDreamError, RuntimeError):
    """A camera cannot be opened, or gives no frames."""


class StaleFrameError(CameraError):
    """The newest frame of a camera is too old to act on."""


class CalibrationError(RawDreamError, ValueError):
    """Points that do not determine a camera."""


class CanBusError(RawDreamError, RuntimeError):
    """The CAN bus is off, down or gone."""


class ArmFaultError(RawDreamError, RuntimeError):
    """The arm has stopped because of a fault, or cannot be used yet. It holds its pose until an operator clears it."""


class InvalidOptionError(RawDreamError, ValueError):
    """An environment or wrapper option that does not exist or does not fit the others."""


class ResetNeededError(RawDreamError, RuntimeError):
    """``step`` was called before ``reset``, or on an episode that is over while autoreset is disabled."""


class ClosedEnvironmentError(RawDreamError, RuntimeError):
    """A closed environment was used."""


class OffloadedError(RawDreamError, RuntimeError):
    """A dream was used while its world model is offloaded to host memory."""


class CheckpointError(RawDreamError, ValueError):
    """A checkpoint is missing, damaged, of the wrong kind, or does not match its configuration."""


class CausalAttentionError(RawDreamError, RuntimeError):
    """A language model attends to earlier tokens only, where all tokens must see each other."""


class DatasetError(RawDreamError, ValueError):
    """A data set folder is missing, damaged or incomplete."""


class RendererError(RawDreamError, RuntimeError):
    """No working OpenGL renderer for the simulator."""


class SimulatorError(RawDreamError, RuntimeError):
    """The simulator or one of its worker processes failed."""


class MissingAssetsError(RawDreamError, FileNotFoundError):
    """Files that a simulator needs, and that are not part of its package, are not on this machine."""


class ProtocolMismatchError(RawDreamError, ValueError):
    """Results of different evaluation protocols, which are not comparable."""


class WorkerStoppedError(RawDreamError, RuntimeError):
    """A worker process of a pool is stopped or stuck."""


class MissingDependencyError(RawDreamError, ImportError):
    """An optional package is not installed."""


class RunDirError(RawDreamError, ValueError):
    """A run directory cannot be resumed: it has another configuration, is damaged or is locked."""


class JudgeUnavailableError(RawDreamError, RuntimeError):
    """The judge cannot be reached."""


class JudgeError(RawDreamError, TypeError):
    """A judge did not return one verdict per video."""


class NotEnoughMemoryError(RawDreamError, MemoryError):
    """A request does not fit into free memory; nothing has been allocated."""


def shorten(value: object, limit: int = 160) -> str:
    """``repr`` of a foreign value for a message: one line without control characters, at most about ``limit`` long."""
    text = repr(value)
    if len(text) <= limit:
        return text
    total = f" ({len(value)} in all)" if isinstance(value, list | tuple | dict | set) else ""
    return f"{text[:limit]}...{total}"
