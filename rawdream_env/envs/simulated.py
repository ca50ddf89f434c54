"""What the environments of all simulators share: rows in worker processes, and starts that name a scene."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rawdream_env.envs.base import ChunkVectorEnv
from rawdream_env.errors import InvalidOptionError
from rawdream_env.types import Start

if TYPE_CHECKING:
    from rawdream_env.envs.row_workers import RowWorkers


class SimulatedVectorEnv(ChunkVectorEnv):
    """A vector environment whose rows are those of ``_workers``, which the subclass makes last on construction."""

    _workers: RowWorkers

    def _given_scene(self, row: int, start: Start) -> tuple[int, int]:
        """(scene seed, task id) of a start that was passed in; ``InvalidOptionError`` if it does not name them."""
        if start.seed is None or not 0 <= start.task_id < len(self.tasks):
            raise InvalidOptionError(
                f"options['starts'][{row}] has seed {start.seed} and task_id {start.task_id}; the simulator "
                f"needs the scene's seed and a task id from 0 to {len(self.tasks) - 1}."
            )
        return start.seed, start.task_id

    def _save(self) -> dict[str, Any]:
        return {**super()._save(), "workers": self._workers.mark()}

    def _restore(self, saved: dict[str, Any]) -> None:
        super()._restore(saved)
        self._workers.take_back(saved["workers"])

    def close_extras(self, **kwargs: Any) -> None:
        """Stop the simulators and their processes."""
        for part in (getattr(self, "_workers", None), self.reflector):
            if part is not None:
                part.close()
