"""Policies: ``load_policy`` finds one by name, folder or object. torch is imported only when it is called."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rawdream_env.config import parse_dtype
from rawdream_env.errors import CheckpointError, InvalidOptionError
from rawdream_env.files import read_json
from rawdream_env.resolve import bundled_folder, resolve

if TYPE_CHECKING:
    import torch

    from rawdream_env.policies.base import TokenPolicy
    from rawdream_env.types import Policy


def load_policy(
    spec: str | Path | Policy,
    *,
    device: str | torch.device = "cpu",
    dtype: str | None = None,
    unnorm_key: str | None = None,
) -> Policy:
    """The policy that ``spec`` names: "embedded", a folder, "owner/name" of the Hugging Face hub, "module:factory", or
    an object with the ``Policy`` protocol (a ``torch.nn.Module`` is moved to ``device``).

    A folder or repository holds a TinyVLA (such as the bundled policy) or an OpenVLA-OFT with discrete action tokens, or either
    of them with an L1 action head beside its weights: then a :class:`~rawdream_env.policies.laplace.LaplacePolicy`.

    Args:
        spec: a name as above, or an object.
        device: torch device.
        dtype: precision of OpenVLA-OFT's weights (None: as stored), and for factories. TinyVLA computes in float32.
        unnorm_key: for OpenVLA-OFT, the data set whose statistics scale the actions (None: the only one), and for factories.

    Raises:
        InvalidOptionError: an object or a factory that does not fit, or no such device or option.
        CheckpointError: the folder is missing, damaged, or of a kind that cannot be used.
    """
    from rawdream_env.policies.openvla_oft.config import refuse_l1_checkpoint
    from rawdream_env.types import Policy

    refuse_l1_checkpoint(spec)
    options: dict[str, Any] = {"device": device, "dtype": dtype, "unnorm_key": unnorm_key}
    found: Path | Policy = resolve(spec, "policy", Policy, bundled=bundled_folder("policy"), **options)
    if isinstance(found, Path):
        return _load_folder(found, **options)
    move: Any = getattr(found, "to", None)
    if callable(move):
        move(device)
    return found


def _load_folder(folder: Path, device: str | torch.device, dtype: str | None, unnorm_key: str | None) -> Policy:
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"no policy at {folder}: config.json is missing. Choose 'embedded' or a checkpoint folder."
        )
    if any(folder.glob("action_head*")):
        from rawdream_env.policies.laplace import LaplacePolicy

        return LaplacePolicy.from_pretrained(folder, _backbone(folder, device, dtype, unnorm_key, continuous=True))
    return _backbone(folder, device, dtype, unnorm_key)


def _backbone(
    folder: Path, device: str | torch.device, dtype: str | None, unnorm_key: str | None, continuous: bool = False
) -> TokenPolicy:
    if read_json(folder / "config.json", "choose a folder written by save_pretrained").get("model_type") == "openvla":
        import torch

        from rawdream_env.policies.openvla_oft.policy import OpenVLAOFT

        name = parse_dtype(dtype)
        precision = None if name is None else getattr(torch, name)
        return OpenVLAOFT.from_pretrained(folder, device, dtype=precision, unnorm_key=unnorm_key, continuous=continuous)
    if dtype not in (None, "float32"):
        raise InvalidOptionError(f"dtype={dtype!r} does not fit the policy in {folder}, which computes in float32.")
    if unnorm_key is not None:
        raise InvalidOptionError(
            f"unnorm_key={unnorm_key!r} is for OpenVLA-OFT; the policy in {folder} is another kind."
        )
    from rawdream_env.policies.tiny_vla import TinyVLA

    return TinyVLA.from_pretrained(folder, device)
