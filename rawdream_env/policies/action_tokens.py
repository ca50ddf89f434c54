"""The action-token code of OpenVLA: one of 256 tokens per action dimension, and the categorical distribution over them.

256 edges ``linspace(-1, 1, 256)`` bound 255 bins. An action is clipped to [-1, 1] and digitised to d in 1..256 (d = 256
only at exactly +1). Two numberings of the same token exist:

* ``token`` = d - 1 in [0, 256): used everywhere in this package; a higher token is a higher action value;
* ``lm_id`` = 32000 - d = 31999 - token: the row of OpenVLA's language-model head (31744..31999), *descending* in value.

Token t decodes to the centre of bin ``clip(t, 0, 254)``, so that tokens 254 and 255 decode to the same value. Token 127
is exactly 0.

The K*A tokens of a chunk are independent given the observation (parallel decoding), so that the log-probability of a chunk
is their sum. Probabilities are softmax(logits / T) in float32 over the 256 action columns only; the largest entropy of a
token is ln 256 = 5.545. Shape letters: B rows, L = K*A tokens, A action dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rawdream_env.errors import InvalidActionError, InvalidOptionError
from rawdream_env.seeding import NoiseKey

NUM_TOKENS = 256
LM_VOCAB_SIZE = 32000
"""OpenVLA's unpadded vocabulary; ``lm_id`` counts down from it."""
BIN_EDGES: NDArray[np.float64] = np.linspace(-1.0, 1.0, NUM_TOKENS)
BIN_CENTRES: NDArray[np.float64] = (BIN_EDGES[:-1] + BIN_EDGES[1:]) / 2.0
SAMPLING_STREAM = 0x70
"""Stream of a ``NoiseKey`` for action tokens, separate from the world model's noise."""


@overload
def encode(actions: NDArray[np.floating]) -> NDArray[np.int64]: ...
@overload
def encode(actions: Tensor) -> Tensor: ...
def encode(actions: NDArray[np.floating] | Tensor) -> NDArray[np.int64] | Tensor:
    """Actions of any shape -> int64 tokens in [0, 256) of the same shape. Values outside [-1, 1] are clipped.

    Raises ``InvalidActionError`` when a value is not finite. Compares in float64, so numpy and torch agree on edges.
    """
    if isinstance(actions, Tensor):
        return torch.from_numpy(encode(actions.detach().cpu().numpy())).to(actions.device)
    values = np.asarray(actions, dtype=np.float64)
    if not np.isfinite(values).all():
        bad = int((~np.isfinite(values)).sum())
        raise InvalidActionError(f"{bad} of {values.size} action values are NaN or infinite; check their source.")
    return (np.digitize(np.clip(values, -1.0, 1.0), BIN_EDGES) - 1).astype(np.int64)


@overload
def decode(tokens: NDArray[np.integer]) -> NDArray[np.float32]: ...
@overload
def decode(tokens: Tensor) -> Tensor: ...
def decode(tokens: NDArray[np.integer] | Tensor) -> NDArray[np.float32] | Tensor:
    """Integer tokens of any shape -> float32 bin centres of the same shape (token 255 decodes like 254)."""
    if isinstance(tokens, Tensor):
        centres = torch.from_numpy(BIN_CENTRES.astype(np.float32)).to(tokens.device)
        return centres[tokens.clamp(0, NUM_TOKENS - 2)]
    values: NDArray[np.float32] = BIN_CENTRES.astype(np.float32)[np.clip(tokens, 0, NUM_TOKENS - 2)]
    return values


@overload
def to_lm_ids(tokens: NDArray[np.integer]) -> NDArray[np.integer]: ...
@overload
def to_lm_ids(tokens: Tensor) -> Tensor: ...
def to_lm_ids(tokens: NDArray[np.integer] | Tensor) -> NDArray[np.integer] | Tensor:
    """Tokens in [0, 256) -> OpenVLA language-model ids 31999 - token."""
    return LM_VOCAB_SIZE - 1 - tokens


@overload
def from_lm_ids(ids: NDArray[np.integer]) -> NDArray[np.integer]: ...
@overload
def from_lm_ids(ids: Tensor) -> Tensor: ...
def from_lm_ids(ids: NDArray[np.integer] | Tensor) -> NDArray[np.integer] | Tensor:
    """OpenVLA language-model ids 31744..31999 -> tokens in [0, 256)."""
    return LM_VOCAB_SIZE - 1 - ids


def lm_logits_to_token_logits(logits: Tensor) -> Tensor:
    """Columns 31744..31999 of language-model logits (..., V >= 32000), reversed so that column t is token t."""
    if logits.shape[-1] < LM_VOCAB_SIZE:
        raise InvalidOptionError(f"expected at least {LM_VOCAB_SIZE} language-model columns, got {logits.shape[-1]}.")
    return logits[..., LM_VOCAB_SIZE - NUM_TOKENS : LM_VOCAB_SIZE].flip(-1)


def log_distribution(logits: Tensor, temperature: float) -> Tensor:
    """log softmax(logits / T) in float32 over the last axis (256 columns).

    ``temperature`` 0 means greedy acting. A point mass has no useful log-probability, so that T = 1 is used instead.
    Raises ``InvalidOptionError`` for a negative or non-finite temperature.
    """
    if not np.isfinite(temperature) or temperature < 0:
        raise InvalidOptionError(f"temperature must be finite and >= 0 (0 is greedy), got {temperature}.")
    return torch.log_softmax(logits.float() / (temperature if temperature > 0 else 1.0), dim=-1)


def token_logprobs(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """Log-probabilities (B, L) fp32 of ``tokens`` int64 (B, L) under ``logits`` (B, L, 256); differentiable."""
    return log_distribution(logits, temperature).gather(-1, tokens.to(logits.device).unsqueeze(-1)).squeeze(-1)


def token_entropy(logits: Tensor, temperature: float) -> Tensor:
    """Entropy (B, L) in nats of each token's distribution; at most ln 256 = 5.545; differentiable."""
    log_p = log_distribution(logits, temperature)
    return -(log_p.exp() * log_p).sum(-1)


def sample_tokens(logits: Tensor, temperature: float, keys: Sequence[NoiseKey]) -> Tensor:
    """Draw int64 tokens (B, L) from ``logits`` (B, L, 256); row i depends only on its logits and ``keys[i]``.

    Inverse transform sampling: one float64 uniform number per token from the row's own generator.
    ``temperature`` 0 takes the largest logit (the lowest token on ties) and uses no noise.
    """
    if len(keys) != logits.shape[0]:
        raise InvalidOptionError(f"got {len(keys)} noise keys for {logits.shape[0]} rows; pass one per row.")
    log_p = log_distribution(logits, temperature)
    if temperature == 0 or not keys:
        return log_p.argmax(-1)
    num_tokens = logits.shape[1]
    uniform = torch.stack(
        [torch.rand(num_tokens, dtype=torch.float64, generator=key.generator(SAMPLING_STREAM)) for key in keys]
    ).to(logits.device)
    cumulated = log_p.detach().double().exp().cumsum(-1)
    # Scaling by the total keeps the draw within the last column despite rounding.
    draw = (uniform * cumulated[..., -1]).unsqueeze(-1)
    return torch.searchsorted(cumulated, draw, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)


def smoothed_targets(tokens: Tensor, sigma_bins: float) -> Tensor:
    """Soft labels (..., 256): a Gaussian of ``sigma_bins`` around each token, renormalised at the ends.

    ``sigma_bins`` 0 gives one-hot labels. Neighbouring bins are nearly the same action; one-hot labels ignore this.
    """
    if sigma_bins <= 0:
        return torch.nn.functional.one_hot(tokens, NUM_TOKENS).float()
    offsets = torch.arange(NUM_TOKENS, device=tokens.device) - tokens.unsqueeze(-1)
    return torch.softmax(-0.5 * (offsets.float() / sigma_bins) ** 2, dim=-1)
