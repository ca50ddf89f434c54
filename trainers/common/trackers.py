"""Experiment trackers beside TensorBoard: Weights & Biases and trackio. Both are optional packages with one interface."""

from __future__ import annotations

import importlib
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rawdream_env import files
from rawdream_env.errors import MissingDependencyError

TrackerName = Literal["wandb", "trackio"]
PROJECT = "rawdream"
"""Project of all runs, unless the environment variable WANDB_PROJECT or TRACKIO_PROJECT names another."""


class Trackers:
    """Sends what a run logs to ``names``; nothing when that is empty. A resumed run continues the tracker's run.

    Raises:
        MissingDependencyError: a tracker is not installed.
    """

    def __init__(self, names: Sequence[TrackerName], run_path: Path, config: Mapping[str, Any]) -> None:
        self._modules: list[Any] = [_import(name) for name in names]
        if not names:
            return
        id_file = run_path / "tracker_id"
        if not id_file.exists():
            files.atomic_write_text(id_file, secrets.token_hex(4))
        name = f"{run_path.resolve().name}-{files.read_text(id_file).strip()}"
        for module in self._modules:
            own = {"id": name, "dir": str(run_path)} if module.__name__ == "wandb" else {}
            project = os.environ.get(f"{module.__name__.upper()}_PROJECT", PROJECT)
            module.init(project=project, name=name, config=dict(config), resume="allow", **own)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Numbers of a step; the rest is left out."""
        numbers = {key: value for key, value in values.items() if isinstance(value, int | float) and key != "step"}
        for module in self._modules:
            module.log(numbers, step=step)

    def close(self) -> None:
        """End the trackers' runs. Idempotent."""
        for module in self._modules:
            module.finish()
        self._modules = []


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingDependencyError(
            f"report_to={name!r} needs {name}: pip install 'rawdream-env[{name}]', or leave it out."
        ) from error
