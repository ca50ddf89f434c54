"""Policies: ``load_policy`` finds one by name, folder or object. torch is imported only when it is called."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rawdream_env.errors import CheckpointError, InvalidOptionError
from rawdream_env.resolve import bundled_folder, resolve

if TYPE_CHECKING:
    import torch

    from rawdream_env.types import Policy


def load_policy(spec: str | Path | Policy, *, device: str | torch.device = "cpu", dtype: str | None = None) -> Policy:
    """The policy that ``spec`` names: "embedded", a folder, "owner/name" of the Hugging Face hub, "module:factory", or
    an object with the ``Policy`` protocol (a ``torch.nn.Module`` is moved to ``device``).

    ``dtype`` is for factories: the bundled policy computes in float32.

    Raises:
        InvalidOptionError: an object or a factory that does not fit, or no such device.
        CheckpointError: the folder is missing or damaged.
    """
    from rawdream_env.types import Policy

    found: Path | Policy = resolve(spec, "policy", Policy, bundled=bundled_folder("policy"), device=device, dtype=dtype)
    if isinstance(found, Path):
        if dtype not in (None, "float32"):
            raise InvalidOptionError(f"dtype={dtype!r} does not fit the policy in {found}, which computes in float32.")
        return _load_folder(found, device)
    move: Any = getattr(found, "to", None)
    if callable(move):
        move(device)
    return found


def _load_folder(folder: Path, device: str | torch.device) -> Policy:
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"no policy at {folder}: config.json is missing. Choose 'embedded' or a checkpoint folder."
        )
    from rawdream_env.policies.tiny_vla import TinyVLA

    return TinyVLA.from_pretrained(folder, device)
