"""The checkpoints of a run: folders that are whole or absent, whenever the process is killed.

A folder is written under a temporary name, synced, and renamed. ``manifest.json`` holds the SHA-256 of its files, the
lengths of the run's logs, and a checksum of itself. A folder that does not match it is skipped on resume.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rawdream_env import files
from rawdream_env.errors import CheckpointError, RunDirError

if TYPE_CHECKING:
    from torch import Tensor

_STEP = re.compile(r"step_(\d{8,})")
_FILES = ("tensors.safetensors", "state.json")
_FORMAT = 2  # format 1 has no checksum of the manifest itself


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What ``RunDir.save`` was given, read back: tensors on the CPU, ``state`` as JSON values.

    ``logs``: lengths of the run's logs when it was made.
    """

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]
    path: Path
    logs: dict[str, int]


class CheckpointFolder:
    """The newest ``keep`` checkpoints of a run, in ``path``."""

    def __init__(self, path: Path, keep: int) -> None:
        self.path, self._keep = path, max(1, keep)
        path.mkdir(parents=True, exist_ok=True)

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], logs: Mapping[str, int]) -> Path:
        """Write the checkpoint of ``step``, then remove all but the newest ones. Returns its folder."""
        target = self.path / f"step_{step:08d}"
        temporary = self.path / f".tmp-{target.name}"
        content = {
            "tensors.safetensors": files.serialize_safetensors(tensors, where=target / "tensors.safetensors"),
            "state.json": json.dumps(state, allow_nan=False).encode(),
        }
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            for name, data in content.items():
                files.write_bytes_synced(temporary / name, data)
            manifest = {
                "format": _FORMAT,
                "step": int(step),
                "files": {name: files.sha256_file(temporary / name) for name in content},
                "logs": dict(logs),
            }
            manifest["checksum"] = files.json_sha256(manifest)
            files.write_bytes_synced(temporary / "manifest.json", json.dumps(manifest, indent=2).encode())
            files.fsync_folder(temporary)
            self._publish(temporary, target)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise RunDirError(
                f"Cannot write the checkpoint of step {step} to {target}: {error}. Earlier checkpoints are intact: "
                "free some space and rerun the same command to resume."
            ) from error
        self._prune()
        return target

    def load_latest(self, logs: Mapping[str, int]) -> Checkpoint | None:
        """The newest undamaged checkpoint, or None when there are none. ``logs``: the sizes of the run's logs now.

        Raises:
            CheckpointError: all are damaged; starting over silently would throw work away.
        """
        folders = self._folders()
        for folder in reversed(folders):
            try:
                return _read(folder, logs)
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                warnings.warn(f"Checkpoint {folder} is damaged and is skipped: {error}", RuntimeWarning, stacklevel=3)
        if folders:
            raise CheckpointError(
                f"All {len(folders)} checkpoints in {self.path} are damaged (the warnings list why). Restore one and the "
                "logs from a copy, or remove that folder to restart this run."
            )
        return None

    def tidy(self) -> None:
        """Undo what a killed process left behind."""
        for entry in self.path.iterdir():
            if entry.name.startswith(".old-"):
                original = entry.with_name(entry.name.removeprefix(".old-"))
                if not original.exists():
                    os.rename(entry, original)
                else:
                    shutil.rmtree(entry, ignore_errors=True)
            elif entry.name.startswith(".tmp-"):
                shutil.rmtree(entry, ignore_errors=True)

    def _publish(self, temporary: Path, target: Path) -> None:
        aside = target.with_name(f".old-{target.name}")
        if target.exists():  # a folder cannot be replaced by rename; ``tidy`` undoes this if we are killed in between
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(target, aside)
        os.rename(temporary, target)
        files.fsync_folder(self.path)
        shutil.rmtree(aside, ignore_errors=True)

    def _folders(self) -> list[Path]:
        found = [entry for entry in self.path.iterdir() if _STEP.fullmatch(entry.name) and entry.is_dir()]
        return sorted(found, key=lambda entry: int(entry.name.removeprefix("step_")))

    def _prune(self) -> None:
        for folder in self._folders()[: -self._keep]:
            doomed = folder.with_name(f".tmp-{folder.name}")  # rename first: a half-removed folder must not look whole
            with contextlib.suppress(OSError):
                os.rename(folder, doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def _read(folder: Path, logs: Mapping[str, int]) -> Checkpoint:
    manifest = files.read_json(folder / "manifest.json")
    _check_manifest(manifest, folder, logs)
    for name, digest in manifest["files"].items():
        if files.sha256_file(folder / name) != digest:
            raise CheckpointError(f"{folder / name} does not match its SHA-256")
    state = files.read_json(folder / "state.json")
    tensors = files.load_safetensors(folder / "tensors.safetensors")
    return Checkpoint(manifest["step"], tensors, state, folder, {name: manifest["logs"][name] for name in logs})


def _check_manifest(manifest: dict[str, Any], folder: Path, logs: Mapping[str, int]) -> None:
    """Raise ``CheckpointError`` unless the manifest is intact, of ``folder``, and not ahead of the logs."""
    path, known = folder / "manifest.json", (1, _FORMAT)
    if (version := manifest.get("format")) not in known:
        raise CheckpointError(f"{path} has format {version!r}, expected one of {known}")
    if manifest.pop("checksum", None) != (files.json_sha256(manifest) if version > 1 else None):
        raise CheckpointError(f"{path} does not match its own checksum")
    if manifest["step"] != int(folder.name.removeprefix("step_")) or set(manifest["files"]) != set(_FILES):
        raise CheckpointError(f"{path} does not belong to this folder")
    for name, size in logs.items():
        length = manifest["logs"][name]
        if type(length) is not int or length < 0:
            raise CheckpointError(f"{path} records {length!r} as the length of {name}")
        if size < length:
            raise CheckpointError(f"{name} has {size} bytes, but had {length} when this checkpoint was saved")
