"""A tiny OpenVLA-OFT checkpoint in the format of the public ones, with random weights, for tests.

    python -m rawdream_env.testing.openvla_oft FOLDER

Towers of three layers, a Llama of three layers and width 64, all 32064 tokens, and a tokenizer with Llama-2's special ids.
Every tensor is drawn from its own name and a seed, so that the same folder can be made anywhere.
"""

from __future__ import annotations

import json
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, processors
from torch import Tensor

from rawdream_env.files import atomic_write_json
from rawdream_env.policies.openvla_oft import checkpoint
from rawdream_env.policies.openvla_oft.config import PADDED_VOCAB_SIZE, TOWERS_KEY, OpenVLAOFTConfig
from rawdream_env.policies.openvla_oft.policy import OpenVLAOFT
from rawdream_env.policies.openvla_oft.prompt import BLANK
from rawdream_env.policies.openvla_oft.statistics import STATISTICS
from rawdream_env.policies.openvla_oft.vision import TowerConfig

TOWERS = (
    TowerConfig(embed_dim=64, depth=3, num_heads=4, reg_tokens=4),
    TowerConfig(embed_dim=72, depth=3, num_heads=4, mlp_ratio=3.7362),
)
TINY = OpenVLAOFTConfig(
    *TOWERS,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
)
IDENTITY = {"q01": [-1.0] * 6 + [0.0], "q99": [1.0] * 7, "mask": [True] * 6 + [False]}
"""Statistics of actions that use the whole range; the gripper is not scaled."""


def write_tiny_openvla(
    folder: str | Path,
    *,
    seed: int = 0,
    action: dict[str, Any] | None = None,
    name: str = "piper",
    shard_bytes: int = checkpoint.SHARD_BYTES,
) -> Path:
    """Write the checkpoint; returns its folder.

    Args:
        folder: a folder, created if missing.
        seed: of the weights.
        action: q01, q99 and mask of the actions; None: ``IDENTITY``.
        name: data set of the statistics.
        shard_bytes: maximum size of a file of weights.
    """
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    checkpoint.write_tensors(path, tiny_tensors(seed), shard_bytes)
    atomic_write_json(path / "config.json", tiny_config())
    action = action or IDENTITY
    extremes = {"min": action["q01"], "max": action["q99"]}
    atomic_write_json(path / STATISTICS, {name: {"action": {**action, **extremes}, "num_transitions": 100}})
    tokenizer = json.loads(tiny_tokenizer().to_str())
    merges = tokenizer["model"]["merges"]
    tokenizer["model"]["merges"] = [" ".join(pair) for pair in merges]  # as older versions wrote them
    (path / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    atomic_write_json(path / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", "legacy": False})
    return path


def tiny_config() -> dict[str, Any]:
    """``config.json`` with upstream's keys, and the sizes of the towers."""
    towers = [{k: v for k, v in vars(tower).items() if not (k == "reg_tokens" and v == 0)} for tower in TOWERS]
    return {
        "architectures": ["OpenVLAForActionPrediction"],
        "arch_specifier": "no-align+fused-gelu-mlp",
        "image_resize_strategy": "resize-naive",
        "image_sizes": [224, 224],
        "llm_backbone_id": "llama2-7b-pure",
        "llm_max_length": 2048,
        "model_type": "openvla",
        "n_action_bins": 256,
        "norm_stats": {},
        "pad_to_multiple_of": 64,
        "pad_token_id": 32000,
        "text_config": {
            "model_type": "llama",
            "pad_token_id": 32000,
            "vocab_size": PADDED_VOCAB_SIZE,
            "hidden_size": TINY.hidden_size,
            "intermediate_size": TINY.intermediate_size,
            "num_hidden_layers": TINY.num_hidden_layers,
            "num_attention_heads": TINY.num_attention_heads,
            "num_key_value_heads": TINY.num_key_value_heads,
        },
        TOWERS_KEY: towers,
        "use_fused_vision_backbone": True,
        "vision_backbone_id": "dinosiglip-vit-so-224px",
    }


def tiny_tensors(seed: int = 0) -> dict[str, Tensor]:
    """Random weights under upstream's names, those that no output depends on included."""
    return {name: _draw(name, tuple(shape), seed) for name, shape in checkpoint_shapes(TINY).items()}


def checkpoint_shapes(config: OpenVLAOFTConfig) -> dict[str, torch.Size]:
    """Names and shapes of a public checkpoint's tensors, those that no output depends on included."""
    with torch.device("meta"):
        state = OpenVLAOFT(config, None, {"any": {"action": IDENTITY}}).state_dict()
    shapes = {name: tensor.shape for name, tensor in state.items()}
    for tower, sizes in (("featurizer", config.dinov2), ("fused_featurizer", config.siglip)):
        root, width = f"vision_backbone.{tower}.", torch.Size([sizes.embed_dim])
        shapes |= {root + "norm.weight": width, root + "norm.bias": width}
        for name, shape in list(shapes.items()):
            if name.startswith(f"{root}blocks.0."):
                shapes[name.replace("blocks.0", f"blocks.{sizes.depth - 1}")] = shape
    pool = _attention_pool(config.siglip)
    return shapes | {f"vision_backbone.fused_featurizer.attn_pool.{n}": torch.Size(s) for n, s in pool.items()}


def _attention_pool(config: TowerConfig) -> dict[str, tuple[int, ...]]:
    d, hidden = config.embed_dim, int(config.embed_dim * config.mlp_ratio)
    layers = {"q": (d, d), "kv": (2 * d, d), "proj": (d, d), "mlp.fc1": (hidden, d), "mlp.fc2": (d, hidden)}
    shapes: dict[str, tuple[int, ...]] = {"latent": (1, 1, d), "norm.weight": (d,), "norm.bias": (d,)}
    for name, shape in layers.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def _draw(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    rng = np.random.default_rng([zlib.crc32(name.encode()), seed])
    values = rng.standard_normal(shape, dtype=np.float32)
    if name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "layernorm.weight", "scale_factor")):
        values = 0.8 + 0.1 * values
    elif len(shape) == 1:
        values *= np.float32(0.1)
    elif name.endswith("lm_head.weight"):
        values *= np.float32(0.3)
        rows = np.arange(shape[0])
        values[(rows < 31744) | (rows >= 32000)] *= np.float32(0.01)  # the largest score is always an action token
    elif not name.endswith(("embed_tokens.weight", "pos_embed", "token")):
        values *= np.float32(1.2 / np.prod(shape[1:]) ** 0.5)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            values *= np.float32(5)  # placeholders differ by their position alone; sharp attention tells them apart
    return torch.from_numpy(values.astype(np.float32))


def tiny_tokenizer() -> Tokenizer:
    """A byte-pair tokenizer with 32000 entries; characters, bytes and special tokens have ids as in Llama-2's."""
    characters = "▁etaoinsrhldcmufpgwybvkxjqzETAOINSRHLDCMUFPGWYBVKXJQZ:?.,'-0123456789"
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("o", "t"), ("ro", "b"), ("r", "o"), ("i", "n")]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += ["".join(pair) for pair in merges]
    tokens += [f"<filler {i}>" for i in range(BLANK - len(tokens))] + list(characters)
    tokens += [f"<action {i}>" for i in range(len(tokens), 32000)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


if __name__ == "__main__":
    print(json.dumps({"folder": str(write_tiny_openvla(sys.argv[1]))}))  # noqa: T201
