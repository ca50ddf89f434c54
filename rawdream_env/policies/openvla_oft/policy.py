"""OpenVLA-OFT with discrete action tokens behind the policy protocol.

One image and one sentence in, 8 x 7 action tokens out, all decoded in one parallel pass. The sequence is

    [BOS] [256 patches] [prompt, the last token is the blank] [56 placeholders, zero] [STOP] [padding]

with attention over all of it but the padding. The output at the blank scores action token 0, that at placeholder i token
i + 1. Weights are read and written under the names of the public checkpoints, so that folders load upstream as well.

Shape letters: B rows, H W image, N = 256 patches, P prompt tokens, S positions, D width, K actions in a chunk, A action
dimensions, L = K*A action tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rawdream_env.files import atomic_write_bytes, atomic_write_json
from rawdream_env.policies import action_tokens
from rawdream_env.policies.base import TokenPolicy
from rawdream_env.policies.openvla_oft import adapters, augment, checkpoint, images, prompt
from rawdream_env.policies.openvla_oft.config import OpenVLAOFTConfig, read_config
from rawdream_env.policies.openvla_oft.frame_cache import FrameCache
from rawdream_env.policies.openvla_oft.language import LanguageModel, check_bidirectional
from rawdream_env.policies.openvla_oft.statistics import (
    STATISTICS,
    ActionStatistics,
    choose_statistics,
    read_statistics,
)
from rawdream_env.policies.openvla_oft.vision import NUM_PATCHES, Projector, VisionBackbone
from rawdream_env.types import ACTION_DIM

CHUNK_LEN = 8
FEATURE_CACHE_BYTES, IMAGE_CACHE_BYTES = 4 * 2**30, 2**30
PROMPT_BLOCK = 16
"""Prompts are padded to a multiple of this, so that a row's result depends on its own length alone."""
_CARRIED_FILES = ("*.json", "*.txt", "*.model", "*.jinja")
_CARRIED_BYTES = 16 * 2**20


class OpenVLAOFT(TokenPolicy):
    """OpenVLA-OFT. See the module's docstring for the sequence and ``TokenPolicy`` for acting.

    ``from_pretrained`` loads a public checkpoint. All parameters are trainable at first; ``freeze_vision`` and ``add_lora``
    change that. With frozen towers the features of a frame are computed once and kept (``feature_cache``). Images may have
    any size; frames are upright, as the environment shows them.

    Args:
        config: sizes.
        tokenizer: Llama-2's, see ``prompt.load_tokenizer``.
        statistics: contents of ``dataset_statistics.json``.
        unnorm_key: the data set whose statistics scale the actions; None: the only one.
        upstream: the checkpoint's ``config.json``, written back by ``save_pretrained``.
        files: further files of the checkpoint by name, written back as well.
    """

    chunk_len = CHUNK_LEN
    action_dim = ACTION_DIM
    image_size = None
    token_head = ("language_model.lm_head.",)

    def __init__(
        self,
        config: OpenVLAOFTConfig,
        tokenizer: Any,
        statistics: Mapping[str, Any],
        *,
        unnorm_key: str | None = None,
        upstream: Mapping[str, Any] | None = None,
        files: Mapping[str, bytes] | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.hidden_width, self.feature_width = config.hidden_size, ACTION_DIM * config.hidden_size
        self.tokenizer, self.statistics = tokenizer, dict(statistics)
        self.upstream, self.files = dict(upstream or {}), dict(files or {})
        self.unnorm_key: str
        self.action_statistics: ActionStatistics
        self.use_statistics(unnorm_key)
        self.unused: dict[str, Tensor] = {}  # tensors of the checkpoint that no output depends on
        self.feature_cache = FrameCache(FEATURE_CACHE_BYTES)  # about 1 MB per frame at full size
        self.image_cache = FrameCache(IMAGE_CACHE_BYTES)
        self.resized_cache = FrameCache(IMAGE_CACHE_BYTES)
        self._prompts: dict[str, list[int]] = {}
        self.vision_backbone = VisionBackbone(config.dinov2, config.siglip)
        self.projector = Projector(config.dinov2.embed_dim + config.siglip.embed_dim, config.hidden_size)
        self.language_model = LanguageModel(config)

    def use_statistics(self, unnorm_key: str | None) -> None:
        """Choose the data set whose statistics scale the actions; ``libero_goal`` also finds ``libero_goal_no_noops``."""
        self.unnorm_key, self.action_statistics = choose_statistics(self.statistics, unnorm_key, "the policy")

    # -- scores ----------------------------------------------------------------------------------------------------

    def logits(self, images: Any, instructions: Sequence[str]) -> Tensor:
        """Token scores (B, L, 256) in float32; differentiable; any B."""
        return self.token_logits(self.features(self.check_images(images, instructions)), instructions)

    def features(self, frames: Tensor) -> Tensor:
        """Patch features (B, N, D1 + D2) of ``frames`` uint8 (B, H, W, 3). Of frozen towers: kept, without a gradient."""
        if any(p.requires_grad for p in self.vision_backbone.parameters()):
            self.feature_cache.clear()
            return self._tower_features(self.image_cache.look_up(frames.cpu(), _prepare))
        return self.feature_cache.look_up(frames.cpu(), self._frozen_features).to(self.device)

    def training_images(self, frames: Tensor, rng: np.random.Generator) -> Tensor:
        """Frames uint8 (B, H, W, 3) with random crops and colors: images uint8 (B, 224, 224, 3) for ``image_logits``."""
        return augment.augment(self.resized_cache.look_up(frames.cpu(), _resize).to(self.device), rng)

    def image_logits(self, images: Tensor, instructions: Sequence[str]) -> Tensor:
        """Token scores (B, L, 256) in float32 of ``training_images``; nothing is kept."""
        return self.token_logits(self._tower_features(images), instructions)

    def token_logits(self, features: Tensor, instructions: Sequence[str]) -> Tensor:
        """Token scores (B, L, 256) of patch features (B, N, D1 + D2) as ``features`` gives them, in float32."""
        prompts = [self.prompt(instruction) for instruction in instructions]
        return self.prompt_logits(self.projector(features), prompts)

    def action_features(self, frames: Tensor, instructions: Sequence[str]) -> Tensor:
        """The outputs at an action's A placeholders, side by side: (B, K, A * D)."""
        prompts = [self.prompt(instruction) for instruction in instructions]
        hidden = self._hidden(self.projector(self.features(frames)), prompts)
        return hidden.reshape(len(hidden), CHUNK_LEN, -1)

    def prompt_logits(self, patches: Tensor, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Token scores (B, L, 256) of projected patches (B, N, D) and prompt ids from BOS to the blank."""
        scores: Tensor = self.language_model.lm_head(self._hidden(patches, prompts))
        return scores

    def _hidden(self, patches: Tensor, prompts: Sequence[Sequence[int]]) -> Tensor:
        """The outputs (B, L, D) that score the action tokens."""
        lengths = torch.tensor([len(ids) for ids in prompts], device=patches.device)
        longest = padded_length(max(len(ids) for ids in prompts))
        tail = [0] * self.num_action_tokens + [prompt.STOP]
        size = longest + len(tail)
        rows = [[*ids, *tail, *[action_tokens.LM_VOCAB_SIZE] * (size - len(ids) - len(tail))] for ids in prompts]
        text = self.language_model.model.embed_tokens(torch.tensor(rows, device=patches.device))
        place = torch.arange(size, device=patches.device) - lengths[:, None]  # 0 at the first placeholder
        text = text * ((place < 0) | (place >= self.num_action_tokens))[..., None]
        embeddings = torch.cat([text[:, :1], patches.to(text.dtype), text[:, 1:]], dim=1)
        present = F.pad(place <= self.num_action_tokens, (NUM_PATCHES, 0), value=True)
        hidden = self.language_model(embeddings, present)
        slots = NUM_PATCHES + lengths[:, None] - 1 + torch.arange(self.num_action_tokens, device=patches.device)
        chosen: Tensor = hidden.gather(1, slots[..., None].expand(-1, -1, hidden.shape[-1]))
        return chosen

    def prompt(self, instruction: str) -> list[int]:
        """Token ids of an instruction, from BOS to the blank."""
        if instruction not in self._prompts:
            self._prompts[instruction] = prompt.prompt_ids(self.tokenizer, instruction)
        return self._prompts[instruction]

    def _tower_features(self, prepared: Tensor) -> Tensor:
        weight = self.vision_backbone.featurizer.pos_embed
        features: Tensor = self.vision_backbone(images.normalise(prepared.to(self.device)).to(weight.dtype))
        return features

    @torch.no_grad()
    def _frozen_features(self, frames: Tensor) -> Tensor:
        """Features in blocks of exactly ``act_batch`` rows, so that a frame's features depend on it alone."""
        prepared = _prepare(frames)
        with torch.autocast(self.device.type, enabled=False):
            blocks = [self._tower_features(prepared[rows]) for rows in self.blocks(len(frames))]
        return torch.cat(blocks)[: len(frames)]

    def blocked(
        self,
        compute: Callable[[Tensor, list[str]], Tensor],
        frames: Tensor,
        instructions: list[str],
        shape: tuple[int, ...],
    ) -> Tensor:
        """As the base class, separately for each padded length of prompts."""
        lengths = np.array([padded_length(len(self.prompt(text))) for text in instructions], dtype=np.int64)
        out = torch.zeros(len(frames), *shape, device=self.device)
        for length in np.unique(lengths):
            rows = np.flatnonzero(lengths == length).tolist()
            out[rows] = super().blocked(compute, frames[rows], [instructions[row] for row in rows], shape)
        return out

    # -- actions ---------------------------------------------------------------------------------------------------

    def to_environment(self, actions: Tensor) -> Tensor:
        """The model's normalised actions (B, K, A) -> environment actions."""
        return self.action_statistics.to_environment(actions)

    def encode_actions(self, actions: Tensor) -> Tensor:
        """Environment actions (B, K, A) -> tokens (B, L)."""
        return super().encode_actions(self.action_statistics.from_environment(actions))

    @property
    def layers(self) -> nn.ModuleList:
        """The language model's layers, which are sharded one by one."""
        layers: nn.ModuleList = self.language_model.model.layers
        return layers

    # -- what is trained -------------------------------------------------------------------------------------------

    def set_statistics(self, name: str, statistics: Mapping[str, Any]) -> None:
        """Scale the actions by the ``statistics`` of a new data set (``measure_statistics``) instead of the present ones."""
        self.statistics = {name: dict(statistics)}
        self.upstream["norm_stats"] = self.statistics
        self.use_statistics(name)

    def freeze_vision(self) -> None:
        """Do not train the vision towers; their features are computed once per frame."""
        self.vision_backbone.requires_grad_(False)
        self.feature_cache.clear()

    def enable_gradient_checkpointing(self) -> None:
        """Compute the language model's activations again in the backward pass, to save memory."""
        self.language_model.enable_gradient_checkpointing()

    def add_lora(self, rank: int = 32, *, alpha: float | None = None, vision: bool = False, seed: int = 0) -> None:
        """Train LoRA adapters instead of the weights; see ``adapters.add_lora``."""
        adapters.add_lora(self, rank=rank, alpha=alpha, vision=vision, seed=seed)
        self.feature_cache.clear()

    def save_adapters(self, folder: str | Path) -> None:
        """Write the LoRA adapters alone, in peft's format."""
        adapters.save_lora(self, Path(folder))

    def load_adapters(self, folder: str | Path) -> None:
        """Add LoRA adapters in peft's format; only they are trainable afterwards."""
        adapters.load_lora(self, Path(folder))
        self.feature_cache.clear()

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        metadata: Mapping[str, Any] | None = None,
        shard_bytes: int = checkpoint.SHARD_BYTES,
    ) -> None:
        """Write a folder that this class and upstream load: weights with adapters merged, ``config.json`` (with
        ``metadata``), ``dataset_statistics.json`` and the tokenizer. The policy, its adapters included, stays as it is.
        """
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        checkpoint.write_tensors(path, {**self.unused, **adapters.merged_tensors(self)}, shard_bytes)
        for name, content in self.files.items():
            atomic_write_bytes(path / name, content)
        atomic_write_json(path / STATISTICS, self.statistics)
        described = {"metadata": dict(metadata)} if metadata else {}
        atomic_write_json(path / "config.json", {**self.upstream, "unnorm_key": self.unnorm_key, **described})

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        device: str | torch.device = "cpu",
        *,
        dtype: torch.dtype | None = None,
        unnorm_key: str | None = None,
        continuous: bool = False,
    ) -> Self:
        """Load a checkpoint folder.

        Args:
            folder: with ``config.json``, safetensors, ``tokenizer.json`` and ``dataset_statistics.json``.
            device: where the weights go.
            dtype: precision of the weights; None: as stored.
            unnorm_key: see the class; None: what ``config.json`` names, or the only data set.
            continuous: accept an L1 action head in the folder, whose language model knows no action tokens
                (:mod:`rawdream_env.policies.laplace`).

        Raises:
            CheckpointError: another kind of checkpoint, or a damaged one; each has its own sentence.
            CausalAttentionError: attention does not reach backwards and forwards.
            InvalidOptionError: no or an ambiguous ``unnorm_key``.
        """
        path = Path(folder)
        config, upstream = read_config(path, continuous)
        statistics, tokenizer = read_statistics(path), prompt.load_tokenizer(path)
        key = unnorm_key or upstream.get("unnorm_key")
        with torch.device("meta"):
            policy = cls(config, tokenizer, statistics, unnorm_key=key, upstream=upstream, files=_small_files(path))
        stored = checkpoint.list_tensors(path)
        checkpoint.check_tensors(stored, policy.state_dict(), _unused_names(config), path)
        policy._fill(stored, torch.device(device), dtype)
        check_bidirectional(policy.language_model)
        return policy.eval()

    def _fill(
        self, stored: Mapping[str, checkpoint.StoredTensor], device: torch.device, dtype: torch.dtype | None
    ) -> None:
        """Replace the tensors on the meta device by those of a checkpoint."""
        wanted = self.state_dict()
        for name, tensor in checkpoint.read_tensors(stored, [n for n in stored if not n.endswith("inv_freq")]):
            if name in wanted:
                parent, _, leaf = name.rpartition(".")
                setattr(self.get_submodule(parent), leaf, nn.Parameter(tensor.to(device, dtype)))
            else:
                self.unused[name] = tensor.to(dtype=dtype)
        self.language_model.rebuild_rotary(device)


def _prepare(frames: Tensor) -> Tensor:
    return torch.from_numpy(images.prepare(frames.numpy()))


def _resize(frames: Tensor) -> Tensor:
    return torch.from_numpy(images.prepare(frames.numpy(), crop=False))


def padded_length(length: int) -> int:
    """``length`` rounded up to a multiple of ``PROMPT_BLOCK``."""
    return -(-length // PROMPT_BLOCK) * PROMPT_BLOCK


def _unused_names(config: OpenVLAOFTConfig) -> re.Pattern[str]:
    """Tensors of public checkpoints behind the features, and rotary frequencies of old ones."""
    ends = [("featurizer", config.dinov2.depth), ("fused_featurizer", config.siglip.depth)]
    towers = "|".join(rf"{name}\.(norm|attn_pool|blocks\.{depth - 1})" for name, depth in ends)
    return re.compile(rf"vision_backbone\.({towers})\.|.*rotary_emb\.inv_freq$")


def _small_files(folder: Path) -> dict[str, bytes]:
    """Tokenizer and processor files, kept for ``save_pretrained``."""
    own = ("config.json", STATISTICS, checkpoint.INDEX, "manifest.json")
    paths = sorted(path for pattern in _CARRIED_FILES for path in folder.glob(pattern))
    return {
        path.name: path.read_bytes()
        for path in paths
        if path.name not in own and path.is_file() and path.stat().st_size <= _CARRIED_BYTES
    }
