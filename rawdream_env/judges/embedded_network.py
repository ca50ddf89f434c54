"""The embedded judge's network: a small text-conditioned video classifier (about 1.7 M parameters) that runs on a CPU.

Shape letters: B clips, Q instructions asked about one clip, F sampled frames, S slots, O objects, P places of the
feature map, L text tokens, D width, H W image.

How it looks at a clip. Six frames are kept: the start frame (motion words and "not already true" need it), two along
the way, and the last, last-4 and last-8 (the final relation decides). A convolutional trunk that does not know the
instruction turns each into a 16 x 16 map, so several instructions cost one trunk pass; *finders*, one for each object
of ``rawdream_env.relations``, look for their object in every map and say where it is on the table.

A text transformer (word order matters: "blue on red" is not "red on blue") yields S slots per instruction. The first
two *point* at the objects they stand for, which gives two tracks through the frames, a's and b's; all slots then look
at the maps themselves (is it still in the gripper?) by cross-attention and compare notes across frames by
self-attention. One summary token is read out, together with the geometry of the two tracks, as the success logit. In
training the finders and the pointers are told the true places: that ties pixels to objects and words to them, and
makes minutes on a CPU enough.

The paper's judge is an 8B or 32B vision-language model (section 3.2); this one is the same contract at a size that
needs no download, trained by ``rawdream_env.trainers.judge`` on play data with hindsight labels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rawdream_env.errors import CheckpointError
from rawdream_env.judges.base import spread_indices
from rawdream_env.relations import OBJECTS
from rawdream_env.text import VOCAB_SIZE

SPREAD = (0.0, 1 / 3, 2 / 3)
TAIL = (8, 4, 0)
NUM_FRAMES = len(SPREAD) + len(TAIL)

_TABLE_CENTRE = (0.30, 0.0, 0.02)
_TABLE_UNIT = 0.05
"""Metres: where a localisation head starts from and what one unit of its output is worth."""


@dataclass(frozen=True)
class EmbeddedJudgeConfig:
    """Size of the network and the decision threshold; stored in config.json."""

    frame_size: int = 64
    """Pixels; other sizes are brought to it by area interpolation."""
    stem: int = 32
    """Channels at half resolution."""
    mid: int = 48
    """Channels at a quarter of the resolution, the map the slots look at."""
    deep: int = 96
    """Channels at an eighth, where the trunk sees whole objects."""
    width: int = 128
    heads: int = 4
    layers: int = 3
    text_layers: int = 2
    text_len: int = 16
    slots: int = 3
    pointers: bool = True
    """Finders, pointers and geometry. False: slots that find and compare by cross-attention alone; the shipped judge is
    one (docs/embedded_models.md compares the two)."""
    threshold: float = 0.5
    """Success when the probability reaches it; calibrated for precision on validation clips."""

    def __post_init__(self) -> None:
        if self.width % self.heads or self.frame_size % 8 or self.slots < 2 or not 0 < self.threshold < 1:
            raise CheckpointError(
                f"inconsistent judge configuration: width {self.width} must be a multiple of heads {self.heads} and "
                f"frame_size {self.frame_size} of 8; slots {self.slots} >= 2; threshold {self.threshold} in (0, 1)"
            )


def frame_indices(num_frames: int) -> list[int]:
    """Which frames of a video are looked at: start, 1/3, 2/3, last-8, last-4, last; repeated when it is short."""
    return spread_indices(num_frames, SPREAD, TAIL)


class _KeyValue(nn.Module):
    """Keys and values (N, heads, M, D / heads) of a context (N, M, D)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.project = nn.Linear(width, 2 * width)

    def forward(self, context: Tensor) -> tuple[Tensor, Tensor]:
        n, m, _ = context.shape
        keys, values = self.project(context).view(n, m, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        return keys, values


class _Attention(nn.Module):
    """Multi-head attention of queries (N, L, D); ``mask`` bool (N, 1, 1, M), True = look."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
        n, length, width = x.shape
        query = self.query(x).view(n, length, self.heads, -1).transpose(1, 2)
        # Written out: at these lengths the fused kernel's backward pass on a CPU costs several times as much.
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
    """Two 3 x 3 convolutions around a skip; normalised once, which is enough at this depth and cheap on a CPU."""

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


@dataclass(frozen=True)
class JudgeAnswer:
    """``logits`` (B, Q); ``pointed`` (B, Q, F, 2, 3) and ``found`` (B, F, O, 3): places in metres.

    ``pointed`` are the tracks of the first two slots' objects, ``found`` those of all objects; where an object is
    absent its place means nothing. Both are None for a network without pointers.
    """

    logits: Tensor
    pointed: Tensor | None = None
    found: Tensor | None = None


class _Finders(nn.Module):
    """Features (N, P, D) -> what is seen of each object (N, O, D) and where it is in metres (N, O, 3)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heat = nn.Linear(width, len(OBJECTS))
        self.where = nn.Linear(width, 3)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        attention = self.heat(features).float().softmax(dim=1).to(features.dtype)  # (N, P, O)
        seen = attention.transpose(1, 2) @ features
        centre = seen.new_tensor(_TABLE_CENTRE, dtype=torch.float32)
        return seen, self.where(seen).float() * _TABLE_UNIT + centre


class JudgeNetwork(nn.Module):
    """Frames and instructions to success logits; see the module's text.

    ``forward(frames (B, F, H, W, 3) in [0, 255], tokens int64 (B, Q, L))`` returns a ``JudgeAnswer``.
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
        # One set of keys and values for all layers: projecting every place again costs more than the rest of a layer.
        self.place_context = _KeyValue(c.width, c.heads)
        self.look_norm = nn.ModuleList(nn.LayerNorm(c.width) for _ in range(c.layers))
        self.look = nn.ModuleList(_Attention(c.width, c.heads) for _ in range(c.layers))
        self.compare = nn.ModuleList(_SelfBlock(c.width, c.heads) for _ in range(c.layers))
        if c.pointers:
            self.finders = _Finders(c.width)
            self.point = nn.Sequential(nn.LayerNorm(c.width), nn.Linear(c.width, len(OBJECTS)))
            self.geometry = _perceptron(NUM_FRAMES * 9, c.width)
            self.read_out = nn.Sequential(nn.LayerNorm(c.width), _perceptron(c.width, 1))
        else:
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

    def forward(self, frames: Tensor, tokens: Tensor) -> JudgeAnswer:
        """See the class."""
        b, q = tokens.shape[:2]
        f, s = NUM_FRAMES, self.config.slots
        pixels = frames.flatten(0, 1).permute(0, 3, 1, 2).to(torch.float32).div(127.5).sub(1)
        features = self.trunk(pixels.contiguous(memory_format=torch.channels_last))  # (B*F, P, D)
        text = self.read_text(tokens.flatten(0, 1)).view(b, q, s + 1, -1)
        seekers = text[:, :, None, :s] + self.frame_position[:, None]  # (B, Q, F, S, D)
        if not self.config.pointers:
            return JudgeAnswer(self.read_out(self._compare(seekers, text[:, :, s:], features))[..., 0])
        seen, found = self.finders(features)
        seen, found = seen.view(b, f, len(OBJECTS), -1), found.view(b, f, len(OBJECTS), 3)
        pointer = self.point(text[:, :, :2]).float().softmax(-1)  # (B, Q, 2, O)
        pointed = torch.einsum("bqso,bfoc->bqfsc", pointer, found)
        named = torch.einsum("bqso,bfod->bqfsd", pointer.to(seen.dtype), seen)
        seekers = torch.cat([seekers[..., :2, :] + named, seekers[..., 2:, :]], dim=-2)
        summary = self._compare(seekers, text[:, :, s:], features)
        track_a, track_b = ((pointed - pointed.new_tensor(_TABLE_CENTRE)) / _TABLE_UNIT).unbind(-2)  # (B, Q, F, 3)
        tracks = torch.cat([track_a, track_b, 3.0 * (track_a - track_b)], dim=-1).flatten(2)
        return JudgeAnswer(self.read_out(summary + self.geometry(tracks))[..., 0], pointed, found)

    def _compare(self, seekers: Tensor, summary: Tensor, features: Tensor) -> Tensor:
        """Slots (B, Q, F, S, D) look at the maps (B*F, P, D) and at each other; returns the summary (B, Q, D)."""
        b, q, f, s, width = seekers.shape
        keys, values = self.place_context(features)
        seekers, summary = seekers.flatten(0, 1), summary.flatten(0, 1)
        for norm, look, compare in zip(self.look_norm, self.look, self.compare, strict=True):
            queries = norm(seekers).view(b, q, f, s, width).transpose(1, 2).reshape(b * f, q * s, width)
            looked = look(queries, keys, values).view(b, f, q, s, width).transpose(1, 2)
            seekers = seekers + looked.reshape(b * q, f, s, width)
            joined = compare(torch.cat([summary, seekers.flatten(1, 2)], dim=1))
            summary, seekers = joined[:, :1], joined[:, 1:].view(b * q, f, s, width)
        return summary.view(b, q, width)


def _perceptron(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 256), nn.GELU(), nn.Linear(256, outputs))


def _coordinate_features(side: int) -> Tensor:
    """Linear and periodic coordinates of the feature map's places, (side * side, 10)."""
    axis = (torch.arange(side) + 0.5) / side * 2 - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    xy = torch.stack([x.flatten(), y.flatten()], dim=1)
    waves = [wave(xy * frequency) for frequency in (torch.pi, 2 * torch.pi) for wave in (torch.sin, torch.cos)]
    return torch.cat([xy, *waves], dim=1)
