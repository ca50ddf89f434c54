"""Run the stages of a recipe in order: complete stages are skipped, changed settings are an error.

Each stage writes a marker, a JSON file with its settings, the hours it took and the results it returned.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rawdream_env.errors import RunDirError
from rawdream_env.files import atomic_write_json, read_json

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stage:
    """One step of the recipe.

    ``run()`` may be called again after an interruption. The stage is complete when it returns; the values it returns are
    stored in the marker. ``needs``: the stages whose settings this one depends on. ``makes``: the paths that must exist for
    the stage to be skipped.
    """

    name: str
    settings: Mapping[str, Any]
    makes: tuple[Path, ...]
    run: Callable[[], Mapping[str, Any] | None]
    needs: tuple[str, ...] = ()


def run_stages(stages: Sequence[Stage], markers: Path, *, only: str = "") -> dict[str, float]:
    """Run stages in order, skipping complete ones; returns the hours each took (earlier runs included).

    ``only``: run this stage alone, so that stages that do not need each other can run side by side, in processes of their own.

    Raises:
        RunDirError: a marker has other settings, or a stage that ``only`` needs is not complete.
    """
    markers.mkdir(parents=True, exist_ok=True)
    prints: dict[str, str] = {}
    hours: dict[str, float] = {}
    for number, stage in enumerate(stages, 1):
        inherited = {name: prints[name] for name in stage.needs}
        text = json.dumps({"settings": stage.settings, "needs": inherited}, sort_keys=True, default=str)
        prints[stage.name] = hashlib.sha256(text.encode()).hexdigest()[:16]
        if only and stage.name != only:
            continue
        if only:
            _check_needs(stage, prints, markers)
        path = markers / f"{stage.name}.json"
        known = _marker(path)
        if known and known.get("fingerprint") != prints[stage.name]:
            raise RunDirError(
                f"stage {stage.name!r} of {markers.parent} was made with other settings (its own or those of a stage "
                f"it builds on). Use another folder, or delete {path} and what the stage made: "
                f"{', '.join(map(str, stage.makes))}."
            )
        if known.get("complete") and all(made.exists() for made in stage.makes):
            _logger.info("%d/%d %s: complete", number, len(stages), stage.name)
            hours[stage.name] = known["hours"]
            continue
        begun, earlier = time.monotonic(), float(known.get("hours", 0.0))
        record = {"fingerprint": prints[stage.name], "settings": json.loads(text)["settings"], "complete": False}
        facts: Mapping[str, Any] | None = None
        try:
            atomic_write_json(path, {**record, "hours": earlier})
            facts = stage.run()
            record["complete"] = True
        finally:
            hours[stage.name] = earlier + (time.monotonic() - begun) / 3600
            atomic_write_json(path, {**record, "hours": hours[stage.name], "facts": dict(facts or {})})
    return hours


def _marker(path: Path) -> dict[str, Any]:
    """What a stage's marker says; empty if there is none."""
    return read_json(path, "delete it to run its stage again", RunDirError) if path.is_file() else {}


def _check_needs(stage: Stage, prints: Mapping[str, str], markers: Path) -> None:
    """``RunDirError`` unless the stages that ``stage`` needs are complete, with the settings of now."""
    for name in stage.needs:
        known = _marker(markers / f"{name}.json")
        if not known.get("complete") or known.get("fingerprint") != prints[name]:
            raise RunDirError(
                f"stage {stage.name!r} needs {name!r}, which is not complete in {markers.parent}; run it first."
            )
