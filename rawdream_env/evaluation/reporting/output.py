"""The folder into which an evaluation writes its results."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rawdream_env.errors import InvalidOptionError
from rawdream_env.files import PathLike, lock_file

_TEMPORARY = re.compile(r"\..+\.\d+\.[0-9a-f]{8}\.tmp")
"""Names that ``files.atomic_write_bytes`` gives."""


@contextmanager
def writing_results(folder: PathLike) -> Iterator[Path]:
    """Create ``folder`` for the results of one process at a time, and remove what its killed predecessors left.

    Anyone's folder may be given: only this package's temporary files directly in it are removed.

    Raises:
        InvalidOptionError: another process is writing there.
    """
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    name = path / ".results.lock"
    try:
        lock = lock_file(name)
    except BlockingIOError as error:
        raise InvalidOptionError(
            f"{path} is being written by another process. Wait for it, or give another folder."
        ) from error
    with lock:
        try:
            for entry in path.iterdir():
                if _TEMPORARY.fullmatch(entry.name) and entry.is_file():
                    entry.unlink(missing_ok=True)
            yield path
        finally:
            name.unlink(missing_ok=True)
