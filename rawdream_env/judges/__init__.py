"""Judges say whether an instruction was carried out in a video. ``load_judge`` finds one by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from rawdream_env.errors import CheckpointError, InvalidOptionError

if TYPE_CHECKING:
    from rawdream_env.types import Judge

ASSETS = Path(__file__).resolve().parent.parent / "assets" / "judge"
"""Where the shipped judge lives."""


def load_judge(spec: str | Path | Judge, device: str = "cpu") -> Judge:
    """A judge from its name, its folder, or itself.

    Args:
        spec: ``"embedded"`` (the small classifier shipped with the package), ``"scripted"`` (the twin for tests),
            ``"robometer:http://host:port/path"`` (a service), a folder written by ``save_pretrained`` (of the embedded
            judge or of a VideoMAE reward model), or any object with the ``Judge`` protocol (returned as it is).
        device: torch device for judges that compute.

    Raises:
        InvalidOptionError: no such name or folder.
        CheckpointError: the folder is not a judge's, or is damaged.
    """
    if not isinstance(spec, (str, Path)):
        if callable(spec):
            return spec
        raise InvalidOptionError(
            f"judge is {type(spec).__name__}; give 'embedded', 'scripted', a folder, or an object with "
            "__call__(videos, instructions) -> list[Verdict]"
        )
    if spec == "scripted":
        from rawdream_env.judges.scripted import ScriptedJudge

        return ScriptedJudge()
    if str(spec).startswith("robometer:"):
        from rawdream_env.judges.robometer import RobometerJudge

        return RobometerJudge(str(spec).removeprefix("robometer:"))
    folder = ASSETS if spec == "embedded" else Path(spec)
    if not folder.is_dir():
        if spec == "embedded":
            raise CheckpointError(f"the embedded judge is not in {folder}; train it with `rawdream train-judge`")
        raise InvalidOptionError(
            f"judge {str(spec)!r} is neither 'embedded' nor 'scripted' nor 'robometer:URL' nor a folder"
        )
    from rawdream_env.judges import embedded, videomae

    kind = _kind_of(folder)
    if kind == videomae.KIND:
        return videomae.VideoMAEJudge.from_pretrained(folder, device=device)
    if kind != embedded.KIND:
        raise CheckpointError(
            f"{folder / 'config.json'} says kind={kind!r}, expected {embedded.KIND!r} or {videomae.KIND!r}"
        )
    return embedded.EmbeddedJudge.from_pretrained(folder, device=device)


def _kind_of(folder: Path) -> object:
    """The ``kind`` in a checkpoint's config.json."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); is {folder} a judge folder?") from error
    return config.get("kind") if isinstance(config, dict) else None
