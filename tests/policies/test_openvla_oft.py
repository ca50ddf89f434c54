"""OpenVLA-OFT: the policy contract, checkpoints that are refused, LoRA, kept features. Parity: test_openvla_reference.py."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rawdream_env.errors import CausalAttentionError, CheckpointError, InvalidOptionError
from rawdream_env.policies import load_policy
from rawdream_env.policies.openvla_oft import language
from rawdream_env.policies.openvla_oft.config import OpenVLAOFTConfig
from rawdream_env.policies.openvla_oft.policy import OpenVLAOFT
from rawdream_env.policies.openvla_oft.statistics import ActionStatistics, choose_statistics
from rawdream_env.policies.openvla_oft.vision import DINOV2_L, SIGLIP_SO400M
from rawdream_env.seeding import NoiseKey
from rawdream_env.testing.openvla_oft import IDENTITY, checkpoint_shapes, write_tiny_openvla
from rawdream_env.types import Policy

SENTENCES = ["lift the cup", "stack the blue block onto the red block and then go back, slowly", "Place the pot", ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_openvla(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def policy(folder: Path) -> OpenVLAOFT:
    loaded = load_policy(folder)
    assert isinstance(loaded, OpenVLAOFT)
    return loaded


def images(n: int, seed: int = 0, size: int = 32) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def keys(n: int) -> list[NoiseKey]:
    return [NoiseKey(seed=100 + i, chunk=i % 3) for i in range(n)]


# -- the policy contract -------------------------------------------------------------------------------------------


def test_act_contract_and_first_ratio(policy: OpenVLAOFT) -> None:
    assert isinstance(policy, Policy) and not policy.training
    output = policy.act(images(4), SENTENCES, temperature=1.6, keys=keys(4))
    assert output.actions.shape == (4, 8, 7) and output.actions.dtype == torch.float32
    assert output.tokens.shape == output.logprobs.shape == (4, 56) and output.logprobs.dtype == torch.float32
    assert output.actions.abs().max() <= 1 and set(output.actions[..., 6].unique().tolist()) == {-1.0, 1.0}
    logprobs, entropy = policy.logprobs_and_entropy(images(4), SENTENCES, output.tokens, temperature=1.6)
    ratio_error = (logprobs - output.logprobs).exp().sub(1).abs()
    assert ratio_error.mean() < 1e-5 and ratio_error.max() < 1e-4
    assert entropy.min() > 0 and entropy.max() <= math.log(256) + 1e-4
    logprobs.sum().backward()
    assert not [name for name, p in policy.named_parameters() if p.grad is None]
    assert policy.act(images(0), [], temperature=1.0, keys=[]).actions.shape == (0, 8, 7)


def test_rows_do_not_depend_on_their_batch(folder: Path) -> None:
    policy = load_policy(folder)
    whole = policy.act(images(4), SENTENCES, temperature=1.0, keys=keys(4))
    for rows in ([2], [3, 1]):
        fresh = load_policy(folder)
        part = fresh.act(
            images(4)[rows], [SENTENCES[i] for i in rows], temperature=1.0, keys=[keys(4)[i] for i in rows]
        )
        assert torch.equal(part.tokens, whole.tokens[rows]) and torch.equal(part.logprobs, whole.logprobs[rows])


def test_any_image_size_and_sentence_counts(policy: OpenVLAOFT) -> None:
    base = policy.logits(images(1), SENTENCES[:1])
    assert base.shape == (1, 56, 256) and base.dtype == torch.float32
    assert policy.logits(images(1, size=70), SENTENCES[:1]).shape == base.shape
    assert not torch.allclose(base, policy.logits(images(1, seed=9), SENTENCES[:1]), atol=1e-3)
    assert not torch.allclose(base, policy.logits(images(1), ["lift the pot"]), atol=1e-3)
    with pytest.raises(InvalidOptionError, match="float64"):
        policy.logits(images(1) / 255.0, SENTENCES[:1])
    with pytest.raises(InvalidOptionError, match="the instruction has .* at most 512"):
        policy.prompt("☃" * 199)


def test_bfloat16_scores_are_float32_and_close(folder: Path, policy: OpenVLAOFT) -> None:
    half = load_policy(folder, dtype="bfloat16")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    scores = half.logits(images(1), SENTENCES[:1])
    assert scores.dtype == torch.float32
    exact = policy.logits(images(1), SENTENCES[:1])
    assert torch.nn.functional.cosine_similarity(scores.flatten(), exact.flatten(), dim=0) > 0.9
    output = half.act(images(2), SENTENCES[:2], temperature=1.6, keys=keys(2))
    again = half.logprobs(images(2), SENTENCES[:2], output.tokens, temperature=1.6)
    assert (again - output.logprobs).exp().sub(1).abs().max() < 0.5


def test_actions_by_hand() -> None:
    statistics = ActionStatistics((-0.5,) * 6 + (0.0,), (1.5,) * 6 + (1.0,), (True,) * 6 + (False,))
    model = torch.tensor([[-1.0, 0.0, 0.5, 1.0, 0.0, 0.0, 0.9], [0.0] * 6 + [0.1]])
    actions = statistics.to_environment(model)
    torch.testing.assert_close(actions[0], torch.tensor([-0.5, 0.5, 1.0, 1.0, 0.5, 0.5, -1.0]))  # 1.5 is clipped
    assert actions[1, 6] == 1.0  # 0: close
    back = statistics.from_environment(actions)
    torch.testing.assert_close(back[0], torch.tensor([-1.0, 0.0, 0.5, 0.5, 0.0, 0.0, 1.0]))
    assert back[1, 6] == 0.0


def test_encoded_actions_decode_to_themselves(policy: OpenVLAOFT) -> None:
    actions = torch.rand(3, 8, 7, generator=torch.Generator().manual_seed(0)) * 2 - 1
    actions[..., 6] = actions[..., 6].sign()
    tokens = policy.encode_actions(actions)
    assert tokens.shape == (3, 56)
    decoded = policy.decode_actions(tokens)
    assert (decoded - actions).abs().max() <= 1 / 255 + 1e-6
    torch.testing.assert_close(decoded[..., 6], actions[..., 6])


def test_statistics_are_found_by_name() -> None:
    both = {"libero_goal_no_noops": {"action": IDENTITY}, "libero_object_no_noops": {"action": IDENTITY}}
    assert choose_statistics(both, "libero_goal", "here")[0] == "libero_goal_no_noops"
    with pytest.raises(InvalidOptionError, match="several data sets; choose one by unnorm_key: libero_goal_no_noops, "):
        choose_statistics(both, None, "here")
    with pytest.raises(InvalidOptionError, match="no statistics of 'bridge'"):
        choose_statistics(both, "bridge", "here")
    with pytest.raises(CheckpointError, match=r"q01 \(2,\)"):
        choose_statistics({"x": {"action": {"q01": [0, 0], "q99": [1, 1]}}}, None, "here")


# -- attention -----------------------------------------------------------------------------------------------------


def test_a_causal_mask_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def causal(present: torch.Tensor) -> torch.Tensor:
        return present[:, None, None, :] & torch.ones(present.shape[1], present.shape[1], dtype=torch.bool).tril()

    monkeypatch.setattr(language, "bidirectional_mask", causal)
    with pytest.raises(CausalAttentionError, match="attention is causal"):
        load_policy(folder)


def test_padding_is_not_seen(policy: OpenVLAOFT) -> None:
    embeddings = torch.randn(1, 12, 64, generator=torch.Generator().manual_seed(1))
    present = torch.arange(12)[None] < 9
    changed = torch.where(present[..., None], embeddings, 7.0)
    with torch.no_grad():
        before, after = (policy.language_model(x, present)[:, :9] for x in (embeddings, changed))
    assert torch.equal(before, after)


# -- checkpoints ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_bytes", [10**9, 9 * 10**6])
def test_saved_folders_have_upstream_s_names_and_load_again(folder: Path, tmp_path: Path, shard_bytes: int) -> None:
    policy = load_policy(folder)
    policy.save_pretrained(tmp_path / "wide", shard_bytes=10**6)  # stale shards are replaced
    policy.save_pretrained(tmp_path / "wide", shard_bytes=shard_bytes)
    files = sorted((tmp_path / "wide").glob("*.safetensors"))
    assert len(files) == (1 if shard_bytes == 10**9 else 3)
    saved = {name: tensor for file in files for name, tensor in load_file(file).items()}
    original = load_file(folder / "model.safetensors")
    assert saved.keys() == original.keys() and all(torch.equal(saved[n], original[n]) for n in saved)
    assert (tmp_path / "wide" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    statistics = json.loads((tmp_path / "wide" / "dataset_statistics.json").read_text())
    assert statistics["piper"]["action"]["mask"] == [True] * 6 + [False]
    config = json.loads((folder / "config.json").read_text())
    assert config.items() <= json.loads((tmp_path / "wide" / "config.json").read_text()).items()
    again = load_policy(tmp_path / "wide").logits(images(1), SENTENCES[:1])
    assert torch.equal(again, policy.logits(images(1), SENTENCES[:1]))


def test_the_full_size_has_openvla_7b_s_parameters() -> None:
    shapes = checkpoint_shapes(OpenVLAOFTConfig(DINOV2_L, SIGLIP_SO400M))
    assert len(shapes) == 982 and sum(shape.numel() for shape in shapes.values()) == 7_541_237_184
    assert shapes["vision_backbone.featurizer.blocks.23.ls2.scale_factor"] == (1024,)
    assert shapes["vision_backbone.fused_featurizer.blocks.26.mlp.fc1.weight"] == (4304, 1152)
    assert shapes["projector.fc2.weight"] == (4096, 8704)
    assert shapes["language_model.lm_head.weight"] == (32064, 4096)


def edit(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def text(folder: Path, **changes: object) -> None:
    edit(folder, text_config=json.loads((folder / "config.json").read_text())["text_config"] | changes)


def weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "manifest.json").unlink()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda p: (p / "action_head--150000_checkpoint.pt").touch(),
            "pt is damaged, or holds objects other than tensors",
        ),
        (lambda p: (p / "noisy_action_projector--5.pt").touch(), "a diffusion action head.* use Haozhan72/"),
        (lambda p: (p / "proprio_projector--150000_checkpoint.pt").touch(), "reads proprioception.* use Haozhan72/"),
        (lambda p: (p / "vision_backbone--5_checkpoint.pt").touch(), "FiLM"),
        (lambda p: edit(p, num_images_in_input=2), "reads 2 images per step, but this policy has 1; use Haozhan72/"),
        (lambda p: edit(p, use_proprio=True), "reads proprioception"),
        (lambda p: edit(p, vision_backbone_id="siglip-vit-so400m"), "vision backbone 'siglip-vit-so400m'"),
        (lambda p: edit(p, n_action_bins=128), "128 action bins"),
        (lambda p: edit(p, timm_model_args=[{"width": 3}, {}]), "timm_model_args must be two objects"),
        (lambda p: text(p, vocab_size=32000), "a vocabulary of 32000 tokens.* padded to 32064"),
        (lambda p: text(p, hidden_size=96), "has shape"),
        (lambda p: text(p, hidden_size=-1), "hidden_size: -1 is no positive integer"),
        (lambda p: text(p, num_attention_heads=5), "5 attention heads do not divide hidden_size 64"),
        (lambda p: text(p, num_hidden_layers=2), "9 tensors that this model has not"),
        (lambda p: text(p, num_hidden_layers=4), "lacks 9 of"),
        (lambda p: (p / "dataset_statistics.json").unlink(), "without the action statistics of its training data"),
        (lambda p: (p / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (lambda p: (p / "tokenizer.json").write_text("{}"), "tokenizer.json cannot be read"),
        (lambda p: (p / "model.safetensors").unlink(), "neither model.safetensors nor"),
        (lambda p: truncate(p / "model.safetensors"), r"is truncated: it has \d+ of \d+ bytes"),
        (lambda p: (p / "model.safetensors").write_bytes(b"\x00" * 40), "no safetensors file"),
        (lambda p: weights(p, lambda t: t.pop("projector.fc2.bias")), "lacks 1 of .* first projector.fc2.bias"),
        (lambda p: weights(p, lambda t: t.update(surprise=torch.ones(1))), "1 tensors .* first surprise"),
        (lambda p: weights(p, lambda t: t["projector.fc2.bias"].fill_(math.nan)), "projector.fc2.bias has values that"),
        (lambda p: weights(p, lambda t: t.update({"projector.fc3.bias": torch.ones(64).int()})), "type I32; quantised"),
    ],
)
def test_wrong_checkpoints_have_their_own_sentence(
    folder: Path, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_policy(tmp_path)
    assert str(caught.value).count("\n") <= 2


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: next(p.glob("model-00002*")).unlink(), "model-00002-of-00003.safetensors is missing"),
        (lambda p: truncate(next(p.glob("model-00002*"))), "model-00002-of-00003.safetensors is truncated"),
        (lambda p: relabel(p), "model-00001-of-00003.safetensors lacks 1 tensors that"),
    ],
)
def test_broken_shards_are_named(tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    write_tiny_openvla(tmp_path, shard_bytes=9 * 10**6)
    assert isinstance(load_policy(tmp_path), OpenVLAOFT)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        load_policy(tmp_path)


def relabel(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["projector.fc1.bias"] = "model-00001-of-00003.safetensors"
    path.write_text(json.dumps(index))


def test_names_of_checkpoints(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="was not trained on action tokens; use Haozhan72/"):
        load_policy("moojink/openvla-7b-oft-finetuned-libero-spatial")  # before any download
    monkeypatch.setattr("rawdream_env.policies.resolve", lambda *args, **kwargs: folder)
    assert isinstance(load_policy("owner/name", unnorm_key="piper"), OpenVLAOFT)
    monkeypatch.undo()
    with pytest.raises(InvalidOptionError, match="no statistics of 'bridge'"):
        load_policy(folder, unnorm_key="bridge")
    with pytest.raises(InvalidOptionError, match="unnorm_key='piper' is for OpenVLA-OFT"):
        load_policy("embedded", unnorm_key="piper")
    with pytest.raises(CheckpointError, match="model_type 'llama'"):
        edit(write_tiny_openvla(tmp_path), model_type="llama")
        OpenVLAOFT.from_pretrained(tmp_path)


# -- what is trained -----------------------------------------------------------------------------------------------


def count_towers(policy: OpenVLAOFT) -> list[int]:
    calls: list[int] = []
    policy.vision_backbone.register_forward_hook(lambda module, args, output: calls.append(len(output)))
    return calls


def test_features_of_frozen_towers_are_computed_once(policy: OpenVLAOFT) -> None:
    frames = images(5)
    calls = count_towers(policy)
    trained = policy.logits(frames, ["lift the cup"] * 5)
    policy.logits(frames, ["lift the cup"] * 5)
    assert calls == [5, 5] and trained.requires_grad
    policy.freeze_vision()
    output = policy.act(frames[[0, 1, 2, 3, 4, 0, 1]], ["lift the cup"] * 7, temperature=1.0, keys=keys(7))
    logprobs = policy.logprobs(frames, ["lift the cup"] * 5, output.tokens[:5], temperature=1.0)
    policy.logprobs(frames[3:], ["place the pot"] * 2, output.tokens[:2], temperature=1.0)
    assert calls == [5, 5, 8]  # one block, with the padding of act
    assert (logprobs - output.logprobs[:5]).exp().sub(1).abs().max() < 1e-4
    logprobs.sum().backward()
    assert policy.projector.fc1.weight.grad is not None
    torch.testing.assert_close(policy.logits(frames, ["lift the cup"] * 5), trained, atol=1e-4, rtol=1e-4)
    policy.feature_cache.max_bytes = 2 * 256 * (64 + 72) * 4
    policy.logits(images(3, seed=5), ["lift the cup"] * 3)
    assert len(policy.feature_cache) == 2


def train(policy: OpenVLAOFT) -> None:
    """A few steps that raise the probability of token 100."""
    optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], 0.5)
    for _ in range(3):
        optimizer.zero_grad()
        logprobs = policy.logprobs(images(2), SENTENCES[:2], torch.full((2, 56), 100), temperature=1.0)
        (-logprobs.mean()).backward()
        optimizer.step()


@pytest.mark.parametrize("vision", [False, True])
def test_lora_trains_exports_and_comes_back(folder: Path, tmp_path: Path, vision: bool) -> None:
    pytest.importorskip("peft")
    policy, plain = load_policy(folder), load_policy(folder)
    first = plain.logits(images(2), SENTENCES[:2])
    policy.add_lora(4, vision=vision)
    assert torch.equal(policy.logits(images(2), SENTENCES[:2]), first)  # the second matrices are zero
    names = [name for name, p in policy.named_parameters() if p.requires_grad]
    assert names and all(".lora_" in name for name in names)
    assert any("vision_backbone" in name for name in names) == vision
    assert not any("lm_head" in name or "embed_tokens" in name for name in names)
    with pytest.raises(InvalidOptionError, match="has LoRA adapters already"):
        policy.add_lora()
    train(policy)
    trained = policy.logits(images(2), SENTENCES[:2])
    assert (trained - first).abs().max() > 0.05

    policy.save_pretrained(tmp_path / "merged")
    merged = load_policy(tmp_path / "merged")
    torch.testing.assert_close(merged.logits(images(2), SENTENCES[:2]), trained, atol=1e-4, rtol=1e-4)
    assert not any("lora" in name for name in load_file(tmp_path / "merged" / "model.safetensors"))
    assert torch.equal(policy.logits(images(2), SENTENCES[:2]), trained)  # the export left it unmerged
    policy.save_adapters(tmp_path / "adapters")
    plain.load_adapters(tmp_path / "adapters")
    torch.testing.assert_close(plain.logits(images(2), SENTENCES[:2]), trained, atol=1e-6, rtol=0)
    raw = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    assert raw["peft_type"] == "LORA" and raw["r"] == 4
    stored = load_file(tmp_path / "adapters" / "adapter_model.safetensors")
    assert all(
        name.startswith("base_model.model.") and name.endswith((".lora_A.weight", ".lora_B.weight")) for name in stored
    )


def test_peft_loads_saved_adapters(folder: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    policy = load_policy(folder)
    policy.add_lora(2)
    train(policy)
    policy.save_adapters(tmp_path)
    theirs = peft.PeftModel.from_pretrained(load_policy(folder), tmp_path)
    ours = policy.logits(images(1), SENTENCES[:1])
    torch.testing.assert_close(theirs.base_model.model.logits(images(1), SENTENCES[:1]), ours, atol=1e-6, rtol=0)


def test_adapters_of_another_model_are_refused(policy: OpenVLAOFT, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    with pytest.raises(CheckpointError, match="adapter_config.json is missing"):
        policy.load_adapters(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2}')
    save_file({"base_model.model.layers.9.lora_A.weight": torch.ones(2, 2)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="adapts 1 layers that the policy has not, first layers.9"):
        policy.load_adapters(tmp_path)
    with pytest.raises(InvalidOptionError, match="no LoRA adapters to save"):
        policy.save_adapters(tmp_path)
