"""Llama with attention over the whole sequence, and the head that scores action tokens.

OpenVLA-OFT was trained with bidirectional attention. With a causal mask it still runs, and on LIBERO-Spatial its success falls
from 98 % to 52 % without an error. The mask is therefore explicit, and ``check_bidirectional`` tests it at every load.

Shape letters: B rows, S positions, D width.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaModel

from rawdream_env.errors import CausalAttentionError
from rawdream_env.policies.action_tokens import LM_VOCAB_SIZE, NUM_TOKENS
from rawdream_env.policies.openvla_oft.config import PADDED_VOCAB_SIZE, OpenVLAOFTConfig


class LanguageModel(nn.Module):
    """``model``: Llama without a causal mask; ``lm_head``: scores of the 256 action tokens."""

    def __init__(self, config: OpenVLAOFTConfig) -> None:
        super().__init__()
        self.model = LlamaModel(llama_config(config))
        self.lm_head = ActionHead(config.hidden_size, PADDED_VOCAB_SIZE, bias=False)
        self.gradient_checkpointing = False

    def forward(self, embeddings: Tensor, present: Tensor) -> Tensor:
        """Embeddings (B, S, D), ``present`` bool (B, S), False for padding -> last hidden states (B, S, D)."""
        mask = bidirectional_mask(present)
        hidden: Tensor = self.model(inputs_embeds=embeddings, attention_mask=mask, use_cache=False).last_hidden_state
        return hidden

    def enable_gradient_checkpointing(self) -> None:
        """Keep one activation per layer and compute the others again in the backward pass."""
        model: Any = self.model
        # transformers 5 renames it; the former name warns
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        self.gradient_checkpointing = True
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """As usual; with gradient checkpointing, which works in training mode, always that. There is no dropout to switch."""
        return super().train(mode or self.gradient_checkpointing)

    def rebuild_rotary(self, device: torch.device) -> None:
        """Compute the rotary frequencies, which no checkpoint has, after a construction on the meta device."""
        with torch.device("cpu"):
            self.model.rotary_emb = type(self.model.rotary_emb)(self.model.config).to(device)


class ActionHead(nn.Linear):
    """The language-model head, of which only the rows of action tokens are used: (..., D) -> fp32 (..., 256) in token order."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Scores in float32, whatever the precision of the weights."""
        rows = self.weight[LM_VOCAB_SIZE - NUM_TOKENS : LM_VOCAB_SIZE].float()
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.float(), rows).flip(-1)


def bidirectional_mask(present: Tensor) -> Tensor:
    """``present`` (B, S) -> bool (B, 1, S, S): every position sees every position that is not padding."""
    b, s = present.shape
    return present[:, None, None, :].expand(b, 1, s, s)


@torch.no_grad()
def check_bidirectional(model: LanguageModel) -> None:
    """Change the last position's embedding; the first position's output must change.

    Raises:
        CausalAttentionError: it does not.
    """
    weight: Any = model.model.embed_tokens.weight
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(1, 8, weight.shape[1], generator=generator)
    second = torch.cat([first[:, :-1], torch.randn(1, 1, weight.shape[1], generator=generator)], dim=1)
    present = torch.ones(1, 8, dtype=torch.bool, device=weight.device)
    outputs = [model(x.to(weight.device, weight.dtype), present)[:, 0] for x in (first, second)]
    if torch.equal(*outputs):
        raise CausalAttentionError(
            "the language model's attention is causal: a later token does not change an earlier one's output, but OpenVLA-OFT "
            "needs both directions. Use transformers' 'sdpa' attention, and a version that accepts four-dimensional masks."
        )


def llama_config(config: OpenVLAOFTConfig) -> LlamaConfig:
    """transformers' configuration of the language model."""
    options: dict[str, Any] = {"attn_implementation": "sdpa"}  # untyped in transformers
    return LlamaConfig(
        vocab_size=PADDED_VOCAB_SIZE,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        pad_token_id=LM_VOCAB_SIZE,
        **options,
    )
