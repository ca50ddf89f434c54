"""Losses of the world model against sums written out in float64, and what is drawn for windows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rawdream_env.trainers.world_model.action_bounds import rollout_bounds
from rawdream_env.trainers.world_model.config import LossConfig
from rawdream_env.trainers.world_model.latent_windows import max_window_offset, poses_before
from rawdream_env.trainers.world_model.losses import (
    BatchNoise,
    WindowBatch,
    WindowNoise,
    draw_window_noise,
    generated_positions,
    window_loss,
)
from rawdream_env.world_models.wan.config import WanConfig
from rawdream_env.world_models.wan.rollout import WAN_ROLLOUT, RolloutConfig, WanWorldModel

CONTEXT = (0, 2, 6)
LOSS = LossConfig(change_weight=2.0, object_weight=5.0)
ARCH = WanConfig(latent_shape=(2, 2, 2), arm_map_channels=0)


class Recorder:
    """Stands for the transformer: answers ``out`` and remembers what it was given."""

    def __init__(self, out: Tensor, residual: bool) -> None:
        self.out, self.arch = out, replace(ARCH, residual=residual)

    def __call__(self, *given: Tensor) -> Tensor:
        self.given = given
        return self.out


def batch() -> WindowBatch:
    gen = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(3, *shape, generator=gen, dtype=torch.float64)

    level = torch.rand(3, 9, generator=gen, dtype=torch.float64)
    level[1] = torch.where(torch.arange(9) > CONTEXT[1], 1.0, level[1])
    focus = (normal(8, 2, 2) > 0).to(torch.uint8)
    drawn = WindowNoise(torch.tensor(CONTEXT), level, normal(9, 2, 2, 2))
    return WindowBatch(normal(9, 2, 2, 2), normal(9, 28), torch.arange(9).expand(3, -1), None, focus, drawn)


def by_hand(out: np.ndarray, b: WindowBatch, residual: bool) -> float:
    """The loss, one number at a time."""
    z0, eps, level = (x.numpy() for x in (b.latents, b.drawn.noise, b.drawn.level))
    focus, rows = b.focus.numpy(), []  # type: ignore[union-attr]
    for r, n in enumerate(CONTEXT):
        base = (1 - level[r, n]) * z0[r, n] + level[r, n] * eps[r, n]
        terms = []
        for f in range(n + 1, 9):
            for y in range(2):
                for x in range(2):
                    change = sum(abs(z0[r, f, c, y, x] - base[c, y, x]) for c in range(2)) / 2
                    weight = 1 + 2.0 * min(change / 0.5, 1.0) + 5.0 * focus[r, f - 1, y, x]
                    weight *= 0.5 / (level[r, f] ** 2 + 0.15)
                    for c in range(2):
                        velocity = eps[r, f, c, y, x] - z0[r, f, c, y, x]
                        target = z0[r, f, c, y, x] if residual else velocity
                        terms.append((weight if residual else 1.0) * (out[r, f, c, y, x] - target) ** 2)
        rows.append(sum(terms) / len(terms))
    return sum(rows) / 3


@pytest.mark.parametrize("residual", [False, True])
def test_window_loss_by_hand_and_context_has_no_gradient(residual: bool) -> None:
    b = batch()
    out = torch.randn(b.latents.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    model: Any = Recorder(out.requires_grad_(), residual)
    loss, sums = window_loss(model, b, LOSS)
    assert loss.item() == pytest.approx(by_hand(out.detach().numpy(), b, residual), rel=1e-12)
    loss.backward()
    assert out.grad is not None
    rng = np.random.default_rng(0)
    for place in [(r, f, *rng.integers(2, size=3)) for r in range(3) for f in range(9)]:
        ends = []
        for step in (1e-5, -1e-5):
            moved = out.detach().numpy().copy()
            moved[place] += step
            ends.append(by_hand(moved, b, residual))
        difference = (ends[0] - ends[1]) / 2e-5
        assert out.grad[place].item() == pytest.approx(difference, rel=1e-5, abs=1e-9)
        assert (difference != 0) == (place[1] > CONTEXT[place[0]])  # context positions none
    noisy, level, conditions, maps, base, times = model.given
    lift = b.drawn.level[..., None, None, None]
    torch.testing.assert_close(noisy, b.latents + lift * (b.drawn.noise - b.latents))
    assert maps is None and times is b.times and level is b.drawn.level and conditions is b.conditions
    if residual:
        for r, n in enumerate(CONTEXT):
            assert not base[r, : n + 1].any() and (base[r, n + 1 :] == noisy[r, n]).all()
    else:
        assert base is None
    assert sums["mse_pure_noise"][1] == 6 * 8  # row 1 alone is at tau = 1


def test_a_loss_is_the_mean_of_its_rows() -> None:
    b, out = batch(), torch.ones(3, 9, 2, 2, 2, dtype=torch.float64)
    whole = window_loss(Recorder(out, True), b, LOSS)[0]  # type: ignore[arg-type]
    rows = []
    for r in range(3):
        drawn = WindowNoise(*(x[r : r + 1] for x in vars(b.drawn).values()))
        parts = {k: v[r : r + 1] for k, v in vars(b).items() if isinstance(v, Tensor)}
        rows.append(window_loss(Recorder(out[r : r + 1], True), replace(b, **parts, drawn=drawn), LOSS)[0])  # type: ignore[arg-type]
    torch.testing.assert_close(whole, torch.stack(rows).mean())


def test_what_is_drawn_for_windows() -> None:
    n, config = 3000, LossConfig(context_noise=0.3, pure_noise=0.2, timestep_shift=3.0)
    anchors = torch.arange(n) % 2 == 0
    drawn = draw_window_noise(range(n), anchors, (1, 1, 1), ARCH, config)
    near, far = drawn.context[1::2], drawn.context[::2]
    assert (far == 6).all()
    counts = torch.bincount(near, minlength=7)
    assert not counts[1::2].any() and (counts[::2] / len(near) - 0.25).abs().max() < 4 * (0.1875 / len(near)) ** 0.5
    generated = generated_positions(drawn.context, 9)
    assert (generated.sum(1) == 8 - drawn.context).all()
    tau = drawn.level[:, -1]
    assert ((drawn.level == tau[:, None]) | ~generated).all()
    context = drawn.level[~generated]
    assert context.min() >= 0 and context.max() < 0.3 and abs(context.mean() - 0.15) < 0.01
    assert abs((tau == 1).float().mean() - 0.2) < 4 * (0.16 / n) ** 0.5
    u = tau[tau < 1] / (3 - 2 * tau[tau < 1])  # the shift undone: uniform
    assert abs(u.mean() - 0.5) < 0.03 and abs(u.var() - 1 / 12) < 0.01
    other = draw_window_noise([7], anchors[7:8], (1, 1, 1), ARCH, config)  # a row does not depend on its neighbours
    assert all(torch.equal(a[0], b[7]) for a, b in zip(vars(other).values(), vars(drawn).values(), strict=True))


def test_rows_of_a_batch_draw_their_share_of_its_noise() -> None:
    whole = BatchNoise(torch.Generator().manual_seed(0), 6)
    part = BatchNoise(torch.Generator().manual_seed(0), 6, [1, 4])
    for draw in ("uniform", "normal", "uniform"):
        assert torch.equal(getattr(part, draw)(2, 3), getattr(whole, draw)(2, 3)[[1, 4]])


@pytest.mark.parametrize(("rollout", "offset"), [(RolloutConfig(), 8), (WAN_ROLLOUT, 0)], ids=["embedded", "wan"])
def test_windows_lie_where_a_rollout_puts_its_frames(rollout: RolloutConfig, offset: int) -> None:
    """With a whole context: at step s of a rollout, and in a window that begins s - 3 chunks after its anchor."""
    model = WanWorldModel.__new__(WanWorldModel)
    model.config = rollout
    model.transformer = Recorder(torch.zeros(1), True)  # type: ignore[assignment]
    largest = max_window_offset(ARCH, rollout)
    assert largest == offset
    for step in range(3, 20):
        first_of_window = 1 + min(2 * (step - 3), largest)  # as Mixture.draw has it
        assert first_of_window + ARCH.context_latents == model._time(step)


def test_the_motion_of_generated_latents_counts_from_the_context() -> None:
    poses = torch.arange(9.0)[None, :, None, None].expand(2, -1, 4, 1)  # latent i ends at pose i; the anchor is at 0
    before = poses_before(poses, torch.tensor([[0.5], [0.5]]), torch.tensor([2, 6]), 2)[..., 0]
    assert before.tolist() == [[0, 0.5, 0.5, 2, 2, 2, 2, 2, 2], [0, 0.5, 0.5, 2, 2, 4, 4, 6, 6]]


def test_bounds_of_a_rollout() -> None:
    low, high = rollout_bounds((np.array([0.0, 2.0]), np.array([4.0, 2.0])), 3)
    assert (low, high) == ((0.0, -1e6, -1e6), (4.0, 1e6, 1e6))
