"""LoRA for OpenVLA-OFT through peft: added in place, exported merged or alone.

Weights that an adapter sits on are never changed: an export adds the product of its matrices to a copy. Adapters are float32,
since steps of a small learning rate vanish in bfloat16.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rawdream_env.errors import CheckpointError, InvalidOptionError, MissingDependencyError
from rawdream_env.files import atomic_write_json, load_safetensors, read_json, save_safetensors, sealed_folder

ADAPTER, ADAPTER_WEIGHTS, ADAPTER_CONFIG = "default", "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."
"""Of names in peft's files."""


def add_lora(model: nn.Module, *, rank: int, alpha: float | None, vision: bool, seed: int) -> None:
    """Freeze ``model`` and put adapters on its linear layers, except the language-model head.

    Args:
        model: an ``OpenVLAOFT``.
        rank: rank of every adapter.
        alpha: scale; the adapter's product is multiplied by alpha / rank. None: min(rank, 16), as upstream.
        vision: also adapt the vision towers, as upstream does for fine-tuning; else their features can be kept.
        seed: of the adapters' first matrices; the second are zero, so that the policy is unchanged at first.

    Raises:
        InvalidOptionError: it has adapters already, or a rank below 1.
        MissingDependencyError: peft is not installed.
    """
    if has_adapters(model):
        raise InvalidOptionError("the policy has LoRA adapters already.")
    if rank < 1:
        raise InvalidOptionError(f"the rank of LoRA adapters must be at least 1, got {rank}.")
    peft = _peft()
    targets = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and not name.endswith("lm_head")
        and (vision or not name.startswith("vision_backbone."))
    ]
    scale = min(rank, 16) if alpha is None else alpha
    _inject(
        model, peft.LoraConfig(r=rank, lora_alpha=scale, target_modules=targets, init_lora_weights="gaussian"), seed
    )


def has_adapters(model: nn.Module) -> bool:
    """Whether ``add_lora`` or ``load_lora`` was called."""
    return any(hasattr(module, "lora_A") for module in model.modules())


def merged_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of ``model`` under the names without adapters, each weight with its adapter's product added (on the CPU,
    since a GPU may have no room for a second copy).
    """
    modules = dict(model.named_modules())
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if ".lora_" in name:
            continue
        if name.endswith(".base_layer.weight"):
            layer: Any = modules[name.removesuffix(".base_layer.weight")]
            tensor = (tensor.float() + layer.get_delta_weight(ADAPTER).float()).to("cpu", tensor.dtype)
        tensors[name.replace(".base_layer.", ".")] = tensor.detach()
    return tensors


def save_lora(model: nn.Module, folder: Path) -> None:
    """Write the adapters alone, in peft's format: ``adapter_model.safetensors`` and ``adapter_config.json``."""
    config: Any = getattr(model, "lora_config", None)
    if config is None:
        raise InvalidOptionError("the policy has no LoRA adapters to save.")
    tensors = {
        _PREFIX + name.replace(f".{ADAPTER}.", "."): tensor.detach()
        for name, tensor in model.state_dict().items()
        if ".lora_" in name
    }
    with sealed_folder(folder):
        save_safetensors(folder / ADAPTER_WEIGHTS, tensors, {"format": "pt"})
        plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
        atomic_write_json(folder / ADAPTER_CONFIG, plain)


def load_lora(model: nn.Module, folder: Path) -> None:
    """Put adapters in peft's format onto ``model``, which has none yet, and freeze the rest.

    Raises:
        CheckpointError: they belong to another model or are no LoRA adapters.
    """
    if has_adapters(model):
        raise InvalidOptionError("the policy has LoRA adapters already.")
    raw = read_json(folder / ADAPTER_CONFIG, "choose a folder of LoRA adapters")
    if raw.get("peft_type") != "LORA":
        raise CheckpointError(f"{folder}/{ADAPTER_CONFIG} has peft_type {raw.get('peft_type')!r}, expected 'LORA'.")
    tensors = load_safetensors(folder / ADAPTER_WEIGHTS)
    names = {name.removeprefix(_PREFIX) for name in tensors}
    targets = sorted({name.rsplit(".lora_", 1)[0] for name in names})
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if strangers := sorted(set(targets) - linear):
        raise CheckpointError(f"{folder} adapts {len(strangers)} layers that the policy has not, first {strangers[0]}.")
    config = _peft().LoraConfig(
        r=raw.get("r", 8),
        lora_alpha=raw.get("lora_alpha", 8),
        target_modules=targets,
        rank_pattern=raw.get("rank_pattern") or {},
        alpha_pattern=raw.get("alpha_pattern") or {},
    )
    _inject(model, config, 0)
    own = {name: p for name, p in model.named_parameters() if ".lora_" in name}
    given = {_with_adapter_name(name): tensors[_PREFIX + name] for name in names if _PREFIX + name in tensors}
    wrong = sorted({*own} ^ {*given}) or [name for name, p in own.items() if p.shape != given[name].shape]
    if wrong:
        raise CheckpointError(f"{folder} does not fit the policy: {len(wrong)} tensors differ, first {wrong[0]}.")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(given[name])


def _with_adapter_name(name: str) -> str:
    head, _, tail = name.rpartition(".")
    return f"{head}.{ADAPTER}.{tail}"


def _inject(model: Any, config: Any, seed: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _peft().inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    model.lora_config = config
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise MissingDependencyError("LoRA needs peft: pip install 'rawdream-env[openvla]'.") from error
    return peft
