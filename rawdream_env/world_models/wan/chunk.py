"""One autoregressive step of the denoiser: context keys and values once per step, new frames at each evaluation.

Context noise is drawn once per step, so the context's keys and values are the same at every evaluation of the sampler and
computing them once is exact. (The paper does not say whether it draws the noise once per step or at each evaluation.) Other
savings that do not change the result:

- the anchor sees only itself, so rows with the same start frame share its keys and values (a group of GRPO does);
- the last block of the context pass stops after its keys and values;
- timestep modulation comes from a table (all rows of an evaluation have one noise level), action modulation is computed
  once per step;
- the prompt's keys and values are constants of the model.

Modes of ``ContextCache``: ``step`` is the above. ``none`` recomputes all frames at every evaluation, with the same result.
``rolling`` keeps keys and values across steps and computes only those of the newest frames; it is an approximation, because
the keys of a frame come from the context in which it was first seen.

Shape letters: B rows, U different anchors, R recent latent frames, G new ones, C H W latent frame, P tokens in a frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from rawdream_env.world_models.wan.attention import KeyValues, PromptKeys, Rope, frame_mask, rope_tables, rotate
from rawdream_env.world_models.wan.blocks import Condition
from rawdream_env.world_models.wan.transformer import WanWorldModelTransformer

ContextCache = Literal["step", "none", "rolling"]


class ConditionCache:
    """Values that depend only on the weights: the prompt's keys and values, and timestep conditions by noise level."""

    def __init__(self, model: WanWorldModelTransformer) -> None:
        self._model = model
        self._times: dict[float, Condition] = {}
        self._prompt: Sequence[PromptKeys | None] | None = None

    @property
    def prompt(self) -> Sequence[PromptKeys | None]:
        """One entry per block."""
        if self._prompt is None:
            self._prompt = self._model.prompt_keys()
        return self._prompt

    def time(self, level: float) -> Condition:
        """The condition on one noise level, (1, 1, ...)."""
        if level not in self._times:
            if len(self._times) > 512:
                self._times.clear()
            device = self._model.proj_out.weight.device
            self._times[level] = self._model.condition_embedder.time(torch.full((1, 1), level, device=device))
        return self._times[level]

    def times(self, levels: Sequence[float]) -> Condition:
        """Rows of one frame each: (B, 1, ...)."""
        rows = [self.time(level) for level in levels]
        return Condition(torch.cat([r.vector for r in rows]), torch.cat([r.modulation for r in rows]))


@dataclass(frozen=True)
class Context:
    """The context of B rows, with noise; all rows have the same number of context frames.

    ``frames`` (B, 1 + n, C, H, W), the anchor first; ``anchor_level`` and ``anchor_name`` of each row; ``conditions``
    (B, 1 + n, D_c); ``maps`` (B, 1 + n, C_m, H, W); ``times``: each row's position of the first new frame; ``cache``: rolling
    keys and values of the n - G older recent frames, right-aligned in R frames.
    """

    frames: Tensor
    level: float
    anchor_level: Sequence[float]
    anchor_name: Sequence[object]
    conditions: Tensor
    maps: Tensor
    times: Sequence[int]
    cache: tuple[Tensor, ...] = field(default=())


class ChunkDenoiser:
    """Clean-sample estimate of G new frames at a noise level: the ``denoise`` argument of ``sample_flow``."""

    def __init__(
        self,
        model: WanWorldModelTransformer,
        condition_cache: ConditionCache,
        context: Context,
        conditions: Tensor,
        maps: Tensor,
        context_cache: ContextCache = "step",
    ) -> None:
        self.model, self.context, self.maps = model, context, maps
        self.condition_cache, self.context_cache = condition_cache, context_cache
        arch, device = model.arch, context.frames.device
        self.n, g, p = context.frames.shape[1], arch.chunk_latents, arch.tokens_per_frame
        self.base = context.frames[:, -1:].expand(-1, g, -1, -1, -1)
        self.action = model.condition_embedder.action(conditions)
        self.rope = self._positions(device)
        self.causal = torch.ones(self.n + g, self.n + g, dtype=torch.bool).tril()
        self.mask_new = frame_mask(self.causal[self.n :], p, device)
        self.cache: tuple[Tensor, ...] = ()
        self.keys_values = None if context_cache == "none" else self._context_keys()

    def _positions(self, device: torch.device) -> Rope:
        """Rotary tables of all frames: (L, Dh/2), or (B, 1, L, Dh/2) when rows are at different times."""
        arch, times = self.model.arch, self.context.times

        def table(time: int) -> Rope:
            frames = torch.cat([torch.zeros(1), torch.arange(time - self.n + 1, time + arch.chunk_latents)])
            return rope_tables(frames.long().to(device), arch.grid, arch.attention_head_dim)

        tables = {time: table(time) for time in set(times)}
        if len(tables) == 1:
            return tables[times[0]]
        cos, sin = (torch.stack([tables[time][i] for time in times])[:, None] for i in (0, 1))
        return cos, sin

    def _rope(self, frames: slice) -> Rope:
        p = self.model.arch.tokens_per_frame
        if frames.stop == 1:  # the anchor's position is 0 for every row
            cos, sin = (x if x.dim() == 2 else x[0, 0] for x in self.rope)
            return cos[:p], sin[:p]
        tokens = slice(*(None if i is None else i * p for i in (frames.start, frames.stop)))
        return self.rope[0][..., tokens, :], self.rope[1][..., tokens, :]

    def _context_condition(self, rows: Tensor | None, frames: slice) -> Condition:
        """Conditions of context frames, either of the anchor or of the recent frames."""
        c = self.context
        given = c.conditions[:, frames] if rows is None else c.conditions[rows][:, frames]
        if frames.start == 0:
            chosen = range(len(c.anchor_level)) if rows is None else rows.tolist()
            return self.condition_cache.times(
                [c.anchor_level[i] for i in chosen]
            ) + self.model.condition_embedder.action(given)
        return self.condition_cache.time(c.level) + self.model.condition_embedder.action(given)

    def _pass(self, rows: Tensor | None, frames: slice, before: KeyValues | None) -> KeyValues:
        """Keys (not rotated) and values of some context frames, which attend to ``before`` (rotated) and, causally, to
        themselves.
        """
        c, arch = self.context, self.model.arch
        condition = self._context_condition(rows, frames)
        pictures, maps = (x[:, frames] if rows is None else x[rows][:, frames] for x in (c.frames, c.maps))
        tokens, _ = self.model.embed(pictures, None, maps, condition)
        visible = self.causal[frames, : frames.stop]
        mask = frame_mask(visible, arch.tokens_per_frame, tokens.device)
        prompt = self.condition_cache.prompt
        return self.model.run_blocks(tokens, condition, self._rope(frames), mask, before, prompt, keys_only=True)[1]

    def _context_keys(self) -> KeyValues:
        """Rotated keys and values of the whole context, one pair per block."""
        arch, n = self.model.arch, self.n
        first, inverse = _shared(self.context.anchor_name, self.context.frames.device)
        anchor = [
            (rotate(k, self._rope(slice(0, 1))).to(v.dtype)[inverse], v[inverse])
            for k, v in self._pass(first, slice(0, 1), None)
        ]
        recent, p = n - 1, arch.tokens_per_frame
        if not recent:
            if self.context_cache == "rolling":
                self.cache = self._pad([(k[:, :, :0], v[:, :, :0]) for k, v in anchor])
            return anchor
        kept: KeyValues = []
        if self.context_cache == "rolling":
            old = recent - arch.chunk_latents
            cached = self.context.cache
            size = cached[0].shape[2]
            kept = [(cached[i][:, :, size - old * p :], cached[i + 1][:, :, size - old * p :])
                    for i in range(0, len(cached), 2)]  # fmt: skip
        else:
            old = 0
        before = _joined(anchor, list(kept), self._rope(slice(1, 1 + old))) if old else anchor
        new = self._pass(None, slice(1 + old, n), before)
        if self.context_cache == "rolling":
            joined = [(torch.cat([k0, k1], 2), torch.cat([v0, v1], 2))
                      for (k0, v0), (k1, v1) in zip(kept, new, strict=True)]  # fmt: skip
            self.cache = self._pad(joined)
        return _joined(before, new, self._rope(slice(1 + old, n)))

    def _pad(self, caches: KeyValues) -> tuple[Tensor, ...]:
        """Pad to R frames, right-aligned, so that rows at different steps can share a batch."""
        room = self.model.arch.context_latents * self.model.arch.tokens_per_frame
        return tuple(torch.nn.functional.pad(x, (0, 0, room - x.shape[2], 0)) for pair in caches for x in pair)

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        """``x`` (B, G, C, H, W) at noise level ``sigma`` -> the estimate of the clean sample."""
        model, prompt = self.model, self.condition_cache.prompt
        condition = self.condition_cache.time(sigma) + self.action
        tokens, stem = model.embed(x, self.base, self.maps, condition)
        if self.keys_values is not None:
            rope = self._rope(slice(self.n, None))
            tokens, _ = model.run_blocks(tokens, condition, rope, self.mask_new, self.keys_values, prompt, keep=False)
        else:
            tokens = self._joint(tokens, condition, prompt)
        out = model.predict(tokens, stem, condition, self.base)
        return out if model.arch.residual else x - sigma * out

    def _joint(self, tokens: Tensor, condition: Condition, prompt: Sequence[PromptKeys | None]) -> Tensor:
        """Features of the new frames, computed together with the context."""
        c, n = self.context, self.n
        parts = [self._context_condition(None, slice(0, 1))]
        if n > 1:
            parts.append(self._context_condition(None, slice(1, n)))
        parts.append(condition)
        joint = Condition(torch.cat([x.vector for x in parts], 1), torch.cat([x.modulation for x in parts], 1))
        before, _ = self.model.embed(c.frames, None, c.maps, joint[:n])
        mask = frame_mask(self.causal, self.model.arch.tokens_per_frame, tokens.device)
        both = torch.cat([before, tokens], 1)
        features, _ = self.model.run_blocks(both, joint, self.rope, mask, None, prompt, keep=False)
        return features[:, n:]


def _joined(before: KeyValues, after: KeyValues, rope: Rope) -> KeyValues:
    """Rotated keys and values ``before``, followed by those ``after``, which are rotated here. Both lists are emptied
    meanwhile, so that memory holds little more than the result.
    """
    out: KeyValues = []
    while after:
        (k0, v0), (k1, v1) = before.pop(0), after.pop(0)
        out.append((torch.cat([k0, rotate(k1, rope).to(v1.dtype)], 2), torch.cat([v0, v1], 2)))
    return out


def _shared(names: Sequence[object], device: torch.device) -> tuple[Tensor, Tensor]:
    """The index of the first row with each different name (U,), and for every row the index of its name (B,)."""
    place = {name: i for i, name in enumerate(dict.fromkeys(names))}
    first = [names.index(name) for name in place]
    inverse = [place[name] for name in names]
    return torch.tensor(first, device=device), torch.tensor(inverse, device=device)
