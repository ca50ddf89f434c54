"""The objectives of the world model as pure functions of a batch and its noise.

Rectified flow (paper, Eq. 1): z_tau = tau * eps + (1 - tau) * z0, velocity v = eps - z0. There are two objectives:

- ``window_loss`` (the paper's): 33 frames, an anchor and M latents. The anchor and the first n latents are context, each
  with its own small noise level. The other latents are generated, all of a row at one tau; only they contribute to the loss.
- ``episode_loss`` (the bundled size): every chunk of a whole episode is a target in one pass (``teacher_forcing.py``).

A model with ``residual`` predicts the clean sample, other models the velocity. Errors of residual models and of whole
episodes have larger weights in cells that change and, when the data have object poses, near handled objects; the paper's
loss has no weights.

A loss is a mean over rows. Other metrics are returned as sums and counts, which are accumulated over micro-batches and
processes before they are divided.

Shape letters: B rows, M latents after the anchor, F = 1 + M, G latents of a chunk, R recent latents a rollout looks back
on, C h w latent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rawdream_env.trainers.world_model.config import LossConfig
from rawdream_env.trainers.world_model.teacher_forcing import EpisodeBatch, denoise_all_chunks
from rawdream_env.world_models.wan.config import WanConfig
from rawdream_env.world_models.wan.transformer import WanWorldModelTransformer

Sums = dict[str, Tensor]
"""Name -> (2,): a sum and its number of terms."""
LossFunction = Callable[[WanWorldModelTransformer], tuple[Tensor, Sums]]
"""The loss of some rows as a function of the model."""
_LIFT = (..., None, None, None)  # a level per latent -> one per latent cell


class BatchNoise:
    """Noise of some ``rows`` of a batch of ``total`` rows. The whole batch is drawn, so that a row does not depend on the
    process that computes it.
    """

    def __init__(self, generator: torch.Generator, total: int, rows: Sequence[int] | None = None) -> None:
        self.generator, self.total = generator, total
        self.rows = torch.arange(total) if rows is None else torch.tensor(rows)

    def uniform(self, *shape: int) -> Tensor:
        """U[0, 1) (len(rows), *shape)."""
        return torch.rand(self.total, *shape, generator=self.generator)[self.rows]

    def normal(self, *shape: int) -> Tensor:
        """Standard normal (len(rows), *shape)."""
        return torch.randn(self.total, *shape, generator=self.generator)[self.rows]


# -- windows -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WindowNoise:
    """Random values of B windows: ``context`` int64 (B,), the number of context latents after the anchor; ``level`` (B, F)
    noise levels; ``noise`` (B, F, C, h, w).
    """

    context: Tensor
    level: Tensor
    noise: Tensor


def draw_window_noise(
    seeds: Sequence[int], far: Tensor, latent_shape: tuple[int, ...], arch: WanConfig, config: LossConfig
) -> WindowNoise:
    """Context length, noise levels and noise of every row, each from its own seed.

    ``far`` bool (B,): the anchor is earlier than the frame before the window. The context has n latents, a multiple of G
    from 0 to R, all equally likely. Behind a far anchor it always has R: a rollout that has moved away from its start frame
    has a whole context. Positions do not tell the two apart, because they saturate at ``max_time``.
    """
    b, f = len(seeds), 1 + arch.context_latents + arch.chunk_latents
    choice, uniform, noise = [], [], []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        choice.append(torch.randint(arch.context_latents // arch.chunk_latents + 1, (), generator=generator))
        uniform.append(torch.rand(2 + f, generator=generator))
        noise.append(torch.randn(f, *latent_shape, generator=generator))
    u = torch.stack(uniform)
    tau = config.timestep_shift * u[:, 0] / (1 + (config.timestep_shift - 1) * u[:, 0])
    tau = torch.where(u[:, 1] < config.pure_noise, torch.ones(b), tau)
    full = torch.full((b,), arch.context_latents)
    context = torch.where(far, full, torch.stack(choice) * arch.chunk_latents)
    level = torch.where(generated_positions(context, f), tau[:, None], config.context_noise * u[:, 2:])
    return WindowNoise(context, level, torch.stack(noise))


def generated_positions(context: Tensor, frames: int) -> Tensor:
    """``context`` (B,) -> bool (B, F): True where a latent is generated, False for the anchor and the context."""
    return torch.arange(frames, device=context.device) > context[:, None]


@dataclass(frozen=True)
class WindowBatch:
    """B windows, the anchor first: ``latents`` (B, F, C, h, w), ``conditions`` (B, F, D_c), ``times`` int64 (B, F), ``maps``
    (B, F, C_m, h, w) or None, ``focus`` uint8 (B, M, h, w) or None, and the random values.
    """

    latents: Tensor
    conditions: Tensor
    times: Tensor
    maps: Tensor | None
    focus: Tensor | None
    drawn: WindowNoise

    def to(self, device: str) -> WindowBatch:
        """The same batch on another device."""
        drawn = WindowNoise(**{name: value.to(device) for name, value in vars(self.drawn).items()})
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved, drawn=drawn)


def window_loss(model: WanWorldModelTransformer, batch: WindowBatch, config: LossConfig) -> tuple[Tensor, Sums]:
    """Rectified-flow loss of the generated positions (Eq. 1): the mean over each window, then over windows.

    The base of a residual model is the last context frame as the model receives it, with noise.
    """
    latents, noise, level = batch.latents, batch.drawn.noise, batch.drawn.level
    b, f = level.shape
    generated = generated_positions(batch.drawn.context, f)
    noisy = (1 - level[_LIFT]) * latents + level[_LIFT] * noise
    last = noisy[torch.arange(b, device=noisy.device), batch.drawn.context][:, None]
    base = torch.where(generated[_LIFT], last, torch.zeros_like(noisy)) if model.arch.residual else None
    out = model(noisy, level, batch.conditions, batch.maps, base, batch.times)
    if base is None:
        weighed = error = (out - (noise - latents)) ** 2
    else:
        focus = None if batch.focus is None else torch.nn.functional.pad(batch.focus, (0, 0, 0, 0, 1, 0))
        error = (out - latents) ** 2
        weighed = cell_weight(latents, last, focus, config) * clean_sample_weight(level) * error
    per_row = (weighed.mean((2, 3, 4)) * generated).sum(1) / generated.sum(1)
    at_one = (level == 1) & generated
    return per_row.mean(), {"mse_pure_noise": _sums(error, at_one)}


def cell_weight(target: Tensor, base: Tensor, focus: Tensor | None, config: LossConfig) -> Tensor:
    """Weights, larger in cells that change and in cells in focus: ``target`` (B, F, C, h, w), ``base`` broadcastable to it,
    ``focus`` (B, F, h, w) or None -> (B, F, 1, h, w).
    """
    change = (target - base).abs().mean(2, keepdim=True)
    weight = 1 + config.change_weight * (change / 0.5).clamp(max=1)
    return weight if focus is None else weight + config.object_weight * focus[:, :, None]


def clean_sample_weight(level: Tensor) -> Tensor:
    """Weight of a squared clean-sample error at ``level`` (B, F) -> (B, F, 1, 1, 1): close to that of a velocity loss,
    1 / level^2, but finite at level 0.
    """
    return 0.5 / (level[_LIFT] ** 2 + 0.15)


def _sums(error: Tensor, chosen: Tensor) -> Tensor:
    """Sum and number of the entries of ``error`` (B, F, C, h, w) in the frames ``chosen`` (B, F): (2,)."""
    with torch.no_grad():
        mask = chosen[_LIFT].float()
        return torch.stack([(error * mask).sum(), mask.expand_as(error).sum()])


# -- episodes ----------------------------------------------------------------------------------------------------------


def episode_loss(
    model: WanWorldModelTransformer,
    batch: EpisodeBatch,
    noise: BatchNoise,
    config: LossConfig,
    *,
    depth: int = 0,
    usual_noise: float = 0.05,
) -> tuple[Tensor, Sums]:
    """Rectified-flow loss over all chunks of the episodes. ``usual_noise``: the context noise level of a rollout.

    ``depth`` > 0: replace the context by the model's own predictions (self-forcing). One pass predicts every chunk from the
    true context; each further pass predicts every chunk from the predictions of the pass before, so that after ``depth``
    passes the context contains errors of up to ``depth`` consecutive chunks.
    """
    latents = batch.latents
    m, g, device = latents.shape[1] - 1, model.arch.chunk_latents, latents.device
    clean_level, level = (x.to(device) for x in _episode_levels(noise, m, g, config, usual_noise))

    def normal(n: int) -> Tensor:
        return noise.normal(n, *latents.shape[2:]).to(device)

    context = latents[:, : m - g + 1]
    if depth:
        with torch.no_grad():
            for _ in range(depth):
                mixed = clean_level[_LIFT]
                clean = (1 - mixed) * context + mixed * normal(m - g + 1)
                own, _ = denoise_all_chunks(model, batch, clean, clean_level, normal(m), torch.ones_like(level))
                context = torch.cat([latents[:, :1], own[:, : m - g].float()], 1)
    mixed = clean_level[_LIFT]
    clean = (1 - mixed) * context + mixed * normal(m - g + 1)
    target, eps = latents[:, 1:], normal(m)
    noisy = (1 - level[_LIFT]) * target + level[_LIFT] * eps
    out, base = denoise_all_chunks(model, batch, clean, clean_level, noisy, level)
    weight = cell_weight(target, base, batch.focus, config)
    if model.arch.residual:
        error = (out - target) ** 2
        weight = weight * clean_sample_weight(level)
    else:
        error = (out - (eps - target)) ** 2
    pure = level == 1
    return (weight * error).mean(), {
        "depth": torch.tensor([depth, 1.0], device=device),
        "mse_pure_noise": _sums(error, pure),
        "mse_copy_last": _sums((base - target) ** 2, pure),
    }


def _episode_levels(noise: BatchNoise, m: int, g: int, config: LossConfig, usual_noise: float) -> tuple[Tensor, Tensor]:
    """Levels of the clean stream (B, M-G+1) and of the targets (B, M)."""
    clean = config.context_noise * noise.uniform(m - g + 1)
    usual = torch.full_like(clean, usual_noise)
    usual[:, 0] = 0.0
    clean = torch.where(noise.uniform(1) < 0.5, clean, usual)
    level = noise.uniform(m // g)
    level = torch.where(noise.uniform(m // g) < config.pure_noise, torch.ones_like(level), level)
    return clean, level.repeat_interleave(g, 1)
