"""Flow-matching UniPC (order 2, bh2), the paper's sampler: 5 evaluations, no classifier-free guidance.

Rectified flow (paper Eq. 1): z_sigma = sigma * eps + (1 - sigma) * z0, velocity v = eps - z0, so z0 = z_sigma - sigma *
v. The coefficients are float64 numbers, computed once. Numerically equal to diffusers'
``UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)``. Source: UniPC, arXiv 2302.04867.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from torch import Tensor

NUM_TRAIN_TIMESTEPS = 1000


@lru_cache(maxsize=32)
def flow_sigmas(num_inference_steps: int, shift: float = 1.0) -> tuple[float, ...]:
    """Noise levels of the evaluations, and a final 0: ``num_inference_steps + 1`` decreasing numbers."""
    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps must be at least 1, got {num_inference_steps}.")
    sigmas = np.linspace(1, 1 / NUM_TRAIN_TIMESTEPS, num_inference_steps + 1)[:-1]
    sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
    sigmas[0] -= 1e-6  # at exactly 1 the log signal-to-noise ratio is minus infinity
    return (*sigmas.tolist(), 0.0)


def _log_snr(sigma: float) -> float:
    return math.inf if sigma == 0 else math.log(1 - sigma) - math.log(sigma)


@lru_cache(maxsize=512)
def _coefficients(
    sigmas: tuple[float, ...], i_from: int, i_to: int, order: int, corrector: bool
) -> tuple[float, float, float, float]:
    """Weights (x, m0, m_previous, m_new) of one UniPC update from level ``i_from`` to ``i_to``."""
    sigma_s, sigma_t = sigmas[i_from], sigmas[i_to]
    h = _log_snr(sigma_t) - _log_snr(sigma_s)
    phi_1 = math.expm1(-h)
    alpha_t = 1 - sigma_t
    w_x, w_m0, w_prev, w_new = sigma_t / sigma_s, -alpha_t * phi_1, 0.0, 0.0
    ratio = (_log_snr(sigmas[i_from - 1]) - _log_snr(sigma_s)) / h if order == 2 else 0.0
    if not corrector:
        if order == 2:
            rho = 0.5 * alpha_t * phi_1 / ratio
            w_prev, w_m0 = w_prev - rho, w_m0 + rho
        return w_x, w_m0, w_prev, w_new
    if order == 1:
        rho_prev, rho_new = 0.0, 0.5
    else:
        phi_2 = phi_1 / -h - 1
        phi_3 = phi_2 / -h - 0.5
        solution = np.linalg.solve([[1.0, 1.0], [ratio, 1.0]], [phi_2 / phi_1, 2 * phi_3 / phi_1])
        rho_prev, rho_new = float(solution[0]) / ratio, float(solution[1])
    scale = alpha_t * phi_1
    w_prev, w_new = -scale * rho_prev, -scale * rho_new
    return w_x, w_m0 + scale * (rho_prev + rho_new), w_prev, w_new


def sample_flow(
    denoise: Callable[[Tensor, float], Tensor], noise: Tensor, num_inference_steps: int, shift: float = 1.0
) -> Tensor:
    """Integrate from ``noise`` (any shape) at sigma ~ 1 to a sample.

    ``denoise(x, sigma)`` returns the clean-sample estimate z0 = x - sigma * v. It is called ``num_inference_steps``
    times.
    """
    sigmas = flow_sigmas(num_inference_steps, shift)
    x, last_x = noise, noise
    outputs: list[Tensor] = []
    last_order = 1
    for i in range(num_inference_steps):
        new = denoise(x, sigmas[i])
        if i > 0:
            w_x, w_m0, w_prev, w_new = _coefficients(sigmas, i - 1, i, last_order, True)
            x = w_x * last_x + w_m0 * outputs[-1] + w_new * new
            if w_prev:
                x = x + w_prev * outputs[-2]
        outputs = [*outputs[-1:], new]
        order = min(2, num_inference_steps - i, i + 1)
        w_x, w_m0, w_prev, _ = _coefficients(sigmas, i, i + 1, order, False)
        last_x, last_order = x, order
        x = w_x * x + w_m0 * new
        if w_prev:
            x = x + w_prev * outputs[-2]
    return x
