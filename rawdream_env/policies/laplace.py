"""Continuous policies with a distribution: a Laplace distribution around the output of an L1 action head.

A policy trained by L1 regression predicts one value per action dimension. Its error is Laplacian, so that a second head that
predicts the scale b makes it a stochastic policy (World-Env, arXiv 2509.24948): each of the K*A values of a chunk is drawn from
Laplace(location, b), independent given the observation. Both heads and the policy below them are trained together by the
log-probabilities, ``-ln 2b - |x - location| / b``. A temperature T multiplies b, as it divides the logits of action tokens:
the density to the power 1/T, normalised. T = 0 acts by the location.

``PolicyOutput.tokens`` are the drawn values, float32, in the model's normalised units before they are clipped to what the
environment takes; ``logprobs`` are densities and may be positive.

Shape letters: B rows, K actions in a chunk, A action dimensions, L = K*A values, W features per action.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from rawdream_env.errors import CheckpointError, InvalidOptionError
from rawdream_env.files import check_weights, load_tensors, save_safetensors, sealed_folder
from rawdream_env.policies.action_tokens import SAMPLING_STREAM
from rawdream_env.policies.base import TokenPolicy
from rawdream_env.seeding import NoiseKey
from rawdream_env.types import PolicyOutput

HEAD_WEIGHTS = "action_head.safetensors"
SCALE_RANGE = (0.002, 1.0)
"""Limits of b in normalised units, of which an action's whole range is 2; approached smoothly, so that a gradient remains."""
INITIAL_SCALE = 0.05
"""b of a new scale head, everywhere."""


def laplace_logprobs(location: Tensor, scale: Tensor, values: Tensor, temperature: float) -> Tensor:
    """Log-densities of ``values`` at ``temperature`` (T = 1 when greedy), all (B, L) fp32; differentiable."""
    b = scale * _positive(temperature)
    return -torch.log(2 * b) - (values.to(location.device) - location).abs() / b


def sample_laplace(location: Tensor, scale: Tensor, temperature: float, keys: Sequence[NoiseKey]) -> Tensor:
    """Values (B, L) fp32; row i depends only on its distribution and ``keys[i]``. ``temperature`` 0: the location."""
    if len(keys) != len(location):
        raise InvalidOptionError(f"got {len(keys)} noise keys for {len(location)} rows; pass one per row.")
    b = scale * _positive(temperature)
    if temperature == 0 or not keys:
        return location
    draws = [torch.rand(location.shape[1], dtype=torch.float64, generator=k.generator(SAMPLING_STREAM)) for k in keys]
    centred = torch.stack(draws).to(location.device) - 0.5
    # The inverse of the cumulative distribution; the smallest positive number keeps the logarithm finite.
    quantile = centred.sign() * torch.log((1 - 2 * centred.abs()).clamp(min=torch.finfo(torch.float64).tiny))
    return (location.double() - b.double() * quantile).float()


def _positive(temperature: float) -> float:
    if not math.isfinite(temperature) or temperature < 0:
        raise InvalidOptionError(f"temperature must be finite and >= 0 (0 is greedy), got {temperature}.")
    return temperature if temperature > 0 else 1.0


class L1Head(nn.Module):
    """OpenVLA-OFT's head: features (..., W) -> one value per action dimension (..., A), under upstream's names."""

    def __init__(self, width: int, hidden: int, action_dim: int) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, hidden)
        self.mlp_resnet_blocks = nn.ModuleList(nn.ModuleDict({"ffn": _residual(hidden)}) for _ in range(2))
        self.layer_norm2 = nn.LayerNorm(hidden)
        self.fc2 = nn.Linear(hidden, action_dim)

    def forward(self, features: Tensor) -> Tensor:
        """Features -> values."""
        x = torch.relu(self.fc1(self.layer_norm1(features)))
        for block in self.mlp_resnet_blocks:
            x = x + block["ffn"](x)  # type: ignore[index]
        return self.fc2(self.layer_norm2(x))  # type: ignore[no-any-return]


def _residual(width: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU())


class ScaleHead(nn.Sequential):
    """Features (..., W) -> the scale b (..., A), between the limits of ``SCALE_RANGE``; ``initial`` before any training."""

    def __init__(self, width: int, hidden: int, action_dim: int, initial: float) -> None:
        last = nn.Linear(hidden, action_dim)
        super().__init__(nn.LayerNorm(width), nn.Linear(width, hidden), nn.SiLU(), last)
        low, high = map(math.log, SCALE_RANGE)
        share = (math.log(initial) - low) / (high - low)
        nn.init.zeros_(last.weight)
        nn.init.constant_(last.bias, math.log(share / (1 - share)))

    def forward(self, features: Tensor) -> Tensor:
        """Features -> b."""
        low, high = map(math.log, SCALE_RANGE)
        for layer in self:
            features = layer(features)
        return torch.exp(low + (high - low) * torch.sigmoid(features))


class LaplacePolicy(nn.Module):
    """``backbone`` with an L1 head and a scale head in place of its action tokens; the heads compute in float32.

    A checkpoint is the backbone's folder with ``action_head.safetensors`` beside its weights. Public L1 checkpoints have an
    ``action_head*.pt`` of upstream and no scale head: it is new then, ``INITIAL_SCALE`` everywhere.

    Args:
        backbone: an ``OpenVLAOFT`` or a ``TinyVLA``; what only serves its tokens is frozen.
        hidden: width of the heads; None: the features of an action dimension (OpenVLA-OFT, as upstream) or of an action.
        initial_scale: b before any training, within ``SCALE_RANGE``.
        seed: of new weights.
    """

    def __init__(
        self, backbone: TokenPolicy, *, hidden: int | None = None, initial_scale: float = INITIAL_SCALE, seed: int = 0
    ) -> None:
        super().__init__()
        if not SCALE_RANGE[0] < initial_scale < SCALE_RANGE[1]:
            raise InvalidOptionError(
                f"initial_scale={initial_scale} must lie between {SCALE_RANGE[0]} and {SCALE_RANGE[1]}."
            )
        self.backbone = backbone
        self.chunk_len, self.action_dim, self.image_size = backbone.chunk_len, backbone.action_dim, backbone.image_size
        size = hidden or backbone.hidden_width
        with torch.random.fork_rng(devices=[]), torch.device(backbone.device):
            torch.manual_seed(seed)
            self.model = L1Head(backbone.feature_width, size, backbone.action_dim)
            self.scale = ScaleHead(backbone.feature_width, size, backbone.action_dim, initial_scale)
        for name, parameter in backbone.named_parameters():
            if name.startswith(backbone.token_head):
                parameter.requires_grad_(False)

    # -- the distribution ------------------------------------------------------------------------------------------

    def distribution(self, images: Any, instructions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Location and scale, both fp32 (B, L) in normalised units; differentiable; any B."""
        both = self._heads(self.backbone.check_images(images, instructions), instructions)
        return both[:, 0], both[:, 1]

    def _heads(self, frames: Tensor, instructions: Sequence[str]) -> Tensor:
        """Location and scale (B, 2, L)."""
        features = self.backbone.action_features(frames, instructions)
        with torch.autocast(features.device.type, enabled=False):
            both = torch.stack([self.model(features.float()), self.scale(features.float())], dim=1)
        return both.flatten(2)

    @torch.no_grad()
    def act(
        self, images: Any, instructions: Sequence[str], *, temperature: float, keys: Sequence[NoiseKey]
    ) -> PolicyOutput:
        """As ``TokenPolicy.act``; ``tokens`` float32 (B, L) are the drawn values."""
        frames = self.backbone.check_images(images, instructions)
        shape = (2, self.backbone.num_action_tokens)
        location, scale = self.backbone.blocked(self._heads, frames, list(instructions), shape).unbind(1)
        values = sample_laplace(location, scale, temperature, keys)
        logprobs = laplace_logprobs(location, scale, values, temperature)
        actions = self.backbone.to_environment(values.reshape(-1, self.chunk_len, self.action_dim))
        return PolicyOutput(actions=actions, tokens=values, logprobs=logprobs)

    def logprobs(self, images: Any, instructions: Sequence[str], tokens: Tensor, *, temperature: float) -> Tensor:
        """Log-densities fp32 (B, L) of ``tokens`` float32 (B, L) at ``temperature``; differentiable."""
        return self.logprobs_and_entropy(images, instructions, tokens, temperature=temperature)[0]

    def logprobs_and_entropy(
        self, images: Any, instructions: Sequence[str], tokens: Tensor, *, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """As ``logprobs``, with the differential entropy (B, L) in nats, 1 + ln 2b, which may be negative."""
        location, scale = self.distribution(images, instructions)
        if tokens.shape != location.shape or not tokens.is_floating_point():
            raise InvalidOptionError(
                f"tokens are {tokens.dtype} {tuple(tokens.shape)}, expected floating {tuple(location.shape)} = (rows, K*A)."
            )
        entropy = 1 + torch.log(2 * scale * _positive(temperature))
        return laplace_logprobs(location, scale, tokens, temperature), entropy

    # -- what is trained -------------------------------------------------------------------------------------------

    def add_lora(self, rank: int = 32, **options: Any) -> None:
        """Train LoRA adapters instead of the backbone's weights, and both heads."""
        self._backbone_method("add_lora")(rank, **options)

    def enable_gradient_checkpointing(self) -> None:
        """Compute the backbone's activations again in the backward pass, to save memory."""
        self._backbone_method("enable_gradient_checkpointing")()

    def _backbone_method(self, name: str) -> Any:
        if not callable(method := getattr(self.backbone, name, None)):
            raise InvalidOptionError(f"{name} does not fit a {type(self.backbone).__name__}; it is for OpenVLA-OFT.")
        return method

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the backbone's folder and ``action_head.safetensors``."""
        path = Path(folder)
        saving: Any = self.backbone
        saving.save_pretrained(path)
        with sealed_folder(path):
            heads = {name: t.detach() for name, t in self.state_dict().items() if not name.startswith("backbone.")}
            save_safetensors(path / HEAD_WEIGHTS, heads)

    @classmethod
    def from_pretrained(cls, folder: str | Path, backbone: TokenPolicy) -> Self:
        """``backbone``, which is in ``folder``, with the heads that are there too.

        Raises:
            CheckpointError: no head, several of upstream's, or one of another shape.
        """
        path = head_file(Path(folder))
        if path is None:
            raise CheckpointError(f"{folder} has no {HEAD_WEIGHTS} and no action_head*.pt; choose a continuous policy.")
        tensors = {name.removeprefix("module."): tensor for name, tensor in load_tensors(path).items()}
        first = tensors.get("model.fc1.weight")
        policy = cls(backbone, hidden=len(first) if first is not None and first.ndim == 2 else None)
        wanted = {name: t for name, t in policy.state_dict().items() if not name.startswith("backbone.")}
        if path.name != HEAD_WEIGHTS:  # upstream's has no scale
            tensors |= {name: t for name, t in wanted.items() if name.startswith("scale.")}
        check_weights(tensors, wanted, path)
        policy.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, strict=False)
        return policy.eval()


def head_file(folder: Path) -> Path | None:
    """The file of a continuous policy's heads in ``folder``; None: there is none.

    Raises:
        CheckpointError: there are several of upstream's.
    """
    if (folder / HEAD_WEIGHTS).is_file():
        return folder / HEAD_WEIGHTS
    found = sorted(folder.glob("action_head*.pt"))
    if len(found) > 1:
        raise CheckpointError(f"{folder} has {len(found)} action heads, first {found[0].name}; keep the one to use.")
    return found[0] if found else None
