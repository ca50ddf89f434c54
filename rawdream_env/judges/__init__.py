"""Judges say whether an instruction was carried out in a video. ``load_judge`` finds one by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rawdream_env.errors import CheckpointError, InvalidOptionError
from rawdream_env.files import read_json

if TYPE_CHECKING:
    from rawdream_env.types import Judge

ASSETS = Path(__file__).resolve().parent.parent / "assets" / "judge"
"""Where the shipped judge lives."""


def load_judge(spec: str | Path | Mapping[str, Any] | Judge, device: str = "cpu") -> Judge:
    """A judge from its name, its folder, or itself.

    Args:
        spec: ``"embedded"`` (the small classifier shipped with the package), ``"scripted"`` (the twin for tests),
            ``"robometer:http://host:port/path"`` (a service), a folder written by ``save_pretrained`` (of the embedded
            judge or of a VideoMAE reward model), a vision-language model (``"vlm_server:http://host:8000/v1"``,
            ``"vlm_local:FOLDER"``, or its options as a mapping with ``"kind"`` or a ``.json`` file of them; see
            ``vlm_config``), or any object with the ``Judge`` protocol (returned as it is).
        device: torch device for judges that compute.

    Raises:
        InvalidOptionError: no such name or folder.
        CheckpointError: the folder is not a judge's, or is damaged.
        JudgeUnavailableError: the server of a judge cannot be reached or does not fit.
    """
    if isinstance(spec, (str, Path)) and str(spec).endswith(".json"):
        spec = _options(Path(spec))
    if isinstance(spec, Mapping) or (isinstance(spec, str) and spec.startswith(("vlm_server:", "vlm_local:"))):
        return _load_vlm(spec, device)
    if not isinstance(spec, (str, Path)):
        if callable(spec):
            return spec
        raise InvalidOptionError(
            f"judge is {type(spec).__name__}; give 'embedded', 'scripted', a folder, or an object with "
            "__call__(videos, instructions) -> list[Verdict], or its options as a mapping"
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
            f"judge {str(spec)!r} is neither 'embedded' nor 'scripted' nor 'robometer:URL' nor a folder nor "
            "'vlm_server:http://host:8000/v1'"
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


def _load_vlm(spec: str | Mapping[str, Any], device: str) -> Judge:
    from rawdream_env.judges.vlm.config import VLMServerConfig, parse_vlm_spec

    config = parse_vlm_spec(spec)
    if isinstance(config, VLMServerConfig):
        from rawdream_env.judges.vlm.server import VLMServerJudge

        return VLMServerJudge(config)
    from rawdream_env.judges.vlm.local import VLMLocalJudge

    return VLMLocalJudge.from_pretrained(config, device=device)


def _options(path: Path) -> Mapping[str, Any]:
    """A judge's options from a JSON file."""
    try:
        options = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidOptionError(f"the judge's options {path} cannot be read ({error})") from error
    if not isinstance(options, dict):
        raise InvalidOptionError(f'the judge\'s options {path} must be one JSON object with "kind"')
    return options


def _kind_of(folder: Path) -> object:
    """The ``kind`` in a checkpoint's config.json."""
    return read_json(folder / "config.json", "give a folder that holds a judge").get("kind")
