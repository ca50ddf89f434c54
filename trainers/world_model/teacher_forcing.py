"""Denoise all chunks of an episode in one pass: clean frames as context, a noisy copy of every chunk as target.

The clean stream is the anchor and latents 1..M-G (with a little noise, as in a rollout); the noisy stream is latents 1..M. A
noisy chunk attends to the anchor, the ``context_latents`` most recent clean frames and, causally, itself, as in a rollout.
This takes about 2G frame passes per chunk; one window per chunk takes G + 7.

Shape letters: B batch, M latent frames after the anchor, G latent frames per chunk, C H W latent frame.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rawdream_env.world_models.wan.attention import rope_tables, rotate, token_mask
from rawdream_env.world_models.wan.blocks import Condition
from rawdream_env.world_models.wan.transformer import WanWorldModelTransformer


@dataclass(frozen=True)
class EpisodeBatch:
    """``latents`` (B, M+1, C, H, W), the anchor first; ``conditions`` (B, M+1, D_c); ``arm_maps`` (B, M+1, C_m, H, W)
    or None; ``focus`` (B, M, H, W), 1 where the loss has a larger weight, or None.
    """

    latents: Tensor
    conditions: Tensor
    arm_maps: Tensor | None
    focus: Tensor | None = None


def chunk_windows(num_latents: int, chunk_latents: int, context_latents: int) -> tuple[Tensor, Tensor]:
    """The clean frames that each chunk attends to, the anchor first: indices (T, 1 + R) and whether they exist (T, 1 + R)."""
    before = torch.arange(0, num_latents, chunk_latents)  # the last clean frame of each chunk
    recent = before[:, None] - torch.arange(context_latents - 1, -1, -1)
    index = torch.cat([torch.zeros_like(before)[:, None], recent.clamp(min=0)], 1)
    return index, torch.cat([torch.ones_like(before, dtype=torch.bool)[:, None], recent >= 1], 1)


def denoise_all_chunks(
    model: WanWorldModelTransformer,
    batch: EpisodeBatch,
    clean: Tensor,
    clean_level: Tensor,
    noisy: Tensor,
    level: Tensor,
) -> tuple[Tensor, Tensor]:
    """Predict every latent after the anchor.

    ``clean`` (B, M-G+1, C, H, W) context with noise level ``clean_level`` (B, M-G+1); ``noisy`` (B, M, C, H, W) targets
    at ``level`` (B, M). Returns the model output (B, M, C, H, W) and the base of each frame's residual.
    """
    arch, device = model.arch, noisy.device
    b, m = noisy.shape[:2]
    g, n, r, p = arch.chunk_latents, clean.shape[1], arch.context_latents, arch.tokens_per_frame
    t = m // g
    base_noisy = clean[:, torch.arange(m, device=device) // g * g]  # the clean frame just before each target's chunk
    order = torch.cat([torch.arange(n), torch.arange(1, m + 1)]).to(device)
    embedder = model.condition_embedder
    condition = embedder.time(torch.cat([clean_level, level], 1)) + embedder.action(batch.conditions[:, order])
    tokens, stem = model.embed(
        torch.cat([clean, noisy], 1),
        torch.cat([torch.zeros_like(clean), base_noisy], 1),
        None if batch.arm_maps is None else batch.arm_maps[:, order],
        condition,
    )
    cos, sin = rope_tables(order, arch.grid, arch.attention_head_dim)
    prompt = model.prompt_keys()

    frame = torch.arange(n)  # the clean stream: causal, limited to the length of the context
    visible = (frame[None] <= frame[:, None]) & ((frame[None] > frame[:, None] - r) | (frame[None] == 0))
    mask, clean_rope = token_mask(visible.to(device), p), (cos[: n * p], sin[: n * p])
    _, caches = model.run_blocks(tokens[:, :n], condition[:n], clean_rope, mask, None, prompt, keys_only=True)

    index, exists = (x.to(device) for x in chunk_windows(m, g, r))  # then all chunks at once, as rows of a rollout

    def window(x: Tensor) -> Tensor:  # (B, N, n*P, Dh) -> (B*T, N, (1+R)*P, Dh)
        picked: Tensor = x.unflatten(2, (n, p))[:, :, index]
        return picked.permute(0, 2, 1, 3, 4, 5).flatten(0, 1).flatten(2, 3)

    causal = torch.ones(g, g, dtype=torch.bool, device=device).tril()
    sees = torch.cat([exists[:, None].expand(-1, g, -1), causal.expand(t, -1, -1)], 2)
    sees = sees.repeat_interleave(p, 1).repeat_interleave(p, 2).repeat(b, 1, 1)[:, None]
    rope = tuple(x[n * p :].view(t, 1, g * p, -1).repeat(b, 1, 1, 1) for x in (cos, sin))
    rows = tokens[:, n:].unflatten(1, (t, g)).flatten(0, 1)
    targets = condition[n:]
    row_condition = Condition(*(x.unflatten(1, (t, g)).flatten(0, 1) for x in (targets.vector, targets.modulation)))
    context = [(window(rotate(k, clean_rope).to(v.dtype)), window(v)) for k, v in caches]
    features, _ = model.run_blocks(rows, row_condition, (rope[0], rope[1]), sees, context, prompt)
    features = features.unflatten(0, (b, t)).flatten(1, 2)
    stem = stem.unflatten(0, (b, -1))[:, n:].flatten(0, 1)
    return model.predict(features, stem, targets, base_noisy), base_noisy
