"""Judges decide whether a video shows an instruction carried out. ``load_judge`` loads one by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rawdream_env.config import parse_device, parse_dtype
from rawdream_env.errors import CheckpointError, InvalidOptionError
from rawdream_env.files import read_json, read_text
from rawdream_env.resolve import EMBEDDED, bundled_folder, resolve

if TYPE_CHECKING:
    from rawdream_env.types import Judge


def load_judge(spec: str | Path | Mapping[str, Any] | Judge, *, device: str = "cpu", dtype: str | None = None) -> Judge:
    """The judge that ``spec`` names.

    Args:
        spec: ``"embedded"`` (the bundled classifier), ``"state"`` (what a world model's own state says, see
            ``judges/state.py``), ``"scripted"`` (for tests), a folder written by
            ``save_pretrained`` (of the bundled judge or of a VideoMAE reward model), ``"owner/name"`` of the Hugging
            Face hub, ``"module:factory"``, a vision-language model (``"vlm_server:http://host:8000/v1"``,
            ``"vlm_local:FOLDER"``, a mapping of options with ``"kind"``, or a ``.json`` file of one; see
            ``judges/vlm/config.py``), ``"robometer:http://host:8000"`` (a service), or any object with the ``Judge``
            protocol.
        device: torch device for judges that compute in this process.
        dtype: precision of the weights, for ``vlm_local`` and factories.

    Raises:
        InvalidOptionError: no such name or folder, or an unsupported option.
        CheckpointError: the folder does not contain a judge, or is damaged.
        JudgeUnavailableError: a judge's server cannot be reached or lacks a required feature.
    """
    from rawdream_env.types import Judge

    if isinstance(spec, str | Path) and str(spec).endswith(".json"):
        spec = _options(Path(spec))
    if isinstance(spec, Mapping) or (isinstance(spec, str) and spec.startswith(("vlm_server:", "vlm_local:"))):
        return _load_vlm(spec, parse_device(device), parse_dtype(dtype))
    if isinstance(spec, str) and spec == "scripted":
        from rawdream_env.judges.scripted import ScriptedJudge

        return ScriptedJudge()
    if isinstance(spec, str) and spec == "state":
        from rawdream_env.judges.state import StateJudge

        return StateJudge()
    if isinstance(spec, str) and spec.startswith("robometer:"):
        from rawdream_env.judges.robometer import RobometerJudge

        return RobometerJudge(spec.removeprefix("robometer:"))
    found: Path | Judge = resolve(spec, "judge", Judge, bundled=bundled_folder("judge"), device=device, dtype=dtype)
    return _load_folder(found, spec, device, dtype) if isinstance(found, Path) else found


def _load_folder(folder: Path, spec: object, device: str, dtype: str | None) -> Judge:
    if not folder.is_dir():
        if spec == EMBEDDED:
            raise CheckpointError(f"the bundled judge is missing from {folder}; train it with `rawdream judge train`")
        raise InvalidOptionError(
            f"judge {str(spec)!r} is neither 'embedded' nor 'state' nor 'scripted' nor 'robometer:URL' nor a folder nor "
            "'owner/name' of the Hugging Face hub nor 'module:factory' nor 'vlm_server:http://host:8000/v1'"
        )
    if dtype not in (None, "float32"):
        raise InvalidOptionError(f"dtype={dtype!r} does not fit the judge in {folder}, which computes in float32.")
    from rawdream_env.judges import embedded, videomae

    kind = _kind_of(folder)
    if kind == videomae.KIND:
        return videomae.VideoMAEJudge.from_pretrained(folder, device=device)
    if kind != embedded.KIND:
        raise CheckpointError(
            f"{folder / 'config.json'} says kind={kind!r}, expected {embedded.KIND!r} or {videomae.KIND!r}"
        )
    return embedded.EmbeddedJudge.from_pretrained(folder, device=device)


def _load_vlm(spec: str | Mapping[str, Any], device: str, dtype: str | None) -> Judge:
    from rawdream_env.judges.vlm.config import VLMServerConfig, parse_vlm_spec

    config = parse_vlm_spec(spec)
    if isinstance(config, VLMServerConfig):
        if dtype is not None:
            raise InvalidOptionError(f"dtype={dtype!r} does not fit vlm_server: its server chooses the precision.")
        from rawdream_env.judges.vlm.server import VLMServerJudge

        return VLMServerJudge(config)
    from rawdream_env.judges.vlm.local import VLMLocalJudge

    return VLMLocalJudge.from_pretrained(config if dtype is None else replace(config, dtype=dtype), device=device)


def _options(path: Path) -> Mapping[str, Any]:
    """A judge's options from a JSON file."""
    try:
        options = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidOptionError(f"the judge's options {path} cannot be read ({error})") from error
    if not isinstance(options, dict):
        raise InvalidOptionError(f'the judge\'s options {path} must be one JSON object with "kind"')
    return options


def _kind_of(folder: Path) -> object:
    """The ``kind`` in a checkpoint's config.json."""
    return read_json(folder / "config.json", "give a folder that holds a judge").get("kind")
