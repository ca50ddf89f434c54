"""Frame codecs: one contract for all, Wan's VAE against diffusers, checkpoints in both layouts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rawdream_env.errors import CheckpointError
from rawdream_env.files import load_tensors, save_safetensors
from rawdream_env.world_models.autoencoders import AutoencoderConfig, FrameCodec, PackedFrameAutoencoder
from rawdream_env.world_models.wan.tiny_decoder import TinyDecoder, TinyDecoderCodec
from rawdream_env.world_models.wan.vae import WEIGHTS, WanVAE, original_name

SIZE = 32


def wan_network(seed: int = 0, **config: Any) -> Any:
    from diffusers import AutoencoderKLWan

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoencoderKLWan(**{"base_dim": 8, **config})


def wan() -> WanVAE:
    return WanVAE(wan_network(), SIZE)


def packed() -> PackedFrameAutoencoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return PackedFrameAutoencoder(AutoencoderConfig(image_size=SIZE, widths=(16, 16))).eval()


def tiny() -> TinyDecoderCodec:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return TinyDecoderCodec(wan(), TinyDecoder(widths=(16, 8, 8, 8)))


def frames(rows: int, count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (rows, count, SIZE, SIZE, 3), generator=generator, dtype=torch.uint8)


def latents(rows: int, count: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, count, 16, SIZE // 8, SIZE // 8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=[packed, wan, tiny], ids=lambda make: make.__name__)
def codec(request: pytest.FixtureRequest) -> FrameCodec:
    made: FrameCodec = request.param()
    return made


def close(a: Tensor, b: Tensor) -> None:
    """uint8 frames: rounding may fall either way."""
    assert a.dtype == b.dtype == torch.uint8
    torch.testing.assert_close(a.float(), b.float(), rtol=0, atol=1)


@torch.no_grad()
def test_contract_shapes_and_the_anchor(codec: FrameCodec) -> None:
    assert codec.frame_shape == (SIZE, SIZE, 3) and codec.latent_shape == (16, SIZE // 8, SIZE // 8)
    video = frames(2, 9)
    z = codec.encode_video(video)
    assert z.shape == (2, 3, *codec.latent_shape) and z.dtype == torch.float32
    torch.testing.assert_close(codec.encode_image(video[:, 0]), z[:, 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(codec.encode_video(video[:, :5]), z[:, :2], rtol=0, atol=1e-5)  # causal
    state = codec.start_decoding(z[:, 0])
    following, out = codec.decode_next(state, z[:, 1:])
    assert out.shape == (2, 8, *codec.frame_shape) and out.dtype == torch.uint8
    assert all(tensor.shape[0] == 2 for tensor in state)
    assert [tensor.shape for tensor in state] == [tensor.shape for tensor in following]


@torch.no_grad()
def test_contract_rows_of_any_age_and_any_chunk(codec: FrameCodec) -> None:
    """Row 0 is two latents old, row 1 has just started; joined, picked and run in chunks of other sizes, as if alone."""
    z = latents(3, 5)
    start = codec.start_decoding(z[:, 0])
    before = [tensor.clone() for tensor in start]
    older, first = codec.decode_next(start, z[:, 1:3])
    assert all(torch.equal(a, b) for a, b in zip(start, before, strict=True))
    _, second = codec.decode_next(older, z[:, 3:])

    singly, state = [], start
    for i in range(1, 5):
        state, out = codec.decode_next(state, z[:, i : i + 1])
        singly.append(out)
    close(torch.cat(singly, 1), torch.cat([first, second], 1))

    pick = torch.tensor([True, False, True])
    mixed = tuple(torch.where(pick.view(-1, *[1] * (a.dim() - 1)), a, b) for a, b in zip(older, start, strict=True))
    _, out = codec.decode_next(mixed, torch.where(pick.view(-1, 1, 1, 1, 1), z[:, 3:], z[:, 1:3]))
    close(out, torch.where(pick.view(-1, 1, 1, 1, 1), second, first))

    rows = [2, 0]
    _, out = codec.decode_next(tuple(tensor[rows] for tensor in older), z[rows, 3:])
    close(out, second[rows])
    joined = tuple(torch.cat([a[:1], b[1:2]]) for a, b in zip(start, older, strict=True))
    _, out = codec.decode_next(joined, torch.stack([z[0, 1:3], z[1, 3:]]))
    close(out, torch.stack([first[0], second[1]]))


def test_contract_bad_input_is_named(codec: FrameCodec) -> None:
    with pytest.raises(ValueError, match=r"uint8 \(N, 1 \+ 4M, 32, 32, 3\).*got torch.uint8 \(1, 4, .*cut the video"):
        codec.encode_video(frames(1, 4))
    with pytest.raises(ValueError, match=r"latents must have shape \(N, 16, 4, 4\), got \(1, 2, 16, 4, 4\)"):
        codec.start_decoding(latents(1, 2))
    if state := codec.start_decoding(latents(1, 1)[:, 0]):
        with pytest.raises(ValueError, match=r"shape \(1, G, 16, 4, 4\), got \(2, 1, 16, 4, 4\)"):
            codec.decode_next(state, latents(2, 1))
        with pytest.raises(ValueError, match="torch.float32"):
            codec.encode_image(torch.zeros(1, SIZE, SIZE, 3))


def whole_video(codec: WanVAE, z: Tensor) -> Tensor:
    """diffusers' own decode, as its pipelines call it."""
    config = codec.vae.config
    mean, std = (torch.tensor(config[name]).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    with torch.no_grad():
        video: Tensor = codec.vae.decode(z.transpose(1, 2) * std + mean).sample
    return video


@pytest.mark.parametrize("chunk", [1, 2])
def test_streamed_decode_equals_the_whole(chunk: int) -> None:
    codec, z = wan(), latents(2, 7)
    whole = whole_video(codec, z)
    state, parts = codec.start_decoding(z[:, 0]), []
    for i in range(1, 7, chunk):
        state, part = codec.decode_pixels(state, z[:, i : i + chunk])
        parts.append(part)
    assert whole.std() > 0.05
    torch.testing.assert_close(torch.cat(parts, 2), whole[:, :, 1:], rtol=0, atol=1e-5)


def test_mixed_ages_equal_the_whole() -> None:
    """To 1e-5 before rounding: a fresh row beside one that is four latents old."""
    codec, z = wan(), latents(2, 7)
    whole = whole_video(codec, z)
    fresh = codec.start_decoding(z[:1, 0])
    old, _ = codec.decode_pixels(codec.start_decoding(z[1:, 0]), z[1:, 1:5])
    state = tuple(torch.cat(pair) for pair in zip(fresh, old, strict=True))
    _, out = codec.decode_pixels(state, torch.stack([z[0, 1:3], z[1, 5:]]))
    torch.testing.assert_close(out, torch.stack([whole[0, :, 1:9], whole[1, :, 17:]]), rtol=0, atol=1e-5)


def test_latents_are_normalised_posterior_modes() -> None:
    codec, video = wan(), frames(1, 5)
    config = codec.vae.config
    mean, std = (torch.tensor(config[name]).view(-1, 1, 1) for name in ("latents_mean", "latents_std"))
    pixels = video.permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    with torch.no_grad():
        mode = codec.vae.encode(pixels).latent_dist.mode().transpose(1, 2)
    torch.testing.assert_close(codec.encode_video(video), (mode - mean) / std, rtol=0, atol=1e-6)
    half = wan().to(torch.bfloat16)
    anchor = half.encode_image(video[:, 0])
    assert anchor.dtype == torch.float32 and (anchor - codec.encode_video(video)[:, 0]).abs().max() < 0.1
    state, out = half.decode_next(half.start_decoding(anchor), anchor[:, None])
    assert state[0].dtype == torch.bfloat16 and out.shape == (1, 4, SIZE, SIZE, 3)


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_diffusers_layout_round_trip(tmp_path: Path) -> None:
    from diffusers import AutoencoderKLWan

    codec = wan()
    codec.save_pretrained(tmp_path)
    before = torch.random.get_rng_state()
    loaded = WanVAE.from_pretrained(tmp_path, SIZE)
    assert torch.equal(before, torch.random.get_rng_state())
    assert same_weights(loaded.vae, codec.vae) and loaded.frame_shape == (SIZE, SIZE, 3)
    assert torch.equal(loaded.encode_video(frames(1, 5)), codec.encode_video(frames(1, 5)))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    theirs = AutoencoderKLWan.from_pretrained(tmp_path)
    assert same_weights(theirs, codec.vae) and theirs.config["base_dim"] == 8
    theirs.save_pretrained(tmp_path / "sharded", max_shard_size="300KB")
    assert (tmp_path / "sharded" / f"{WEIGHTS}.index.json").is_file()
    assert same_weights(WanVAE.from_pretrained(tmp_path / "sharded").vae, codec.vae)


def test_original_layout_round_trip(tmp_path: Path) -> None:
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    weights = wan_network().state_dict()
    original = {original_name(name): tensor for name, tensor in weights.items()}
    assert len(original) == len(weights)
    back = convert_wan_vae_to_diffusers(dict(original))
    assert back.keys() == weights.keys() and all(torch.equal(back[name], weights[name]) for name in weights)
    torch.save(original, tmp_path / "Wan2.1_VAE.pth")
    save_safetensors(tmp_path / "vae.safetensors", original)
    for name in ("Wan2.1_VAE.pth", "vae.safetensors"):
        assert same_weights(WanVAE.from_pretrained(tmp_path / name).vae, wan_network())


def spoil(weights: dict[str, Tensor], prefix: str) -> str:
    """Four kinds of damage at once; the pattern that a message about all of them matches."""
    names = [name for name in sorted(weights) if name.startswith(prefix) and name.endswith("weight")][:3]
    del weights[names[0]]
    weights[names[1]] = weights[names[1]][:1].clone()
    weights[names[2]] = weights[names[2]].clone()
    weights[names[2]].view(-1)[:2] = torch.tensor([float("nan"), float("inf")])
    weights["zebra"] = torch.zeros(1)
    first, second, third = (name.replace(".", r"\.") for name in names)
    return rf"{first} is missing; {second} has shape .*expected .*; {third} holds 2 non-finite of .*; zebra is unknown"


@pytest.mark.parametrize("layout", ["folder", "single file"])
def test_one_error_names_everything_that_is_wrong(tmp_path: Path, layout: str) -> None:
    wan().save_pretrained(tmp_path)
    weights = load_tensors(tmp_path / WEIGHTS)
    path = tmp_path
    if layout == "folder":
        pattern = spoil(weights, "decoder.")
        (tmp_path / WEIGHTS).unlink()
        (tmp_path / "manifest.json").unlink()  # its checksums come before the tensors
        from safetensors.torch import save_file

        save_file(weights, tmp_path / WEIGHTS)
    else:
        weights = {original_name(name): tensor for name, tensor in weights.items()}
        path = tmp_path / "Wan2.1_VAE.pth"
        pattern = spoil(weights, "decoder.")
        torch.save(weights, path)
    with pytest.raises(CheckpointError, match=pattern):
        WanVAE.from_pretrained(path)


class Trap:
    """Would run code when unpickled."""

    def __reduce__(self) -> tuple[Callable[[str], Any], tuple[str]]:
        return exec, ("raise SystemExit('unpickled')",)


def test_files_that_are_no_checkpoint(tmp_path: Path) -> None:
    def refused(path: Path, message: str) -> None:
        with pytest.raises(CheckpointError, match=message):
            WanVAE.from_pretrained(path)

    refused(tmp_path / "nothing", "config.json is missing; download the folder vae of Wan-AI")
    single = tmp_path / "Wan2.1_VAE.pth"
    torch.save({"model": Trap()}, single)
    refused(single, "Wan2.1_VAE.pth is damaged, or holds objects other than tensors")
    torch.save({"model": {"conv1.weight": torch.zeros(1)}}, single)
    refused(single, "no dictionary of named tensors")
    torch.save({original_name(name): tensor for name, tensor in wan_network().state_dict().items()}, single)
    whole = single.read_bytes()
    for damaged in (whole[:-100], whole[:20], b"", b"text", b"\xff" * 64):
        single.write_bytes(damaged)
        refused(single, "Wan2.1_VAE.pth is damaged")
    with pytest.raises(CheckpointError, match=r"no file .*x\.pth"):
        load_tensors(tmp_path / "x.pth")

    wan().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    good = json.loads(path.read_text())
    for change, message in [
        ({"_class_name": "AutoencoderKL"}, "describes 'AutoencoderKL', expected 'AutoencoderKLWan'"),
        ({"is_residual": True, "patch_size": 2}, "not the VAE of Wan 2.1: .*is_residual.*patch_size"),
        ({"latents_std": [1.0] * 15}, "expected 16 finite numbers each"),
        ({"latents_std": [0.0] * 16}, "the second above 0"),
        ({"latents_mean": None}, "latents_mean None"),
        ({"base_dim": "wide"}, "describes no Wan VAE"),
        ({"base_dim": 10**9}, "describes no Wan VAE: base_dim is 1000000000, expected 1 to 1024"),
        ({"num_res_blocks": 10**9}, "not the VAE of Wan 2.1: .*num_res_blocks"),  # before it is built
    ]:
        path.write_text(json.dumps({**good, **change}))
        refused(tmp_path, message)
    path.write_text("{")
    refused(tmp_path, "config.json cannot be read as JSON")
    path.write_text("[]")
    refused(tmp_path, "holds a JSON list, expected an object")
    path.write_text(json.dumps(good))
    (tmp_path / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": {"a": "../a.safetensors"}}))
    refused(tmp_path, "index.json has no weight_map from tensors to files beside it")
    (tmp_path / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": {"a": "a.safetensors"}}))
    refused(tmp_path, r"no file .*a\.safetensors")
    with pytest.raises(ValueError, match="multiple of 16, got 40"):
        WanVAE(wan_network(), 40)
