"""Initial states of LIBERO's tasks, converted once from pickles to ``.npz`` files with hashes.

hf-libero ships one pickled array per task. A pickle can run any code, so it is read by an unpickler that knows numpy arrays
alone, and only once: the array goes to ``home()/init_states`` with the SHA-256 of the pickle and of the array.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rawdream_env.errors import DatasetError
from rawdream_env.files import atomic_write_bytes, sha256_file
from rawdream_env.libero.install import Task, home

States = NDArray[np.float64]
_HARMLESS = {
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("_codecs", "encode"),
}


def load_init_states(suite: str, task: Task) -> States:
    """The initial states of a task, float64 (N, D): flat MuJoCo states (time, positions, velocities).

    Raises:
        DatasetError: the file is missing, damaged, or holds anything but one array of finite numbers.
    """
    try:
        source = sha256_file(task.init_states)
    except OSError as error:
        raise DatasetError(f"{task.init_states} cannot be read ({error}); install hf-libero again.") from error
    target = home() / "init_states" / suite / f"{task.name}.npz"
    states = _read_converted(target, source)
    if states is None:
        states = read_pickled(task.init_states)
        content = io.BytesIO()
        np.savez(content, states=states, source_sha256=source, states_sha256=_digest(states))
        target.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_bytes(target, content.getvalue())
    return states


def read_pickled(path: Path) -> States:
    """Read one of hf-libero's files (a zip archive of ``torch.save`` with a pickled array), running none of its code.

    Raises:
        DatasetError: it is damaged, or holds anything but one array of finite numbers.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            (name,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            states = np.asarray(_Unpickler(io.BytesIO(archive.read(name))).load())
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        raise DatasetError(f"{path} is not a file of initial states ({error}); install hf-libero again.") from error
    if states.ndim != 2 or not len(states) or states.dtype.kind != "f" or not np.isfinite(states).all():
        raise DatasetError(f"{path} has an array {states.dtype} {states.shape}, expected finite states (N, D).")
    return np.ascontiguousarray(states, dtype=np.float64)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _HARMLESS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no array needs")
        return super().find_class(module.replace("numpy.core.", "numpy._core."), name)


def _read_converted(path: Path, source: str) -> States | None:
    """The converted array if it is whole and of that source."""
    try:
        with np.load(path, allow_pickle=False) as found:
            states: States = found["states"]
            whole = str(found["states_sha256"]) == _digest(states) and str(found["source_sha256"]) == source
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return states if whole else None


def _digest(states: States) -> str:
    return hashlib.sha256(f"{states.dtype} {states.shape}\n".encode() + states.tobytes()).hexdigest()
