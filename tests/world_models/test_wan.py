"""The Wan transformer: parity with diffusers, exact trims, weights in both layouts, attention masks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rawdream_env.cli import main
from rawdream_env.errors import CheckpointError, InvalidOptionError
from rawdream_env.seeding import NoiseKey
from rawdream_env.world_models import load_world_model
from rawdream_env.world_models.wan.attention import attend, collapse_prompt, frame_mask
from rawdream_env.world_models.wan.config import WAN_CONFIGS, WanConfig, wan_config
from rawdream_env.world_models.wan.convert import (
    ORIGINAL_NAMES,
    ConvertWanConfig,
    convert_wan,
    read_wan_transformer,
)
from rawdream_env.world_models.wan.convert import empty_prompt as prompt_of
from rawdream_env.world_models.wan.dream_state import DreamState
from rawdream_env.world_models.wan.fp8 import quantise, use_fp8
from rawdream_env.world_models.wan.rollout import WAN_ROLLOUT, WanWorldModel
from rawdream_env.world_models.wan.tiny_decoder import TinyDecoder
from rawdream_env.world_models.wan.transformer import WanWorldModelTransformer

TINY = WanConfig(
    latent_shape=(4, 8, 8), num_layers=2, num_attention_heads=2, attention_head_dim=24, ffn_dim=64, freq_dim=32,
    text_dim=16, text_rows=2, pose_dim=0, stem_channels=0, stem_blocks=0, head_blocks=0, residual=False,
)  # fmt: skip
SIZES = {
    "num_attention_heads": 2, "attention_head_dim": 24, "in_channels": 4, "out_channels": 4, "text_dim": 16,
    "freq_dim": 32, "ffn_dim": 64, "num_layers": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """A tiny random Wan 2.1 of diffusers, and its folder."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    model = WanTransformer3DModel(**SIZES).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.14)
    folder = tmp_path_factory.mktemp("wan")
    model.save_pretrained(folder / "transformer")
    return model, folder


def empty_prompt(seed: int = 0) -> Tensor:
    """One row of a text encoder's and 511 of padding, as Wan's pipeline makes them of an empty prompt."""
    row = torch.randn(1, 16, generator=torch.Generator().manual_seed(seed))
    return torch.cat([row, torch.zeros(511, 16)])


@pytest.mark.parametrize("prompt", ["empty", "zero"])
def test_equals_diffusers(wan: tuple[nn.Module, Path], prompt: str) -> None:
    """Full attention, one timestep, no action yet: the converted model is Wan 2.1, the prompt's 512 rows collapsed."""
    reference, folder = wan
    embeds = empty_prompt() if prompt == "empty" else torch.zeros(512, 16)
    model = read_wan_transformer(folder, 8, embeds)
    assert model.arch == replace(TINY, text_rows=2 if prompt == "empty" else 1)
    gen = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 5, 4, 8, 8, generator=gen)
    level = torch.tensor([0.137, 0.8])
    with torch.no_grad():
        expected = reference(latents.transpose(1, 2), level * 1000, embeds.expand(2, -1, -1)).sample.transpose(1, 2)
        ours = model(latents, level[:, None].expand(-1, 5), torch.randn(2, 5, 28, generator=gen), causal=False)
    assert expected.abs().mean() > 0.1
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


def test_collapsed_prompt_equals_512_rows(wan: tuple[nn.Module, Path]) -> None:
    model = read_wan_transformer(wan[1], 8, empty_prompt())
    attention, x = model.blocks[0].attn2, torch.randn(2, 32, 48, generator=torch.Generator().manual_seed(0))
    embedder, norm = model.condition_embedder.text_embedder, model.blocks[0].norm2
    with torch.no_grad():
        for embeds in (empty_prompt(), torch.zeros(512, 16)):
            rows, counts = collapse_prompt(embeds)
            ours = attention.add(x, norm, attention.prepare(embedder(rows), counts))
            whole = attention.add(x, norm, attention.prepare(embedder(embeds), torch.ones(512, dtype=torch.long)))
            torch.testing.assert_close(ours, whole, rtol=0, atol=1e-6)
    assert counts.tolist() == [512]


def test_actions_start_without_effect_and_then_have_one(wan: tuple[nn.Module, Path]) -> None:
    model = read_wan_transformer(wan[1], 8)
    gen = torch.Generator().manual_seed(1)
    latents, level = torch.randn(1, 3, 4, 8, 8, generator=gen), torch.full((1, 3), 0.5)
    actions = torch.randn(1, 3, 28, generator=gen)
    with torch.no_grad():
        before = model(latents, level, actions)
        assert torch.equal(before, model(latents, level, torch.zeros_like(actions)))
        nn.init.normal_(model.condition_embedder.action_proj.weight, std=0.1)
        assert not torch.equal(before, model(latents, level, actions))


def test_later_frames_leave_earlier_ones_bit_identical(wan: tuple[nn.Module, Path]) -> None:
    model = read_wan_transformer(wan[1], 8, empty_prompt())
    nn.init.normal_(model.condition_embedder.action_proj.weight, std=0.1)
    gen = torch.Generator().manual_seed(1)
    latents, level, actions = torch.randn(2, 6, 4, 8, 8, generator=gen), torch.rand(2, 6), torch.randn(2, 6, 28)
    with torch.no_grad():
        before = model(latents, level, actions)
        for j in range(1, 6):
            for changed in (0, 1, 2):
                inputs = [latents.clone(), level.clone(), actions.clone()]
                inputs[changed][:, j] += 0.3
                after = model(*inputs)
                assert torch.equal(before[:, :j], after[:, :j]), (j, changed)
                assert not torch.equal(before[:, j], after[:, j]), (j, changed)


def test_positions_may_differ_by_row(wan: tuple[nn.Module, Path]) -> None:
    model = read_wan_transformer(wan[1], 8)
    gen = torch.Generator().manual_seed(1)
    latents, level, actions = torch.randn(2, 3, 4, 8, 8, generator=gen), torch.rand(2, 3), torch.randn(2, 3, 28)
    times = torch.tensor([[0, 1, 2], [0, 4, 5]])
    with torch.no_grad():
        both = model(latents, level, actions, times=times)
        for i in range(2):
            one = model(latents[i : i + 1], level[i : i + 1], actions[i : i + 1], times=times[i])
            torch.testing.assert_close(both[i : i + 1], one, rtol=0, atol=1e-5)


def test_gradient_checkpointing_changes_nothing(wan: tuple[nn.Module, Path]) -> None:
    model = read_wan_transformer(wan[1], 8)
    gen = torch.Generator().manual_seed(1)
    inputs = torch.randn(1, 3, 4, 8, 8, generator=gen), torch.rand(1, 3, generator=gen), torch.randn(1, 3, 28)

    def gradients() -> list[Tensor | None]:
        model.zero_grad()
        model(*inputs).square().mean().backward()
        return [None if p.grad is None else p.grad.clone() for p in model.parameters()]

    plain = gradients()
    model.enable_gradient_checkpointing()
    again = gradients()
    unused = {id(p) for p in model.unused_parameters()}
    for parameter, a, b in zip(model.parameters(), plain, again, strict=True):
        assert (a is None) == (b is None) == (id(parameter) in unused)
        assert a is None or b is None or torch.equal(a, b)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("frames", [(3, 5), (4, 4)])
def test_flex_attention_equals_the_dense_mask(frames: tuple[int, int]) -> None:
    """The block mask of a GPU, run eagerly here: 128 tokens a frame, queries at the end of the keys."""
    queries, keys = frames
    visible = torch.ones(keys, keys, dtype=torch.bool).tril()[-queries:]
    gen = torch.Generator().manual_seed(0)
    q = torch.randn(1, 2, queries * 128, 16, generator=gen)
    k, v = (torch.randn(1, 2, keys * 128, 16, generator=gen) for _ in range(2))
    cpu = torch.device("cpu")
    dense = attend(q, k, v, frame_mask(visible, 128, cpu))
    flex = attend(q, k, v, frame_mask(visible, 128, cpu, flex=True))
    torch.testing.assert_close(flex, dense, rtol=0, atol=1e-6)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].shape == b[k].shape for k in a)


def to_diffusers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our transformer's tensors -> those of diffusers' ``WanTransformer3DModel``; actions and prompt are left out."""
    ours = ("condition_embedder.action_", "prompt_")
    wan = {name: tensor for name, tensor in state.items() if not name.startswith(ours)}
    return {**wan, "patch_embedding.weight": wan["patch_embedding.weight"].unsqueeze(2)}  # a temporal patch of 1


def to_original(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our transformer's tensors -> those of Wan's own release."""
    out = {}
    for name, tensor in to_diffusers(state).items():
        new = "head.modulation" if name == "scale_shift_table" else name.replace("scale_shift_table", "modulation")
        for ours, theirs in ORIGINAL_NAMES:
            new = new.replace(ours, theirs)
        out[new] = tensor
    return out


def test_round_trip_through_both_layouts(wan: tuple[nn.Module, Path], tmp_path: Path) -> None:
    """Bit-equal: diffusers -> ours -> diffusers; ours -> Wan's own (safetensors and pth) -> ours -> Wan's own."""
    reference, folder = wan
    ours = read_wan_transformer(folder, 8)
    assert same(to_diffusers(ours.state_dict()), reference.state_dict())
    original = to_original(ours.state_dict())
    assert {
        "head.modulation",
        "blocks.1.norm3.bias",
        "blocks.0.ffn.2.weight",
        "text_embedding.2.bias",
    } <= original.keys()
    assert not any("to_" in name or "norm2" in name or "scale_shift" in name for name in original)
    release = tmp_path / "release"
    release.mkdir()
    save_file(original, release / "diffusion_pytorch_model.safetensors")
    (release / "config.json").write_text(json.dumps({"_class_name": "WanModel", "dim": 48, "num_heads": 2}))
    torch.save({f"model.diffusion_model.{k}": v for k, v in original.items()}, tmp_path / "wan.pth")
    base = replace(wan_config("wan2.1-1.3b"), attention_head_dim=24)
    for source in (release, tmp_path / "wan.pth"):
        again = read_wan_transformer(source, 8, base=base)
        assert again.arch == ours.arch
        assert same(dict(again.state_dict()), dict(ours.state_dict()))
        assert same(to_original(again.state_dict()), original)


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "diffusion_model.", "model.diffusion_model.", "model."]
)
def test_prefixes_of_wrappers_are_recognised(wan: tuple[nn.Module, Path], tmp_path: Path, prefix: str) -> None:
    ours = read_wan_transformer(wan[1], 8)
    base = replace(wan_config("wan2.1-1.3b"), attention_head_dim=24)
    for layout in (to_original(ours.state_dict()), to_diffusers(ours.state_dict())):
        torch.save({f"{prefix}{name}": tensor for name, tensor in layout.items()}, tmp_path / "wan.pth")
        assert same(
            dict(read_wan_transformer(tmp_path / "wan.pth", 8, base=base).state_dict()), dict(ours.state_dict())
        )
    inside = {name.replace("blocks.1.", "blocks.1._orig_mod."): tensor for name, tensor in layout.items()}
    torch.save(inside, tmp_path / "wan.pth")
    assert same(dict(read_wan_transformer(tmp_path / "wan.pth", 8, base=base).state_dict()), dict(ours.state_dict()))
    torch.save({**layout, **{f"{prefix}{name}": tensor for name, tensor in layout.items()}}, tmp_path / "two.pth")
    with pytest.raises(CheckpointError, match="the file holds several models"):
        read_wan_transformer(tmp_path / "two.pth", 8, base=base)
    torch.save({f"net.{'x' * 5000}{name}": tensor for name, tensor in layout.items()}, tmp_path / "wan.pth")
    with pytest.raises(CheckpointError, match=r"not a Wan 2\.1 transformer: .* the first are \['net\.xxx") as error:
        read_wan_transformer(tmp_path / "wan.pth", 8, base=base)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("names", [("transformer", "transformer_2"), ("high_noise_model", "low_noise_model")])
def test_two_experts_are_refused(wan: tuple[nn.Module, Path], tmp_path: Path, names: tuple[str, str]) -> None:
    for name in names:
        wan[0].save_pretrained(tmp_path / name)  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=f"Wan 2.2 with two experts, {names[0]} and {names[1]}"):
        read_wan_transformer(tmp_path, 8)


def test_shards_and_precision(wan: tuple[nn.Module, Path], tmp_path: Path) -> None:
    model = read_wan_transformer(wan[1], 8)
    model.save_pretrained(tmp_path / "m", max_shard_size="40KB")
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 1
    again = WanWorldModelTransformer.from_pretrained(tmp_path, subfolder="m", torch_dtype=torch.float64)
    assert again.dtype == torch.float64
    assert same(dict(again.float().state_dict()), dict(model.state_dict()))
    model.save_pretrained(tmp_path / "m", half=True)
    names = ["config.json", "diffusion_pytorch_model.safetensors", "manifest.json"]
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == names, "shards of an older save are gone"
    assert load_file(tmp_path / "m" / "diffusion_pytorch_model.safetensors")["proj_out.weight"].dtype == torch.float16
    (next((tmp_path / "m").glob("*.safetensors"))).unlink()
    with pytest.raises(CheckpointError, match="There is no file"):
        WanWorldModelTransformer.from_pretrained(tmp_path / "m")


def test_bad_weights_are_one_error_that_names_them_all(wan: tuple[nn.Module, Path], tmp_path: Path) -> None:
    target = tmp_path / "transformer"
    wan[0].save_pretrained(target)  # type: ignore[operator]
    file = target / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["blocks.0.attn2.to_q.bias"]
    tensors["blocks.1.ffn.net.2.bias"] = torch.zeros(7)
    tensors["wings.weight"] = torch.zeros(1)
    tensors["proj_out.bias"][3] = float("nan")
    save_file(tensors, file)
    with pytest.raises(CheckpointError) as caught:
        read_wan_transformer(tmp_path, 8)
    for said in ("blocks.0.attn2.to_q.bias is missing", "blocks.1.ffn.net.2.bias has shape (7,), expected (48,)",
                 "wings.weight is unknown", "proj_out.bias holds 1 non-finite of 16 values", "4 problems"):  # fmt: skip
        assert said in str(caught.value)

    config = json.loads((target / "config.json").read_text())
    for change, message in (
        ({"image_dim": 1280}, "image-to-video"),
        ({"_class_name": "FluxTransformer2DModel"}, "expected a WanTransformer3DModel"),
        ({"patch_size": [2, 2, 2]}, "patches"),
        ({"patch_size": 2}, "patches 2 "),
        ({"num_layers": None}, "lacks num_layers"),
        ({"freq_dim": "256"}, "lacks freq_dim"),
        ({"_class_name": "x" * 80_000}, "holds a 'xxx"),
    ):
        (target / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(CheckpointError, match=message) as caught:
            read_wan_transformer(tmp_path, 8)
        assert len(str(caught.value)) < 1000
    (target / "config.json").write_text(json.dumps(config))
    save_file({f"wings.{i}": torch.zeros(1) for i in range(900)}, file)
    with pytest.raises(CheckpointError, match=r"9\d\d problems: .*; and 9\d\d more\. Use the file") as caught:
        read_wan_transformer(tmp_path, 8)
    assert len(str(caught.value)) < 1500 + len(str(target))


def test_unreadable_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither a folder nor a file .*download"):
        read_wan_transformer(tmp_path / "nothing", 32)
    torch.save({"a": Path("/")}, tmp_path / "code.pth")
    with pytest.raises(CheckpointError, match="holds objects other than tensors"):
        read_wan_transformer(tmp_path / "code.pth", 32)
    torch.save({"step": 3}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="no dictionary of named tensors"):
        read_wan_transformer(tmp_path / "other.pth", 32)
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"not a Wan 2.1 transformer: patch_embedding.weight"):
        read_wan_transformer(tmp_path / "a.safetensors", 32)
    with pytest.raises(CheckpointError, match="there is no folder"):
        WanWorldModelTransformer.from_pretrained(tmp_path / "no" / "such")
    with pytest.raises(CheckpointError, match="choose among 'embedded', 'wan2.1-1.3b'"):
        wan_config("wan3")


def test_full_size_has_the_parameters_of_wan() -> None:
    """Wan2.1-T2V-1.3B has 1.42 billion parameters; ours adds the action path."""
    with torch.device("meta"):
        model = WanWorldModelTransformer(WAN_CONFIGS["wan2.1-1.3b"])
    added = sum(p.numel() for name, p in model.named_parameters() if "action_" in name)
    assert sum(p.numel() for p in model.parameters()) - added == 1_418_996_800
    assert model.arch.tokens_per_frame == 256
    assert model.arch.chunk_len == 8


@pytest.fixture(scope="module")
def wan_release(wan: tuple[nn.Module, Path]) -> Path:
    """The tiny Wan with a VAE and a text encoder, as in a full download."""
    from diffusers import AutoencoderKLWan
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(1)
    folder = wan[1]
    mean, std = [0.1 * i for i in range(4)], [1.0 + i for i in range(4)]
    AutoencoderKLWan(base_dim=8, z_dim=4, latents_mean=mean, latents_std=std).save_pretrained(folder / "vae")
    text = UMT5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    UMT5EncoderModel(text).save_pretrained(folder / "text_encoder")
    return folder


@pytest.mark.parametrize("prompt", ["zero", "empty"])
def test_convert_wan_makes_a_world_model_that_dreams(wan_release: Path, tmp_path: Path, prompt: str) -> None:
    target = tmp_path / "wm"
    said = main(["convert-wan", str(wan_release), str(target), "--image-size", "64", "--prompt", prompt])
    assert said == 0
    model = load_world_model(target)
    assert isinstance(model, WanWorldModel)
    assert model.frame_shape == (64, 64, 3)
    assert model.transformer.arch.text_rows == (2 if prompt == "empty" else 1)
    frames = torch.randint(0, 256, (2, 64, 64, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    keys = [NoiseKey(0), NoiseKey(1)]
    state, _ = model.imagine(model.start(frames, keys), torch.zeros(2, 8, 7))
    state, video = model.imagine(state, torch.zeros(2, 8, 7))
    assert video.shape == (2, 8, 64, 64, 3)
    alone = model.start(frames[1:], keys[1:])
    for _ in range(2):
        alone, own = model.imagine(alone, torch.zeros(1, 8, 7))
    assert torch.equal(own, video[1:]), "a row does not depend on its neighbours"
    mixed = DreamState.cat([state[[1]], model.start(frames[:1], keys[:1])])
    assert torch.equal(
        model.imagine(mixed, torch.zeros(2, 8, 7))[0].decoder[0][:1],
        model.imagine(alone, torch.zeros(1, 8, 7))[0].decoder[0],
    )


def test_empty_prompt_is_what_the_pipeline_makes(wan_release: Path) -> None:
    """Padding to 512 tokens and masking it gives the same row as the end-of-text token alone."""
    from transformers import UMT5EncoderModel

    encoder = UMT5EncoderModel.from_pretrained(wan_release / "text_encoder").eval()
    ids, mask = torch.zeros(1, 512, dtype=torch.long), torch.zeros(1, 512, dtype=torch.long)
    ids[0, 0] = mask[0, 0] = 1
    with torch.no_grad():
        hidden = encoder(ids, attention_mask=mask).last_hidden_state[0] * mask[0, :, None]
    torch.testing.assert_close(prompt_of(wan_release / "text_encoder"), hidden, rtol=0, atol=1e-6)


def test_convert_wan_says_what_is_wrong(wan_release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def says(*arguments: str) -> str:
        assert main(["convert-wan", *arguments]) == 2
        return capsys.readouterr().err

    nothing, target = str(tmp_path / "nothing"), str(tmp_path / "wm")
    assert "give the VAE's path with --vae" in says(nothing, target)
    assert "image_size must be a multiple of 16" in says(str(wan_release), target, "--image-size", "100")
    vae = str(wan_release / "vae")
    assert "neither a folder nor a file" in says(nothing, target, "--vae", vae, "--image-size", "64")
    assert "there is no text encoder" in says(nothing, target, "--vae", vae, "--prompt", "empty", "--image-size", "64")
    assert not (tmp_path / "wm").exists(), "nothing is written before everything is read"
    (tmp_path / "wm").mkdir()
    (tmp_path / "wm" / "config.json").write_text("{}")
    assert "already holds a model" in says(str(wan_release), target, "--image-size", "64")


def test_approximations_are_opt_in_and_named(wan_release: Path, tmp_path: Path) -> None:
    target = tmp_path / "wm"
    convert_wan(ConvertWanConfig(str(wan_release), str(target), image_size=64))
    with pytest.raises(InvalidOptionError, match=r"no approximation \['speed'\]; choose among rolling_cache"):
        load_world_model(target, approximations=["speed"])
    with pytest.raises(CheckpointError, match=r"Download safetensors/taew2_1.safetensors"):
        load_world_model(target, approximations=["tiny_decoder"])
    with pytest.raises(CheckpointError, match="has another frame codec"):
        load_world_model("embedded-video", approximations=["tiny_decoder"])
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "rawdream_env.world_models.loading.TinyDecoder.from_pretrained", lambda path: TinyDecoder(4, (16, 8, 8, 8))
        )
        model = load_world_model(target, approximations=["tiny_decoder", "rolling_cache", "fp8"])
    assert isinstance(model, WanWorldModel)
    assert model.context_cache == "rolling"
    state = model.start(torch.zeros(1, 64, 64, 3, dtype=torch.uint8), [NoiseKey(0)])
    for _ in range(3):
        state, frames = model.imagine(state, torch.zeros(1, 8, 7))
    assert frames.shape == (1, 8, 64, 64, 3)
    assert torch.isfinite(state.recent).all()


def test_fp8_is_close(wan: tuple[nn.Module, Path]) -> None:
    """e4m3 has three bits of mantissa: 1 / 16 at most per factor, a few per cent over two blocks."""
    exact, coarse = (read_wan_transformer(wan[1], 8, empty_prompt()) for _ in range(2))
    assert use_fp8(coarse) == 2 * (4 + 4 + 2)
    gen = torch.Generator().manual_seed(1)
    inputs = torch.randn(1, 3, 4, 8, 8, generator=gen), torch.full((1, 3), 0.5), torch.zeros(1, 3, 28)
    with torch.no_grad():
        a, b = exact(*inputs), coarse(*inputs)
    error = (a - b).norm() / a.norm()
    assert 1e-3 < error < 0.1
    weights, scale = quantise(torch.tensor([[1.0, -448.0, 0.0], [0.0, 0.0, 0.0]]))
    torch.testing.assert_close(weights.float() * scale, torch.tensor([[1.0, -448.0, 0.0], [0.0, 0.0, 0.0]]))


def test_training_goes_on_from_it_as_it_is(wan_release: Path, tmp_path: Path) -> None:
    """Architecture and rollout come from ``init``; another architecture is refused; by name Wan's settings come along."""
    from rawdream_env.trainers.world_model.config import WorldModelTrainConfig
    from rawdream_env.trainers.world_model.train import _resolved

    target = tmp_path / "wm"
    convert_wan(ConvertWanConfig(str(wan_release), str(target), image_size=64, fps=20))
    config, initial = _resolved(WorldModelTrainConfig(data=("d",), run_dir="o", init=str(target)))
    assert initial is not None
    assert config.model == initial.transformer.arch == replace(TINY, text_rows=1)
    assert (config.rollout.max_time, config.rollout.fps, config.rollout.arm_map) == (7, 20, None)
    with pytest.raises(CheckpointError, match="another architecture"):
        _resolved(WorldModelTrainConfig(data=("d",), run_dir="o", init=str(target), model_name="wan2.1-1.3b"))
    full, none = _resolved(WorldModelTrainConfig(data=("d",), run_dir="o", model_name="wan2.1-1.3b"))
    assert none is None
    assert full.rollout == WAN_ROLLOUT
