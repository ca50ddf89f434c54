"""The bundled judge's network: a small text-conditioned video classifier (about 1.6 M parameters) that runs on a CPU.

Shape letters: B clips, Q instructions asked about one clip, F sampled frames, S slots, P places of the feature map,
L text tokens, D width, H W image.

Six frames are used: the start frame (for motions, and for relations that already hold at the start), two in between,
and last-8, last-4 and last (the final relation decides). A convolutional trunk, independent of the instruction, turns
each into a 16 x 16 map, so several instructions need one trunk pass. A text transformer (word order matters: "blue on
red" is not "red on blue") yields S slots per instruction. Each slot attends to every frame by cross-attention, the
slots of all frames attend to each other by self-attention, and one summary token is read out as the success logit. In
training the first two slots also predict the positions of their objects, which ties words to objects.

The paper's judge is an 8B or 32B vision-language model (section 3.2). This one has the same interface at a size that
needs no download; ``rawdream_env.trainers.judge.train`` trains it on play data with hindsight labels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rawdream_env.errors import CheckpointError
from rawdream_env.judges.base import spread_indices
from rawdream_env.text import VOCAB_SIZE

SPREAD = (0.0, 1 / 3, 2 / 3)
TAIL = (8, 4, 0)
NUM_FRAMES = len(SPREAD) + len(TAIL)

_TABLE_CENTRE = (0.30, 0.0, 0.02)
_TABLE_UNIT = 0.05
"""Metres: origin and unit of the outputs of a localization head."""


@dataclass(frozen=True)
class EmbeddedJudgeConfig:
    """Size of the network and the decision threshold; stored in config.json."""

    frame_size: int = 64
    """Frame size in pixels. A judge resizes other frames by area interpolation; training data must have this size."""
    stem: int = 32
    """Channels at half resolution."""
    mid: int = 48
    """Channels at a quarter of the resolution, the map the slots attend to."""
    deep: int = 96
    """Channels at an eighth of the resolution."""
    width: int = 128
    """Width of text transformer and slots."""
    heads: int = 4
    """Attention heads."""
    layers: int = 3
    """Layers of slot attention."""
    text_layers: int = 2
    """Layers of the text transformer."""
    text_len: int = 16
    """Maximum number of text tokens."""
    slots: int = 3
    """Slots per instruction."""
    threshold: float = 0.5
    """Success probability from which a clip is a success; calibrated for precision on validation clips."""
    hold: int = 0
    """Frames for which a success must have lasted: the lower one of the probabilities at the end of a video and this many
    frames before counts. 0: only the end. Videos of fewer than ``hold`` + 2 frames are judged at their end."""

    def __post_init__(self) -> None:
        sizes = (self.frame_size, self.stem, self.mid, self.deep, self.width, self.heads, self.layers, self.text_layers)
        parts = [(self.width, self.heads), (self.frame_size, 8), (self.mid, 8), (self.deep, 8)]
        positive = min(*sizes, self.text_len) > 0 and self.hold >= 0
        if not (positive and all(a % b == 0 for a, b in parts) and self.slots >= 2 and 0 < self.threshold < 1):
            raise CheckpointError(
                f"The judge's sizes do not fit: width {self.width} must be a multiple of heads {self.heads}; frame_size "
                f"{self.frame_size}, mid {self.mid} and deep {self.deep} multiples of 8; slots {self.slots} at least 2; "
                f"threshold {self.threshold} in (0, 1); hold {self.hold} at least 0; the others positive."
            )


def frame_indices(num_frames: int) -> list[int]:
    """Indices of the frames used: start, 1/3, 2/3, last-8, last-4, last; repeated in a short video."""
    return spread_indices(num_frames, SPREAD, TAIL)


class _KeyValue(nn.Module):
    """Keys and values (N, heads, M, D / heads) of a context (N, M, D)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.project = nn.Linear(width, 2 * width)

    def forward(self, context: Tensor) -> tuple[Tensor, Tensor]:
        n, m, _ = context.shape
        # Contiguous: else every attention that uses them copies them.
        keys, values = self.project(context).view(n, m, 2, self.heads, -1).permute(2, 0, 3, 1, 4).contiguous()
        return keys, values


class _Attention(nn.Module):
    """Multi-head attention of queries (N, L, D); ``mask`` bool (N, 1, 1, M), True = attend."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
        n, length, width = x.shape
        query = self.query(x).view(n, length, self.heads, -1).transpose(1, 2)
        # Not the fused kernel: at these lengths its backward pass on a CPU is several times slower.
        scores = query @ keys.transpose(-1, -2) * query.shape[-1] ** -0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, -1e4)
        mixed = scores.softmax(-1).to(values.dtype) @ values
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(n, length, width))
        return out


class _Feed(nn.Sequential):
    """Pre-norm two-layer perceptron."""

    def __init__(self, width: int) -> None:
        super().__init__(nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.GELU(), nn.Linear(3 * width, width))


class _SelfBlock(nn.Module):
    """Pre-norm self-attention and perceptron."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.context = _KeyValue(width, heads)
        self.attention = _Attention(width, heads)
        self.feed = _Feed(width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        h = self.norm(x)
        x = x + self.attention(h, *self.context(h), mask)
        out: Tensor = x + self.feed(x)
        return out


class _Residual(nn.Module):
    """Two 3 x 3 convolutions with a skip connection and one normalization, which is cheap on a CPU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, channels)
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.second(F.gelu(self.first(self.norm(x))))
        return out


class _Trunk(nn.Module):
    """Frames (N, 3, H, W) in [-1, 1] -> places (N, P, D) with their position in the image; P = (H/4)(W/4)."""

    def __init__(self, config: EmbeddedJudgeConfig) -> None:
        super().__init__()
        c = config
        self.stem = nn.Conv2d(12, c.stem, 3, padding=1)
        self.down_mid = nn.Conv2d(c.stem, c.mid, 3, stride=2, padding=1)
        self.mid = _Residual(c.mid)
        self.down_deep = nn.Conv2d(c.mid, c.deep, 3, stride=2, padding=1)
        self.deep = nn.Sequential(_Residual(c.deep), _Residual(c.deep))
        self.from_mid = nn.Conv2d(c.mid, c.width, 1)
        self.from_deep = nn.Conv2d(c.deep, c.width, 1)
        self.norm = nn.LayerNorm(c.width)
        side = c.frame_size // 4
        self.position = nn.Parameter(torch.zeros(side * side, c.width))
        self.coordinates = nn.Linear(10, c.width, bias=False)
        self.register_buffer("grid", _coordinate_features(side), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.stem(F.pixel_unshuffle(x, 2)))
        mid = self.mid(F.gelu(self.down_mid(x)))
        deep = self.deep(F.gelu(self.down_deep(mid)))
        merged = self.from_mid(mid) + F.interpolate(self.from_deep(deep), scale_factor=2, mode="nearest")
        out: Tensor = self.norm(merged.flatten(2).transpose(1, 2)) + self.coordinates(self.grid) + self.position
        return out


class JudgeNetwork(nn.Module):
    """Frames and instructions to success logits; see the module's text.

    ``forward(frames (B, F, H, W, 3) in [0, 255], tokens int64 (B, Q, L))`` returns logits (B, Q) and the
    predicted positions, in metres, of the first two slots' objects in each frame, (B, Q, F, 2, 3), used in training.
    """

    def __init__(self, config: EmbeddedJudgeConfig) -> None:
        super().__init__()
        c = config
        self.config = c
        self.trunk = _Trunk(c)
        self.words = nn.Embedding(VOCAB_SIZE, c.width, padding_idx=0)
        self.word_position = nn.Parameter(torch.zeros(c.text_len, c.width))
        self.text = nn.ModuleList(_SelfBlock(c.width, c.heads) for _ in range(c.text_layers))
        self.text_norm = nn.LayerNorm(c.width)
        self.text_context = _KeyValue(c.width, c.heads)
        self.slot = nn.Parameter(torch.zeros(c.slots + 1, c.width))
        self.slot_reads = _Attention(c.width, c.heads)
        self.frame_position = nn.Parameter(torch.zeros(NUM_FRAMES, c.width))
        # All layers share keys and values: projecting every place again would cost more than the rest of a layer.
        self.place_context = _KeyValue(c.width, c.heads)
        self.look_norm = nn.ModuleList(nn.LayerNorm(c.width) for _ in range(c.layers))
        self.look = nn.ModuleList(_Attention(c.width, c.heads) for _ in range(c.layers))
        self.compare = nn.ModuleList(_SelfBlock(c.width, c.heads) for _ in range(c.layers))
        self.place = nn.Linear(c.width, 3)
        self.read_out = nn.Sequential(nn.LayerNorm(c.width), nn.Linear(c.width, 1))
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
                nn.init.zeros_(module.bias)
            if isinstance(module, _Residual):
                nn.init.zeros_(module.second.weight)
        for parameter in (self.slot, self.frame_position, self.word_position, self.trunk.position):
            nn.init.normal_(parameter, std=0.2)
        nn.init.normal_(self.words.weight, std=0.5)

    def read_text(self, tokens: Tensor) -> Tensor:
        """Tokens (N, L) -> slots and summary (N, S + 1, D)."""
        mask = (tokens != 0)[:, None, None, :]
        x = self.words(tokens) + self.word_position
        for block in self.text:
            x = block(x, mask)
        keys, values = self.text_context(self.text_norm(x))
        out: Tensor = self.slot + self.slot_reads(self.slot.expand(len(tokens), -1, -1), keys, values, mask)
        return out

    def look_at(self, frames: Tensor) -> Tensor:
        """Frames (B, F, H, W, 3) in [0, 255], uint8 or float -> features (B*F, P, D), independent of the instruction."""
        pixels = frames.flatten(0, 1).permute(0, 3, 1, 2).to(torch.float32).div(127.5).sub(1)
        out: Tensor = self.trunk(pixels.contiguous(memory_format=torch.channels_last))
        return out

    def answer(self, features: Tensor, tokens: Tensor, which: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Features (B*F, P, D) and tokens (B, Q, L) -> what ``forward`` returns.

        ``which`` int64 (B, F): the clips' frames among any number of features, for clips that have frames in common.
        """
        b, q = tokens.shape[:2]
        f, s = NUM_FRAMES, self.config.slots
        keys, values = self.place_context(features)
        if which is not None:
            keys, values = keys[which.flatten()], values[which.flatten()]
        text = self.read_text(tokens.flatten(0, 1))  # (B*Q, S+1, D)
        summary = text[:, s:]
        seekers = text[:, None, :s] + self.frame_position[:, None]  # (B*Q, F, S, D)
        for norm, look, compare in zip(self.look_norm, self.look, self.compare, strict=True):
            queries = norm(seekers).view(b, q, f, s, -1).transpose(1, 2).reshape(b * f, q * s, -1)
            seen = look(queries, keys, values).view(b, f, q, s, -1).transpose(1, 2)
            seekers = seekers + seen.reshape(b * q, f, s, -1)
            joined = compare(torch.cat([summary, seekers.flatten(1, 2)], dim=1))
            summary, seekers = joined[:, :1], joined[:, 1:].view(b * q, f, s, -1)
        logits = self.read_out(summary)[:, 0, 0].view(b, q)
        return logits, to_metres(self.place(seekers[:, :, :2])).view(b, q, f, 2, 3)

    def forward(self, frames: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """See the class."""
        return self.answer(self.look_at(frames), tokens)


def to_metres(x: Tensor) -> Tensor:
    """Outputs (..., 3) of a localization head as positions in metres, float32."""
    return x.float() * _TABLE_UNIT + x.new_tensor(_TABLE_CENTRE, dtype=torch.float32)


def _coordinate_features(side: int) -> Tensor:
    """Linear and periodic coordinates of the feature map's places, (side * side, 10)."""
    axis = (torch.arange(side) + 0.5) / side * 2 - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    xy = torch.stack([x.flatten(), y.flatten()], dim=1)
    waves = [wave(xy * frequency) for frequency in (torch.pi, 2 * torch.pi) for wave in (torch.sin, torch.cos)]
    return torch.cat([xy, *waves], dim=1)
