"""OpenVLA-OFT against golden outputs of the public reference code, TensorFlow's image operations and transformers' towers.

``golden_openvla`` holds the outputs, and the scripts that made them.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from rawdream_env.policies import action_tokens
from rawdream_env.policies.openvla_oft import images, prompt
from rawdream_env.policies.openvla_oft.policy import OpenVLAOFT
from rawdream_env.policies.openvla_oft.vision import TowerConfig, VisionTower
from rawdream_env.testing.openvla_oft import write_tiny_openvla

GOLDEN = Path(__file__).parent / "golden_openvla"
sys.path.insert(0, str(GOLDEN))
import images_tensorflow  # noqa: E402
import reference  # noqa: E402


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> OpenVLAOFT:
    folder = write_tiny_openvla(tmp_path_factory.mktemp("tiny"), action=reference.STATISTICS)
    return OpenVLAOFT.from_pretrained(folder)


@pytest.mark.parametrize("index", range(reference.IMAGES))
def test_scores_tokens_and_actions_are_the_reference_s(policy: OpenVLAOFT, index: int) -> None:
    golden = {
        k.partition(".")[2]: v for k, v in load_file(GOLDEN / "reference.safetensors").items() if k[0] == str(index)
    }
    ids = golden["input_ids"].tolist()
    assert (ids[-1] == prompt.BLANK) == (index == 1)
    assert policy.prompt(reference.SENTENCES[index]) == prompt.with_blank(ids)
    with torch.no_grad():
        features = policy.vision_backbone(torch.from_numpy(reference.pixels(index)))
        scores = policy.prompt_logits(policy.projector(features), [prompt.with_blank(ids)])
    np.testing.assert_allclose(features[0, ::16], golden["features"], atol=1e-4)
    np.testing.assert_allclose(scores[0].flip(-1), golden["logits"], atol=1e-4)  # columns in order of the vocabulary
    tokens = scores.argmax(-1)
    np.testing.assert_array_equal(31999 - tokens[0].numpy(), golden["tokens"])
    assert len(np.unique(golden["tokens"])) > 12
    decoded = action_tokens.decode(tokens).reshape(-1, 8, 7)
    np.testing.assert_allclose(policy.action_statistics.unnormalise(decoded)[0], golden["actions"], atol=1e-6)
    gripper = policy.decode_actions(tokens)[0, :, 6].numpy()
    np.testing.assert_array_equal(gripper, np.where(golden["actions"][:, 6] > 0.5, -1, 1))  # 1 opens, here -1 does


def test_a_batch_of_both_prompts_is_the_reference_s(policy: OpenVLAOFT) -> None:
    golden = load_file(GOLDEN / "reference.safetensors")
    values = torch.from_numpy(np.concatenate([reference.pixels(i) for i in range(2)]))
    with torch.no_grad():
        scores = policy.token_logits(policy.vision_backbone(values), reference.SENTENCES)  # one prompt is padded
    for index in range(2):
        np.testing.assert_allclose(scores[index].flip(-1), golden[f"{index}.logits"], atol=1e-4)


def test_images_are_tensorflow_s_within_two_grey_levels() -> None:
    golden = load_file(GOLDEN / "images.safetensors")
    for index, size in enumerate(images_tensorflow.SIZES):
        prepared = images.prepare(images_tensorflow.natural(index, size)[None])[0]
        ours = images_tensorflow.sample(prepared, index).astype(int)
        difference = np.abs(ours - golden[f"prepared_{index:02d}"])
        assert difference.max() <= 2 and difference.mean() < 0.01, index


def test_channels_are_normalised_per_tower() -> None:
    pixels = images.normalise(torch.full((1, 224, 224, 3), 255, dtype=torch.uint8))
    assert pixels.shape == (1, 6, 224, 224)
    expected = [(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225, 1, 1, 1]
    torch.testing.assert_close(pixels[0, :, 0, 0], torch.tensor(expected))


@pytest.mark.parametrize("registers", [0, 4])
def test_towers_are_transformers(registers: int) -> None:
    config = TowerConfig(embed_dim=32, depth=3, num_heads=2, reg_tokens=registers)
    tower = VisionTower(config)
    torch.manual_seed(0)
    for parameter in tower.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    pixels = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        theirs = _dinov2(tower, config, pixels) if registers else _siglip(tower, config, pixels)
        torch.testing.assert_close(tower(pixels), theirs, atol=1e-4, rtol=1e-4)


def _dinov2(tower: VisionTower, config: TowerConfig, pixels: torch.Tensor) -> torch.Tensor:
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    model = Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=224,
            patch_size=14,
            num_register_tokens=4,
        )
    ).eval()
    own, state = tower.state_dict(), model.state_dict()
    # Only the patches have positions here: the class token is stored without one.
    state |= {
        "embeddings.cls_token": own["cls_token"],
        "embeddings.register_tokens": own["reg_token"],
        "embeddings.position_embeddings": torch.cat([torch.zeros(1, 1, 32), own["pos_embed"]], dim=1),
        "embeddings.patch_embeddings.projection.weight": own["patch_embed.proj.weight"],
        "embeddings.patch_embeddings.projection.bias": own["patch_embed.proj.bias"],
    }
    root = next(n for n in state if n.endswith("layer.0.norm1.weight")).partition("layer.0")[0]
    for i in range(config.depth - 1):
        for kind in ("weight", "bias"):
            state |= {
                f"{root}layer.{i}.{n}.{kind}": own[f"blocks.{i}.{n}.{kind}"]
                for n in ("norm1", "norm2", "mlp.fc1", "mlp.fc2")
            }
            qkv = own[f"blocks.{i}.attn.qkv.{kind}"].chunk(3)
            names = [f"{root}layer.{i}.attention.{n}_proj.{kind}" for n in "qkv"]
            state |= dict(zip(names, qkv, strict=True))
            state[f"{root}layer.{i}.attention.o_proj.{kind}"] = own[f"blocks.{i}.attn.proj.{kind}"]
        for j in (1, 2):
            state[f"{root}layer.{i}.layer_scale{j}.lambda1"] = own[f"blocks.{i}.ls{j}.scale_factor"]
    model.load_state_dict(state)
    return model(pixels, output_hidden_states=True).hidden_states[-2][:, 5:]


def _siglip(tower: VisionTower, config: TowerConfig, pixels: torch.Tensor) -> torch.Tensor:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    model = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=32, intermediate_size=128, num_hidden_layers=3, num_attention_heads=2, image_size=224, patch_size=14,
            hidden_act="gelu",
        )
    ).eval()  # fmt: skip
    own, state = tower.state_dict(), model.state_dict()
    root = next(n for n in state if n.endswith("embeddings.patch_embedding.weight")).partition("embeddings")[0]
    state |= {
        f"{root}embeddings.position_embedding.weight": own["pos_embed"][0],
        f"{root}embeddings.patch_embedding.weight": own["patch_embed.proj.weight"],
        f"{root}embeddings.patch_embedding.bias": own["patch_embed.proj.bias"],
    }
    pairs = {"layer_norm1": "norm1", "layer_norm2": "norm2", "self_attn.out_proj": "attn.proj"}
    pairs |= {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    for i in range(config.depth - 1):
        for kind in ("weight", "bias"):
            state |= {f"{root}encoder.layers.{i}.{a}.{kind}": own[f"blocks.{i}.{b}.{kind}"] for a, b in pairs.items()}
            qkv = own[f"blocks.{i}.attn.qkv.{kind}"].chunk(3)
            names = [f"{root}encoder.layers.{i}.self_attn.{n}_proj.{kind}" for n in "qkv"]
            state |= dict(zip(names, qkv, strict=True))
    model.load_state_dict(state)
    return model(pixels, output_hidden_states=True).hidden_states[-2]
