"""TinyVLA: a vision-language-action policy small enough for a laptop CPU, with OpenVLA's action tokens.

One 64x64 RGB frame and one sentence in, a chunk of 8 x 7 categorical tokens out, all decoded in one parallel pass
(paper section 3.2). It has no proprioception: the policy sees the gripper only in the image.

A grasp needs a precision of about 1 cm, which is 1.3 pixels here, so that the trunk keeps its resolution: a stride-2 stem
with coordinate channels, then residual blocks at stride 4 (16x16 cells) that are modulated by the sentence (FiLM). A small
decoder runs over 3 registers and 8 step queries. Attention over the words and over each other assigns words to registers,
attention over the 256 cells reads positions from the image, and each step query emits its 7 tokens.
The three registers (gripper, object to move, target) have an auxiliary read-out of positions, which is used only in
training: with it, the attention learns to localise from far fewer demonstrations than with action labels alone.

Shape letters: B rows, H W image, C channels, N = cells of the trunk, S decoder tokens, D width, K actions in a chunk,
A action dimensions, L = K*A action tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from rawdream_env import text
from rawdream_env.errors import CheckpointError, InvalidOptionError
from rawdream_env.files import atomic_write_json, load_module, read_json, save_safetensors, sealed_folder
from rawdream_env.policies.action_tokens import NUM_TOKENS
from rawdream_env.policies.base import TokenPolicy
from rawdream_env.types import ACTION_DIM

KIND = "tiny_vla"
AUXILIARY_DIM = 13
"""Read-out of the registers: commanded pose and gripper (7), xyz of the object to move (3), xyz of the target (3)."""
MAX_WORDS = 16


@dataclass(frozen=True)
class TinyVLAConfig:
    """Sizes of a ``TinyVLA``."""

    image_size: int = 64
    """Height and width of the frame in pixels; a multiple of 4."""
    chunk_len: int = 8
    """Actions per chunk (K)."""
    stem_channels: int = 32
    """Channels at stride 2."""
    trunk_channels: int = 64
    """Channels at stride 4."""
    trunk_blocks: int = 3
    """Residual blocks at stride 4."""
    width: int = 128
    """Width of the decoder (D)."""
    heads: int = 4
    """Attention heads; divides ``width``."""
    text_layers: int = 1
    """Self-attention layers over the words."""
    decoder_layers: int = 2
    """Layers over registers and step queries."""
    bin_rank: int = 96
    """Rank of the map from a step's features to its 256 scores per dimension."""

    def __post_init__(self) -> None:
        """Reject sizes that cannot be built."""
        if self.image_size % 4 or self.image_size < 16:
            raise InvalidOptionError(f"image_size must be a multiple of 4 and >= 16, got {self.image_size}.")
        if self.width % self.heads:
            raise InvalidOptionError(f"width {self.width} is not divisible by heads {self.heads}.")
        if self.stem_channels % 8 or self.trunk_channels % 8:
            raise InvalidOptionError("stem_channels and trunk_channels must be multiples of 8 (group norm).")


@lru_cache(maxsize=65536)
def _word_ids(instruction: str) -> NDArray[np.int64]:
    ids: NDArray[np.int64] = text.tokenize(instruction, MAX_WORDS)
    return ids


class FilmBlock(nn.Module):
    """Residual block (B, C, h, w) with one normalisation, which is modulated by the sentence (more are slow on a CPU)."""

    def __init__(self, channels: int, text_width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.GroupNorm(8, channels, affine=False)
        self.film = nn.Linear(text_width, 2 * channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.film.weight)
        nn.init.zeros_(self.film.bias)

    def forward(self, x: Tensor, sentence: Tensor) -> Tensor:
        """``sentence`` (B, D)."""
        scale, shift = self.film(sentence)[:, :, None, None].chunk(2, dim=1)
        hidden = self.conv1(F.silu(x))
        hidden = self.conv2(F.silu(self.norm(hidden) * (1 + scale) + shift))
        return x + hidden  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Multi-head attention of ``x`` (B, S, D) over ``context`` (B, N, D_c), optionally masked (B, N) bool."""

    def __init__(self, width: int, heads: int, context_width: int | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(context_width or width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """Returns (B, S, D)."""
        b, s, d = x.shape
        q = self.query(x).view(b, s, self.heads, -1).transpose(1, 2)
        k, v = self.key_value(context).view(b, context.shape[1], 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        # Not the fused CPU kernel: with a dozen queries it is slower, in the backward pass by a factor of several.
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None, :], float("-inf"))
        mixed = scores.softmax(-1).to(v.dtype) @ v
        return self.out(mixed.transpose(1, 2).reshape(b, s, d))  # type: ignore[no-any-return]


class DecoderLayer(nn.Module):
    """Attention over words and queries, attention over the trunk's cells, MLP; all pre-norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm_self = nn.LayerNorm(width)
        self.self_attention = Attention(width, heads)
        self.norm_cross = nn.LayerNorm(width)
        self.cross_attention = Attention(width, heads)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, sentence: Tensor, mask: Tensor, cells: Tensor) -> Tensor:
        """``x`` (B, S, D), ``sentence`` (B, words, D), ``mask`` (B, words + S) True where readable, ``cells`` (B, N, D)."""
        h = self.norm_self(x)
        x = x + self.self_attention(h, torch.cat([sentence, h], dim=1), mask)
        x = x + self.cross_attention(self.norm_cross(x), cells)
        return x + self.mlp(self.norm_mlp(x))  # type: ignore[no-any-return]


class TextLayer(nn.Module):
    """One pre-norm self-attention layer over the words."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm_self = nn.LayerNorm(width)
        self.self_attention = Attention(width, heads)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """``x`` (B, words, D), ``mask`` (B, words) True where there is a word."""
        h = self.norm_self(x)
        x = x + self.self_attention(h, h, mask)
        return x + self.mlp(self.norm_mlp(x))  # type: ignore[no-any-return]


class TinyVLA(TokenPolicy):
    """The bundled policy. See the module's docstring for the architecture and ``TokenPolicy`` for acting.

    A checkpoint is a folder with ``config.json`` and ``model.safetensors``. New weights are drawn with ``seed``; the global
    generator is left unchanged.
    """

    action_dim = ACTION_DIM
    token_head = ("head.", "bins", "bin_bias", "auxiliary_head.")

    def __init__(self, config: TinyVLAConfig | None = None, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config = config or TinyVLAConfig()
        self.chunk_len = config.chunk_len
        self.image_size = (config.image_size, config.image_size)
        d, stem, trunk = config.width, config.stem_channels, config.trunk_channels
        self.feature_width = self.hidden_width = d
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.words = nn.Embedding(text.VOCAB_SIZE, d, padding_idx=0)
            self.word_places = nn.Parameter(torch.randn(MAX_WORDS, d) * 0.5)
            self.text_layers = nn.ModuleList(TextLayer(d, config.heads) for _ in range(config.text_layers))
            self.text_norm = nn.LayerNorm(d)
            self.stem = nn.Conv2d(3 * 4 + 2, stem, 3, padding=1)
            self.stem_block = FilmBlock(stem, d)
            self.down = nn.Conv2d(stem, trunk, 3, stride=2, padding=1)
            self.trunk = nn.ModuleList(FilmBlock(trunk, d) for _ in range(config.trunk_blocks))
            self.trunk_norm = nn.GroupNorm(8, trunk)
            self.to_cells = nn.Linear(trunk, d)
            self.cell_places = nn.Parameter(_waves(config.image_size // 4, d))
            self.cell_norm = nn.LayerNorm(d)
            self.registers = nn.Parameter(torch.randn(3, d) * 0.5)
            self.steps = nn.Parameter(torch.randn(config.chunk_len, d) * 0.5)
            self.decoder = nn.ModuleList(DecoderLayer(d, config.heads) for _ in range(config.decoder_layers))
            self.head_norm = nn.LayerNorm(d)
            self.head = nn.Linear(d, ACTION_DIM * config.bin_rank)
            self.bins = nn.Parameter(_smooth_bins(config.bin_rank))
            self.bin_bias = nn.Parameter(torch.zeros(ACTION_DIM, NUM_TOKENS))
            self.auxiliary_head = nn.Linear(3 * d, AUXILIARY_DIM)
        self.register_buffer("coordinates", _coordinates(config.image_size // 2), persistent=False)

    def logits(self, images: Any, instructions: Sequence[str]) -> Tensor:
        """Token scores (B, K*A, 256); ``forward_train`` also returns the auxiliary read-out."""
        return self.forward_train(self.check_images(images, instructions), self.word_ids(instructions))[0]

    def action_features(self, frames: Tensor, instructions: Sequence[str]) -> Tensor:
        """The step queries (B, K, D)."""
        return self.features(frames, self.word_ids(instructions))[1]

    def word_ids(self, instructions: Sequence[str]) -> Tensor:
        """Instructions -> int64 word ids (B, 16) on the policy's device."""
        return torch.from_numpy(np.stack([_word_ids(i) for i in instructions])).to(self.device)

    def forward_train(self, frames: Tensor, word_ids: Tensor) -> tuple[Tensor, Tensor]:
        """``frames`` uint8 (B, H, W, 3), ``word_ids`` int64 (B, 16) -> logits (B, K*A, 256), read-out (B, 13)."""
        registers, steps = self.features(frames, word_ids)
        return self.token_logits(steps), self.auxiliary_head(registers.flatten(1))

    def features(self, frames: Tensor, word_ids: Tensor) -> tuple[Tensor, Tensor]:
        """The decoder's output for frames and words as above: registers (B, 3, D) and step queries (B, K, D)."""
        b = frames.shape[0]
        present = word_ids != 0
        # In an empty sentence the first word counts as present: attention over nothing is not defined.
        present = present | (torch.arange(MAX_WORDS, device=present.device) == 0)
        sentence = self.words(word_ids) + self.word_places
        for layer in self.text_layers:
            sentence = layer(sentence, present)
        weight = present.unsqueeze(-1).to(sentence.dtype)
        pooled = (sentence * weight).sum(1) / weight.sum(1)
        cells = self._cells(frames, pooled)
        sentence = self.text_norm(sentence)
        x = torch.cat([self.registers, self.steps]).expand(b, -1, -1)
        mask = F.pad(present, (0, x.shape[1]), value=True)
        for layer in self.decoder:
            x = layer(x, sentence, mask, cells)
        x = self.head_norm(x)
        return x[:, :3], x[:, 3:]

    def token_logits(self, steps: Tensor) -> Tensor:
        """Token scores (B, K*A, 256) of step queries (B, K, D)."""
        features = self.head(steps).view(len(steps), self.chunk_len, ACTION_DIM, -1)
        with torch.autocast(steps.device.type, enabled=False):  # scores stay in float32: bfloat16 has 2-3 digits
            logits: Tensor = features.float() @ self.bins + self.bin_bias
        return logits.reshape(len(steps), self.num_action_tokens, NUM_TOKENS)

    def _cells(self, frames: Tensor, pooled: Tensor) -> Tensor:
        """Frames uint8 (B, H, W, 3) and the pooled sentence (B, D) -> cells (B, N, D)."""
        image = frames.permute(0, 3, 1, 2).to(self.stem.weight.dtype) / 127.5 - 1.0
        image = F.pixel_unshuffle(image, 2)
        x = torch.cat([image, self.coordinates.expand(len(frames), -1, -1, -1)], dim=1)  # type: ignore[operator]
        # Only activations are channels-last: AdamW's fused CPU kernel, after a resume, would pair contiguous moments with
        # channels-last weights element by element.
        x = self.stem(x.contiguous(memory_format=torch.channels_last))
        x = self.down(self.stem_block(x, pooled))
        for block in self.trunk:
            x = block(x, pooled)
        x = F.silu(self.trunk_norm(x)).permute(0, 2, 3, 1).flatten(1, 2)
        return self.cell_norm(self.to_cells(x) + self.cell_places)  # type: ignore[no-any-return]

    def save_pretrained(self, folder: str | Path, *, metadata: Mapping[str, Any] | None = None) -> None:
        """Write ``model.safetensors`` (fp32) and ``config.json`` into ``folder``, each atomically."""
        path = Path(folder)
        tensors = {name: t.detach().cpu().contiguous() for name, t in self.state_dict().items()}
        config = {"kind": KIND, **asdict(self.config), "metadata": dict(metadata or {})}
        with sealed_folder(path):
            save_safetensors(path / "model.safetensors", tensors, {"kind": KIND})
            atomic_write_json(path / "config.json", config)

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str | torch.device = "cpu") -> TinyVLA:
        """Load a folder written by ``save_pretrained``; names, shapes and finiteness are checked (``CheckpointError``)."""
        path = Path(folder)
        config = _read_config(path / "config.json")
        policy = load_module(lambda: cls(config), path / "model.safetensors")
        return policy.to(device).eval()


def _read_config(path: Path) -> TinyVLAConfig:
    raw = read_json(path, "choose a folder written by save_pretrained")
    if raw.get("kind") != KIND:
        raise CheckpointError(f"{path} describes {raw.get('kind')!r}, not {KIND!r}; this folder holds another model.")
    known = {f.name for f in fields(TinyVLAConfig)}
    sizes = {k: v for k, v in raw.items() if k not in ("kind", "metadata")}
    if sizes.keys() != known or not all(isinstance(v, int) and not isinstance(v, bool) for v in sizes.values()):
        raise CheckpointError(f"{path} has fields {sorted(sizes)}, expected integers for {sorted(known)}.")
    try:
        return TinyVLAConfig(**sizes)
    except InvalidOptionError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _coordinates(size: int) -> Tensor:
    """Two channels (1, 2, size, size) with x and y in [-1, 1]."""
    axis = torch.linspace(-1.0, 1.0, size)
    return torch.stack(torch.meshgrid(axis, axis, indexing="xy")).unsqueeze(0)


def _waves(size: int, width: int) -> Tensor:
    """Sines and cosines of the cells' positions (size * size, width), from half a wave across the image up to four.

    The lowest frequencies are nearly linear, so that an average weighted by attention is close to a coordinate.
    """
    x, y = _coordinates(size)[0].flatten(1)
    frequency = 2.0 ** torch.linspace(-1.0, 2.0, -(-width // 4))[:, None] * math.pi / 2
    waves = torch.cat(
        [torch.sin(frequency * x), torch.sin(frequency * y), torch.cos(frequency * x), torch.cos(frequency * y)]
    )
    return waves[:width].T.contiguous()


def _smooth_bins(rank: int) -> Tensor:
    """Cosines over the 256 bins (rank, 256), so that neighbouring bins have nearly the same scores at initialisation."""
    place = (torch.arange(NUM_TOKENS) + 0.5) / NUM_TOKENS
    waves: Tensor = torch.cos(math.pi * torch.arange(rank)[:, None] * place)
    return waves.mul((2.0 / rank) ** 0.5)
