"""Sizes of an OpenVLA-OFT policy, read from upstream's ``config.json``, and a sentence for each kind that cannot be used."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rawdream_env.errors import CheckpointError
from rawdream_env.files import read_json

if TYPE_CHECKING:
    from rawdream_env.policies.openvla_oft.vision import TowerConfig

MODEL_TYPE = "openvla"
USABLE = "Haozhan72/Openvla-oft-SFT-libero-spatial-traj1"
"""A public checkpoint of the right kind, for messages."""
PADDED_VOCAB_SIZE = 32064
"""Llama-2's 32000 tokens, padded to a multiple of 64."""
_VISION = "dinosiglip-vit-so-224px"
_L1_CHECKPOINTS = "openvla-7b-oft-finetuned-libero"
_L1_HEAD = "action_head*"
_FOREIGN_FILES = {
    _L1_HEAD: "has a continuous action head (L1 regression); its language model was not trained on action tokens",
    "noisy_action_projector*": "has a diffusion action head; its language model was not trained on action tokens",
    "proprio_projector*": "reads proprioception, which this policy has not",
    "vision_backbone--*": "modulates the vision towers by the instruction (FiLM), which this policy does not",
}
TOWERS_KEY = "timm_model_args"
"""Key of ``config.json`` with the sizes of towers other than the published ones, in timm's words."""


@dataclass(frozen=True)
class OpenVLAOFTConfig:
    """Sizes; the defaults are those of OpenVLA-7B."""

    dinov2: TowerConfig
    siglip: TowerConfig
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0


def read_config(folder: Path, continuous: bool = False) -> tuple[OpenVLAOFTConfig, dict[str, Any]]:
    """The sizes of a checkpoint, and its ``config.json`` as it is. ``continuous``: it may have an L1 action head.

    Raises:
        CheckpointError: the folder holds another kind of model; the message names a usable one.
    """
    refuse_foreign_files(folder, continuous)
    raw = read_json(folder / "config.json")
    if raw.get("model_type") != MODEL_TYPE:
        raise CheckpointError(
            f"{folder}/config.json has model_type {raw.get('model_type')!r}, expected {MODEL_TYPE!r}."
        )
    images = raw.get("num_images_in_input", 1)
    if images != 1:
        raise CheckpointError(f"{folder} reads {images} images per step, but this policy has 1; use {USABLE}.")
    if raw.get("use_proprio"):
        raise CheckpointError(f"{folder} {_FOREIGN_FILES['proprio_projector*']}; use {USABLE}.")
    if raw.get("vision_backbone_id", _VISION) != _VISION:
        raise CheckpointError(f"{folder} has the vision backbone {raw['vision_backbone_id']!r}, expected {_VISION!r}.")
    if raw.get("n_action_bins", 256) != 256:
        raise CheckpointError(f"{folder} has {raw['n_action_bins']} action bins, expected 256.")
    text = raw.get("text_config", {})
    if not isinstance(text, dict):
        raise CheckpointError(f"{folder}/config.json has no object text_config.")
    if text.get("vocab_size") != PADDED_VOCAB_SIZE:
        raise CheckpointError(
            f"{folder} has a vocabulary of {text.get('vocab_size')} tokens, but action tokens are the last 256 of 32000 in a "
            f"vocabulary padded to {PADDED_VOCAB_SIZE}; use {USABLE}."
        )
    dinov2, siglip = _towers(folder, raw.get(TOWERS_KEY))
    return _sizes(folder, text, dinov2, siglip), raw


def refuse_foreign_files(folder: Path, continuous: bool = False) -> None:
    """``CheckpointError`` when files beside the weights show that the language model has no action tokens."""
    for pattern, reason in _FOREIGN_FILES.items():
        if continuous and pattern == _L1_HEAD:
            continue
        if found := sorted(folder.glob(pattern)):
            raise CheckpointError(
                f"{folder} {reason} (it has {found[0].name}); use {USABLE} or train with action tokens."
            )


def refuse_l1_checkpoint(spec: object) -> None:
    """``CheckpointError`` for the official LIBERO checkpoints, before 15 GB are downloaded."""
    if isinstance(spec, str) and _L1_CHECKPOINTS in spec and not Path(spec).exists():
        raise CheckpointError(
            f"{spec} has a continuous action head and reads a wrist camera and proprioception, which the environments do not "
            f"show; its language model was not trained on action tokens; use {USABLE}."
        )


def _towers(folder: Path, given: Any) -> tuple[TowerConfig, TowerConfig]:
    from rawdream_env.policies.openvla_oft.vision import DINOV2_L, SIGLIP_SO400M, TowerConfig

    if given is None:
        return DINOV2_L, SIGLIP_SO400M
    known = {f.name for f in fields(TowerConfig)}
    if not (
        isinstance(given, list) and len(given) == 2 and all(isinstance(g, dict) and g.keys() <= known for g in given)
    ):
        raise CheckpointError(f"{folder}/config.json: {TOWERS_KEY} must be two objects with keys of {sorted(known)}.")
    try:
        first, second = (TowerConfig(**tower) for tower in given)
        for tower in (first, second):
            heads = _positive(tower.num_heads, int)
            if _positive(tower.embed_dim, int) % heads or _positive(tower.depth, int) < 2:
                raise TypeError(f"{tower} has a width that its heads do not divide, or fewer than 2 layers")
            _positive(tower.mlp_ratio, float)
            _positive(tower.reg_tokens + 1, int)
    except TypeError as error:
        raise CheckpointError(f"{folder}/config.json: {TOWERS_KEY}: {error}.") from error
    return first, second


def _positive(value: Any, kind: type) -> Any:
    """``value``; ``TypeError`` unless it is a positive number, an integer where ``kind`` is int."""
    if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float) or not value > 0:
        raise TypeError(f"{value!r} is no positive {'integer' if kind is int else 'number'}")
    return value


def _sizes(folder: Path, text: dict[str, Any], dinov2: TowerConfig, siglip: TowerConfig) -> OpenVLAOFTConfig:
    values: dict[str, Any] = {}
    for field in fields(OpenVLAOFTConfig)[2:]:
        fallback = field.default
        if field.name == "num_key_value_heads":
            fallback = values["num_attention_heads"]
        value = text.get(field.name)
        value = fallback if value is None else value
        try:
            values[field.name] = _positive(value, type(field.default))
        except TypeError as error:
            raise CheckpointError(f"{folder}/config.json: {field.name}: {error}.") from error
    width, heads, groups = (values[n] for n in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    if width % heads or heads % groups:
        raise CheckpointError(
            f"{folder}/config.json: {heads} attention heads do not divide hidden_size {width}, or are no multiple of "
            f"{groups} key-value heads."
        )
    return OpenVLAOFTConfig(dinov2, siglip, **values)
