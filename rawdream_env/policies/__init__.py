"""Policies: ``load_policy`` finds one by name, folder or object. Imports torch only when called."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rawdream_env.errors import CheckpointError, InvalidOptionError

if TYPE_CHECKING:
    import torch

    from rawdream_env.types import Policy

EMBEDDED = "embedded"


def load_policy(spec: str | Path | Policy, device: str | torch.device = "cpu") -> Policy:
    """The policy named ``spec``: ``"embedded"`` (shipped in the package), a folder with config.json, or an object.

    An object with ``act`` and ``logprobs`` is returned as it is (a ``torch.nn.Module`` is moved to ``device``). Raises
    ``CheckpointError`` when the folder is missing or damaged, ``InvalidOptionError`` for anything else.
    """
    if isinstance(spec, str | Path):
        return _load_folder(_assets_folder() if spec == EMBEDDED else Path(spec), device)
    if callable(getattr(spec, "act", None)) and callable(getattr(spec, "logprobs", None)):
        move: Any = getattr(spec, "to", None)
        if callable(move):
            move(device)
        return spec
    raise InvalidOptionError(f"{type(spec).__name__} is no policy: give 'embedded', a folder, or an object with act.")


def _assets_folder() -> Path:
    from rawdream_env import assets

    return Path(assets.__file__).parent / "policy"


def _load_folder(folder: Path, device: str | torch.device) -> Policy:
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"no policy at {folder}: config.json is missing. Give 'embedded' or a checkpoint folder.")
    from rawdream_env.policies.tiny_vla import TinyVLA

    return TinyVLA.from_pretrained(folder, device)
