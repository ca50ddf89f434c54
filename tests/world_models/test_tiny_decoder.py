"""The tiny decoder: TAEHV's names and arithmetic, streaming, loading."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_codecs import latents, same_weights, spoil, wan
from torch import Tensor
from torch.nn import functional as F

from rawdream_env.errors import CheckpointError
from rawdream_env.world_models.wan.tiny_decoder import TinyDecoder, TinyDecoderCodec

WIDTHS = (16, 12, 8, 6)


def tiny(channels: int = 16) -> TinyDecoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return TinyDecoder(channels, WIDTHS)


def by_the_names(weights: dict[str, Tensor], z: Tensor) -> Tensor:
    """The format as documented, from nothing but the tensors: one row (F, C, h, w) -> (4F - 3, 3, H, W) in [0, 1]."""

    def conv(x: Tensor, name: str) -> Tensor:
        weight = weights[f"decoder.{name}.weight"]
        return F.conv2d(x, weight, weights.get(f"decoder.{name}.bias"), padding=weight.shape[-1] // 2)

    x = conv((z / 3).tanh() * 3, "1").relu()
    for first, times in ((3, 1), (9, 2), (15, 2)):
        for block in range(first, first + 3):
            y = torch.cat([x, torch.cat([torch.zeros_like(x[:1]), x[:-1]])], 1)
            y = conv(conv(conv(y, f"{block}.conv.0").relu(), f"{block}.conv.2").relu(), f"{block}.conv.4")
            x = (x + y).relu()
        x = x.repeat_interleave(2, -1).repeat_interleave(2, -2)
        x = torch.cat(conv(x, f"{first + 4}.conv").chunk(times, 1), 1)
        x = x.reshape(len(x) * times, -1, *x.shape[-2:])
        x = conv(x, f"{first + 5}")
    return conv(x.relu(), "22").clamp(0, 1)[3:]


@torch.no_grad()
def test_whole_decode_is_the_documented_format() -> None:
    decoder, z = tiny(), 2 * latents(2, 5)
    weights = decoder.state_dict()
    _, video = decoder(decoder.empty_state(z), z)
    assert video.shape == (2, 20, 3, 32, 32)
    for row in range(2):
        torch.testing.assert_close(video[row, 3:], by_the_names(weights, z[row]), rtol=0, atol=1e-5)
    assert video.std() > 0.01


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 2])
def test_streamed_decode_equals_the_whole(chunk: int) -> None:
    """Bit by bit on a CPU, as its convolutions do not depend on the number of frames."""
    decoder, z = tiny(), latents(2, 5)
    _, whole = decoder(decoder.empty_state(z), z)
    codec = TinyDecoderCodec(wan(), decoder)
    state, parts = codec.start_decoding(z[:, 0]), []
    for i in range(1, 5, chunk):
        state, part = codec.decode_next(state, z[:, i : i + chunk])
        parts.append(part)
    expected = (whole[:, 4:].permute(0, 1, 3, 4, 2) * 255).round().to(torch.uint8)
    assert torch.equal(torch.cat(parts, 1), expected)
    state = codec.start_decoding(z[:, 0])
    _, floats = decoder(state, z[:, 1:])
    torch.testing.assert_close(floats, whole[:, 4:], rtol=0, atol=1e-5)
    _, alone = codec.decode_next(tuple(tensor[1:] for tensor in state), z[1:, 1:])
    assert torch.equal(alone[0], expected[1])


def test_names_and_shapes_are_those_of_taew2_1() -> None:
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in TinyDecoder().state_dict().items()}
    assert len(shapes) == 2 + 9 * 6 + 3 * 2 + 2
    assert shapes["decoder.1.weight"] == (256, 16, 3, 3) and shapes["decoder.3.conv.0.weight"] == (256, 512, 3, 3)
    assert shapes["decoder.7.conv.weight"] == (256, 256, 1, 1) and shapes["decoder.8.weight"] == (128, 256, 3, 3)
    assert shapes["decoder.13.conv.weight"] == (256, 128, 1, 1) and shapes["decoder.19.conv.weight"] == (128, 64, 1, 1)
    assert shapes["decoder.22.weight"] == (3, 64, 3, 3) and "decoder.8.bias" not in shapes


def test_loading_and_its_errors(tmp_path: Path) -> None:
    weights = tiny().state_dict()
    both = {**weights, "encoder.0.weight": torch.zeros(64, 3, 3, 3)}
    save_file(both, tmp_path / "taew2_1.safetensors")
    torch.save({name: tensor.half() for name, tensor in both.items()}, tmp_path / "taew2_1.pth")
    loaded = TinyDecoder.from_pretrained(tmp_path / "taew2_1.safetensors", widths=WIDTHS)
    assert same_weights(loaded, tiny()) and not any(p.requires_grad for p in loaded.parameters())
    half = TinyDecoder.from_pretrained(tmp_path / "taew2_1.pth", widths=WIDTHS)
    assert all(p.dtype == torch.float32 for p in half.parameters())

    with pytest.raises(CheckpointError, match=r"no file .*none\. Download .*taew2_1\.safetensors.*madebyollin/taehv"):
        TinyDecoder.from_pretrained(tmp_path / "none")
    pattern = spoil(weights, "decoder.")
    save_file(weights, tmp_path / "bad.safetensors")
    with pytest.raises(CheckpointError, match=pattern):
        TinyDecoder.from_pretrained(tmp_path / "bad.safetensors", widths=WIDTHS)
    with pytest.raises(ValueError, match="takes 12 latent channels, the VAE makes 16"):
        TinyDecoderCodec(wan(), tiny(12))
