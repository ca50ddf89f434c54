"""What GRPO's models need, counted from their configurations on PyTorch's "meta" device, where nothing is computed.

Shape letters: B rows, N = 256 patches, D1 D2 widths of the vision towers, L action tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import linear
from torch.utils.flop_counter import FlopCounterMode

from rawdream_env.errors import InvalidOptionError
from rawdream_env.policies.action_tokens import NUM_TOKENS
from rawdream_env.world_models import flops

PROMPT_TOKENS = 32
"""Prompts of OpenVLA-OFT are padded to a multiple of 16; an instruction of ten words takes 32."""


@dataclass(frozen=True)
class PolicyCost:
    """``weights``, ``trained``, ``trained_bytes`` (of trained weights), ``weight_bytes`` (of all); ``act`` and ``train``:
    operations of one chunk forward, and forward and backward; ``saved``: bytes that a chunk keeps for its backward pass;
    ``inputs``: the same with gradient checkpointing, the layer at work included; ``block``: bytes of the largest layer.
    """

    weights: int
    trained: int
    weight_bytes: int
    trained_bytes: int
    act: float
    forward: float
    train: float
    saved: int
    inputs: int
    block: int


@dataclass(frozen=True)
class DreamCost:
    """``arch`` and ``codec`` on "meta"; ``weights``; ``chunk``: operations to imagine one chunk of one episode."""

    arch: Any
    codec: Any
    weights: int
    weight_bytes: int
    chunk: float


def policy_cost(name: str, lora_rank: int, dtype: torch.dtype) -> PolicyCost:
    """``name``: "tiny-vla", "openvla-oft-7b", or a checkpoint folder of OpenVLA-OFT, of which only config.json is read."""
    if name == "tiny-vla":
        if lora_rank:
            raise InvalidOptionError(f"lora_rank={lora_rank} does not fit TinyVLA, which is trained whole; use 0.")
        from rawdream_env.policies.tiny_vla import TinyVLA

        tiny = TinyVLA().requires_grad_(True)
        frame = torch.zeros(1, tiny.config.image_size, tiny.config.image_size, 3, dtype=torch.uint8)
        forward, train, saved = _measured(tiny, lambda: tiny.logits(frame, ["push"]))
        return _cost(tiny, forward, forward, train, saved)
    return openvla_cost(_sizes(name), lora_rank, dtype)


def openvla_cost(config: Any, lora_rank: int, dtype: torch.dtype) -> PolicyCost:
    """An ``OpenVLAOFTConfig``. The layers of a transformer cost the same: two are counted, the others added."""
    one, two = (_counted_cost(replace(config, num_hidden_layers=n), lora_rank, dtype) for n in (1, 2))
    rest = config.num_hidden_layers - 1
    added = {f.name: getattr(one, f.name) + rest * (getattr(two, f.name) - getattr(one, f.name)) for f in fields(one)}
    layer = replace(one, **added).saved - one.saved
    tokens = 256 + PROMPT_TOKENS + 56 + 1
    inputs = config.num_hidden_layers * tokens * config.hidden_size * dtype.itemsize + layer // max(rest, 1)
    return replace(one, **{**added, "inputs": inputs, "block": two.weight_bytes - one.weight_bytes})


def _counted_cost(config: Any, lora_rank: int, dtype: torch.dtype) -> PolicyCost:
    policy = _openvla(config, lora_rank, dtype)
    vision = policy.vision_backbone
    with torch.device("meta"):
        pixels = torch.empty(1, 6, 224, 224, dtype=dtype)
        features = torch.empty(1, 256, policy.projector.fc1.in_features, dtype=dtype)
    frozen = not any(p.requires_grad for p in vision.parameters())

    def scores() -> Tensor:
        seen = features if frozen else vision(pixels)  # features of frozen towers are kept from the rollout
        hidden = policy._hidden(policy.projector(seen), [[1] * PROMPT_TOKENS])
        return linear(
            hidden.float(), policy.language_model.lm_head.weight[:NUM_TOKENS].float()
        )  # autocast needs a device

    forward, train, saved = _measured(policy, scores)
    return _cost(policy, forward + (flops.counted(lambda: vision(pixels)) if frozen else 0), forward, train, saved)


def dream_cost(name: str, dtype: torch.dtype) -> DreamCost | None:
    """``name``: a configuration of :mod:`rawdream_env.world_models.wan.config`; "none": a simulator, no world model."""
    if name == "none":
        return None
    from rawdream_env.world_models.memory import module_bytes
    from rawdream_env.world_models.wan.config import wan_config
    from rawdream_env.world_models.wan.transformer import WanWorldModelTransformer

    arch = wan_config(name)
    arch = replace(arch, text_rows=2) if arch.text_dim else arch  # Wan's empty prompt and its padding
    with torch.device("meta"):
        transformer = WanWorldModelTransformer(arch)
    codec = _codec(arch)
    chunk: float
    if arch.stem_channels:
        chunk = _small_chunk(arch)
    else:
        chunk = flops.denoiser_flops(arch, 5) + flops.decode_flops(codec, arch.chunk_latents)
    modules = (transformer, codec)
    weights = sum(p.numel() for module in modules for p in module.parameters())
    return DreamCost(arch, codec, weights, module_bytes(modules, dtype), chunk)


def _sizes(name: str) -> Any:
    from rawdream_env.policies.openvla_oft.config import OpenVLAOFTConfig, read_config
    from rawdream_env.policies.openvla_oft.vision import DINOV2_L, SIGLIP_SO400M

    if name == "openvla-oft-7b":
        return OpenVLAOFTConfig(DINOV2_L, SIGLIP_SO400M)
    if (Path(name) / "config.json").is_file():
        return read_config(Path(name))[0]
    raise InvalidOptionError(
        f"there is no policy {name!r} to plan for; choose 'tiny-vla', 'openvla-oft-7b' or a folder of OpenVLA-OFT."
    )


def _openvla(config: Any, lora_rank: int, dtype: torch.dtype) -> Any:
    from rawdream_env.policies.openvla_oft.policy import OpenVLAOFT

    unscaled = {"q01": [-1.0] * 7, "q99": [1.0] * 7, "mask": [False] * 7}
    with torch.device("meta"):
        policy = OpenVLAOFT(config, None, {"any": {"action": unscaled}}).to(dtype)
        if lora_rank:
            policy.add_lora(lora_rank)
    return policy


def _cost(policy: nn.Module, act: float, forward: float, train: float, saved: int) -> PolicyCost:
    parameters = list(policy.parameters())
    trained = [p for p in parameters if p.requires_grad]
    return PolicyCost(
        weights=sum(p.numel() for p in parameters),
        trained=sum(p.numel() for p in trained),
        weight_bytes=sum(p.nbytes for p in parameters),
        trained_bytes=sum(p.nbytes for p in trained),
        act=act,
        forward=forward,
        train=train,
        saved=saved,
        inputs=saved,
        block=0,
    )


def _measured(policy: nn.Module, scores: Any) -> tuple[float, float, int]:
    """Operations of ``scores()`` forward, and with the backward pass; bytes kept in between, without the weights."""
    own = {p.untyped_storage()._cdata for p in policy.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if (storage := tensor.untyped_storage()._cdata) not in own:
            kept[storage] = tensor
        return tensor

    forward = flops.counted(scores)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            result = scores()
        saved = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
        result.sum().backward()
    policy.zero_grad(set_to_none=True)
    return forward, counter.get_total_flops(), saved


def _codec(arch: Any) -> Any:
    if arch.stem_channels:
        from rawdream_env.world_models.autoencoders import AutoencoderConfig, PackedFrameAutoencoder

        return PackedFrameAutoencoder(AutoencoderConfig())
    from diffusers import AutoencoderKLWan

    from rawdream_env.world_models.wan.vae import WanVAE

    with torch.device("meta"):
        vae = AutoencoderKLWan()
    return WanVAE(vae, 8 * arch.latent_shape[1])


def _small_chunk(arch: Any) -> float:
    """Counted on a CPU with random weights: a convolutional stem has no formula here."""
    from rawdream_env.seeding import NoiseKey
    from rawdream_env.world_models.wan.rollout import RolloutConfig, WanWorldModel
    from rawdream_env.world_models.wan.transformer import WanWorldModelTransformer

    model = WanWorldModel(WanWorldModelTransformer(arch), _codec(arch), RolloutConfig())
    state = model.start(torch.zeros(1, *model.frame_shape, dtype=torch.uint8), [NoiseKey(0)], torch.zeros(1, 7))
    actions = torch.zeros(1, model.chunk_len, arch.action_dim)
    for _ in range(4):  # the context is full
        state, _ = model.imagine(state, actions)
    return flops.counted(lambda: model.imagine(state, actions))
