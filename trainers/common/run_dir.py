"""A run directory: configuration, metrics and checkpoints of one training run, resumable after any crash.

::

    run/
      config.json           the resolved configuration; compared on resume
      metrics.jsonl         one line per ``log``: deterministic values only, so a resumed run writes the same bytes
      timings.jsonl         one line per ``log_timings``: seconds, frames per second and other wall-clock values
      tensorboard/          both of them as curves (when the tensorboard package is installed)
      checkpoints/step_00000010/   tensors.safetensors, state.json, manifest.json (SHA-256 of each; lengths of the logs)

The logs are durable before the checkpoint that records their lengths. On resume the newest undamaged checkpoint is used
(``checkpoints.py``) and the logs are truncated to these lengths, so that weights, generators and log lines continue as if
the run had not been interrupted.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import logging
import math
import os
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rawdream_env import files
from rawdream_env.errors import RunDirError
from rawdream_env.trainers.common.checkpoints import Checkpoint, CheckpointFolder
from rawdream_env.trainers.common.trackers import TrackerName, Trackers

if TYPE_CHECKING:
    from torch import Tensor

_LOGS = ("metrics.jsonl", "timings.jsonl")
_RENAMED = {"out": "run_dir", "carry": "warp_last_frame"}
"""Settings that earlier versions stored under another name, at any depth."""
_RERUN = "Checkpoints are intact: free some space and rerun the same command to resume."
_logger = logging.getLogger(__name__)


class RunDir:
    """See the module's docstring. Use as a context manager, or call ``close``.

    ``config``: a mapping or a dataclass. ``resume``: continue the run found in ``path``; when False, a folder that
    already holds a run is refused. ``may_change``: top-level configuration keys that may differ on resume (such as the
    number of steps); the stored configuration is then brought up to date. ``added``: keys that earlier versions did not
    store, with the values their runs were made with; such a run's stored configuration stays without them. ``keep``: how
    many checkpoints to keep. ``report_to``: experiment trackers that also get what is logged.

    Raises ``RunDirError`` when the folder holds another configuration, is in use by another run, or unwritable.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        config: Any,
        *,
        resume: bool = True,
        may_change: Collection[str] = (),
        added: Mapping[str, Any] | None = None,
        keep: int = 2,
        tensorboard: bool = True,
        report_to: Sequence[TrackerName] = (),
    ) -> None:
        self.path = Path(path)
        self.config: dict[str, Any] = to_json(config)
        self._use_tensorboard = tensorboard
        self._writer: Any = None
        self._purge_step: int | None = None
        self._logs: dict[str, int] = {}
        self._unwritten: dict[str, bytes] = {}  # lines that the disk refused; ``save`` writes them first
        try:
            self._checkpoints = CheckpointFolder(self.path / "checkpoints", keep)
            self._lock = self._take_lock()
            try:
                self._settle_config(resume, may_change, added or {})
                self._checkpoints.tidy()
                files.remove_litter(self.path)
                self._trackers = Trackers(report_to, self.path, self.config)
            except BaseException:
                self._lock.close()
                raise
        except OSError as error:
            raise RunDirError(f"Cannot use the run directory {self.path}: {error}.") from error

    # -- metrics -----------------------------------------------------------------------------------------------------

    def log(self, step: int, **scalars: float | bool | str | None) -> None:
        """Append one line of deterministic values to ``metrics.jsonl``. Non-finite numbers are written as null."""
        self._append("metrics.jsonl", step, scalars)

    def log_timings(self, step: int, **scalars: float) -> None:
        """Append one line of wall-clock values to ``timings.jsonl``."""
        self._append("timings.jsonl", step, scalars)

    def read_metrics(self) -> list[dict[str, Any]]:
        """All whole lines of ``metrics.jsonl``."""
        return read_jsonl(self.path / "metrics.jsonl")

    def _append(self, name: str, step: int, scalars: Mapping[str, Any]) -> None:
        record = {"step": int(step), **{key: _scalar(value) for key, value in scalars.items()}}
        line = (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode()
        self._unwritten[name] = self._unwritten.get(name, b"") + line
        self._write_lines(name)
        self._trackers.log(step, record)
        writer = self._tensorboard()
        if writer is not None:
            for key, value in record.items():
                if key != "step" and isinstance(value, int | float):
                    writer.add_scalar(key, value, record["step"])

    def _write_lines(self, name: str) -> None:
        """Append the unwritten lines of a log, wholly or not at all."""
        lines = self._unwritten.get(name, b"")
        try:
            if name not in self._logs:
                self._logs[name] = os.open(self.path / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            length = os.fstat(self._logs[name]).st_size
            try:
                view = memoryview(lines)
                while view:
                    view = view[os.write(self._logs[name], view) :]
            except BaseException:
                os.ftruncate(self._logs[name], length)
                raise
        except OSError as error:
            raise RunDirError(f"Cannot write to {self.path / name}: {error}. {_RERUN}") from error
        self._unwritten.pop(name, None)

    def _tensorboard(self) -> Any:
        if self._use_tensorboard and self._writer is None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                self._use_tensorboard = False
                _logger.info("tensorboard is not installed: curves are in %s only.", self.path / "metrics.jsonl")
            else:
                self._writer = SummaryWriter(str(self.path / "tensorboard"), purge_step=self._purge_step)
        return self._writer

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any] | None = None) -> Path:
        """Write the checkpoint of ``step``, then remove all but the newest ``keep``. Returns its folder.

        ``state``: JSON values (a numpy generator's ``bit_generator.state`` is fine; a ``torch.Generator``'s
        ``get_state()`` belongs into ``tensors``). Raises ``CheckpointError`` for non-finite tensors and ``RunDirError``
        when the disk refuses; earlier checkpoints are intact in both cases.
        """
        for name in list(self._unwritten):
            self._write_lines(name)
        try:
            for descriptor in self._logs.values():
                os.fsync(descriptor)
        except OSError as error:
            raise RunDirError(f"Cannot write the logs in {self.path}: {error}. {_RERUN}") from error
        return self._checkpoints.save(step, tensors, to_json(state or {}), self._lengths())

    def load_latest(self) -> Checkpoint | None:
        """The newest undamaged checkpoint, or None in a fresh run; truncates the logs to their lengths at that moment.

        A damaged checkpoint, or one whose logs are shorter than it records, is skipped with a ``RuntimeWarning``. When
        every checkpoint is damaged, ``CheckpointError``: starting over silently would throw work away.
        """
        self._unwritten.clear()
        self._close_logs()
        try:
            for path in filter(Path.exists, (self.path / name for name in self._lengths())):
                files.require_regular(path)
            checkpoint = self._checkpoints.load_latest(self._lengths())
            for name, size in self._lengths().items():
                length = 0 if checkpoint is None else checkpoint.logs[name]
                if size > length:
                    os.truncate(self.path / name, length)
                _blank_broken_lines(self.path / name)
        except OSError as error:
            raise RunDirError(f"Cannot use the logs in {self.path}: {error}. Restore them from a copy.") from error
        if checkpoint is not None:
            self._purge_step = checkpoint.step + 1
        return checkpoint

    # -- the rest ----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Close the logs and release the folder. Idempotent."""
        self._close_logs()
        self._trackers.close()
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _close_logs(self) -> None:
        for descriptor in self._logs.values():
            os.close(descriptor)
        self._logs.clear()

    def _lengths(self) -> dict[str, int]:
        return {name: _size(self.path / name) for name in _LOGS}

    def _take_lock(self) -> Any:
        try:
            return files.lock_file(self.path / ".lock")
        except BlockingIOError as error:
            raise RunDirError(
                f"The run directory {self.path} is in use by another run. Wait for it, or choose another folder."
            ) from error

    def _settle_config(self, resume: bool, may_change: Collection[str], added: Mapping[str, Any]) -> None:
        stored_path = self.path / "config.json"
        if not stored_path.exists():
            files.atomic_write_json(stored_path, self.config)
            return
        if not resume:
            raise RunDirError(f"{self.path} already holds a run. Resume it (resume=True) or choose another folder.")
        content = files.read_json(stored_path, "restore it from a copy, or choose another folder", RunDirError)
        stored = {**added, **_current_names(content, self.config)}
        differing = [
            key
            for key in sorted({*stored, *self.config})
            if stored.get(key, _MISSING) != self.config.get(key, _MISSING)
        ]
        fatal = [key for key in differing if key not in may_change]
        if fatal:
            lines = ", ".join(f"{key}: {_show(stored, key)} -> {_show(self.config, key)}" for key in fatal[:10])
            raise RunDirError(
                f"{self.path} holds a run with another configuration ({lines}; stored -> given). Use the stored values "
                "to resume it, or choose another folder."
            )
        if differing:
            kept = {key: value for key, value in self.config.items() if key in content or key not in added}
            files.atomic_write_json(stored_path, kept)


_MISSING = object()


def _current_names(stored: Any, config: Any) -> Any:
    """``stored`` under the names of today, where ``config`` has those and not the old ones."""
    if not isinstance(stored, dict) or not isinstance(config, Mapping):
        return stored
    names = {key: _RENAMED[key] if key not in config and _RENAMED.get(key) in config else key for key in stored}
    return {new: _current_names(stored[key], config.get(new)) for key, new in names.items()}


def _show(config: Mapping[str, Any], key: str) -> str:
    return json.dumps(config[key], ensure_ascii=False) if key in config else "(absent)"


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _scalar(value: Any) -> float | int | bool | str | None:
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, str | int | float):
        return value
    raise TypeError(f"a metric must be a number, a string or None, not {type(value).__name__}")


def to_json(value: Any) -> Any:
    """Plain JSON values from dataclasses, mappings, sequences, paths, enums and numpy scalars."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, enum.Enum):
        return to_json(value.value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, list | tuple | set | frozenset):
        return [to_json(item) for item in (sorted(value) if isinstance(value, set | frozenset) else value)]
    if hasattr(value, "tolist"):
        return to_json(value.tolist())
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise TypeError(f"{type(value).__name__} cannot be stored as JSON")


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The complete lines of a JSON-lines file; a last line without newline (being written, or cut) is left out."""
    if not Path(path).exists():
        return []
    text = Path(path).read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].split("\n") if line.strip()]


def _blank_broken_lines(path: Path) -> None:
    """Replace lines that are no JSON by spaces, with a ``RuntimeWarning``: earlier versions kept a line that the disk had
    cut. The length stays, because checkpoints record it.
    """
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    broken = [number for number, line in enumerate(lines) if line.strip() and not _is_json(line)]
    if lines and lines[-1].strip() and len(lines) - 1 not in broken:
        broken.append(len(lines) - 1)  # without a newline the next line would continue it
    if not broken:
        return
    for number in broken:
        lines[number] = b" " * len(lines[number])
    if lines[-1]:
        lines[-1] = lines[-1][:-1] + b"\n"
    files.atomic_write_bytes(path, b"\n".join(lines))
    shown = ", ".join(str(number + 1) for number in broken[:5])
    warnings.warn(
        f"{path} had {len(broken)} lines that are no JSON (line {shown}); they are blank now.",
        RuntimeWarning,
        stacklevel=3,
    )


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True
