"""Action tokens against numbers worked out by hand; the policy contract on TinyVLA; checkpoints."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from rawdream_env.errors import CheckpointError, InvalidActionError, InvalidOptionError
from rawdream_env.policies import action_tokens as at
from rawdream_env.policies import load_policy
from rawdream_env.policies.tiny_vla import TinyVLA, TinyVLAConfig
from rawdream_env.seeding import NoiseKey
from rawdream_env.types import Policy

SMALL = TinyVLAConfig(
    stem_channels=16, trunk_channels=24, trunk_blocks=1, width=32, heads=2, decoder_layers=1, bin_rank=16
)
SENTENCES = ["stack the blue block onto the red block", "place the pot on the stove", "lift the cup", "", "word " * 40]


@pytest.fixture(scope="module")
def policy() -> TinyVLA:
    return TinyVLA(SMALL, seed=3).eval()


def images(n: int, seed: int = 0, size: int = 64) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def keys(n: int) -> list[NoiseKey]:
    return [NoiseKey(seed=100 + i, chunk=i % 3) for i in range(n)]


# -- the token code ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("action", "digit"),
    # digitize over linspace(-1, 1, 256): -1 -> 1; 0 lies between edges 127 (-0.0039) and 128 -> 128; +1 -> 256.
    [
        (-1.0, 1),
        (-5.0, 1),
        (-0.9999, 1),
        (-1 + 2 / 255 + 1e-9, 2),
        (0.0, 128),
        (0.5, 192),
        (0.9999, 255),
        (1.0, 256),
        (7.0, 256),
    ],
)
def test_encode_matches_the_openvla_code(action: float, digit: int) -> None:
    token = int(at.encode(np.array([action]))[0])
    assert token == digit - 1
    assert at.to_lm_ids(np.array([token]))[0] == 32000 - digit
    assert at.from_lm_ids(np.array([32000 - digit]))[0] == token


def test_decode_matches_the_openvla_code() -> None:
    # OpenVLA: bin_centers[clip(32000 - id - 1, 0, 254)]; written out here from the ids.
    ids = np.arange(31744, 32000)
    edges = np.linspace(-1, 1, 256)
    expected = ((edges[1:] + edges[:-1]) / 2)[np.clip(32000 - ids - 1, 0, 254)]
    np.testing.assert_array_equal(at.decode(at.from_lm_ids(ids)), expected.astype(np.float32))
    assert at.decode(np.array([127]))[0] == 0.0
    assert at.decode(np.array([0]))[0] == pytest.approx(-1 + 1 / 255)
    assert at.decode(np.array([254]))[0] == at.decode(np.array([255]))[0] == pytest.approx(1 - 1 / 255)


def test_round_trip_and_torch_parity() -> None:
    values = np.random.default_rng(0).uniform(-1.2, 1.2, (50, 8, 7)).astype(np.float32)
    tokens = at.encode(values)
    assert tokens.dtype == np.int64
    assert np.abs(at.decode(tokens) - values.clip(-1, 1)).max() <= 1 / 255 + 1e-6
    torch.testing.assert_close(at.encode(torch.from_numpy(values)), torch.from_numpy(tokens))
    torch.testing.assert_close(at.decode(torch.from_numpy(tokens)), torch.from_numpy(at.decode(tokens)))
    centres = at.decode(np.arange(255))
    np.testing.assert_array_equal(at.encode(centres), np.arange(255))


def test_encode_refuses_nan() -> None:
    with pytest.raises(InvalidActionError, match="2 of 3 action values"):
        at.encode(np.array([0.0, np.nan, np.inf]))


def test_lm_columns_come_out_in_token_order() -> None:
    logits = torch.arange(32064.0).repeat(2, 1)
    columns = at.lm_logits_to_token_logits(logits)
    assert columns.shape == (2, 256)
    assert columns[0, 0] == 31999 and columns[0, 255] == 31744
    with pytest.raises(InvalidOptionError, match="got 256"):
        at.lm_logits_to_token_logits(columns)


def test_logprobs_and_entropy_by_hand() -> None:
    logits = torch.full((1, 1, 256), -1e9)
    logits[0, 0, 10], logits[0, 0, 20] = math.log(3.0), 0.0  # probabilities 3/4, 1/4
    tokens = torch.tensor([[10]])
    assert at.token_logprobs(logits, tokens, 1.0).item() == pytest.approx(math.log(0.75))
    # T = 2: sqrt(3) : 1
    assert at.token_logprobs(logits, tokens, 2.0).item() == pytest.approx(math.log(3**0.5 / (3**0.5 + 1)))
    assert at.token_logprobs(logits, tokens, 0.0).item() == pytest.approx(math.log(0.75))
    hand = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert at.token_entropy(logits, 1.0).item() == pytest.approx(hand, rel=1e-5)
    assert at.token_entropy(torch.zeros(1, 1, 256), 1.6).item() == pytest.approx(math.log(256), rel=1e-6)
    with pytest.raises(InvalidOptionError, match="-0.5"):
        at.token_entropy(logits, -0.5)


def test_sampling_follows_the_distribution_and_the_key() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.2])
    logits = torch.full((1, 4000, 256), -30.0)
    logits[..., [5, 100, 255]] = probabilities.log()
    tokens = at.sample_tokens(logits, 1.0, [NoiseKey(1)])
    for token, p in zip((5, 100, 255), probabilities, strict=True):
        assert (tokens == token).float().mean().item() == pytest.approx(p.item(), abs=0.03)
    assert torch.equal(tokens, at.sample_tokens(logits, 1.0, [NoiseKey(1)]))
    assert not torch.equal(tokens, at.sample_tokens(logits, 1.0, [NoiseKey(1, draw=1)]))
    assert (at.sample_tokens(logits, 0.0, [NoiseKey(1)]) == 5).all()
    with pytest.raises(InvalidOptionError, match="2 noise keys for 1 rows"):
        at.sample_tokens(logits, 1.0, keys(2))


def test_smoothed_targets() -> None:
    soft = at.smoothed_targets(torch.tensor([0, 127, 255]), 2.0)
    torch.testing.assert_close(soft.sum(-1), torch.ones(3))
    assert soft.argmax(-1).tolist() == [0, 127, 255]
    assert soft[1, 129] / soft[1, 127] == pytest.approx(math.exp(-0.5), rel=1e-5)
    assert torch.equal(at.smoothed_targets(torch.tensor([7]), 0.0).argmax(-1), torch.tensor([7]))


# -- TinyVLA -------------------------------------------------------------------------------------------------------


def test_act_contract(policy: TinyVLA) -> None:
    assert isinstance(policy, Policy)
    output = policy.act(images(5), SENTENCES, temperature=1.0, keys=keys(5))
    assert output.actions.shape == (5, 8, 7) and output.actions.dtype == torch.float32
    assert output.tokens.shape == output.logprobs.shape == (5, 56)
    assert output.tokens.dtype == torch.int64 and output.logprobs.dtype == torch.float32
    assert output.actions.abs().max() <= 1 and (output.logprobs <= 0).all()
    torch.testing.assert_close(at.decode(output.tokens).view(5, 8, 7), output.actions)
    assert torch.isfinite(output.logprobs).all()
    assert policy.act(images(0), [], temperature=1.0, keys=[]).actions.shape == (0, 8, 7)


@pytest.mark.parametrize("temperature", [0.0, 1.0, 1.6])
def test_rows_do_not_depend_on_their_batch(temperature: float) -> None:
    policy = TinyVLA(seed=1).eval()  # full size: kernels are chosen by shape
    n = 11
    sentences = [SENTENCES[i % len(SENTENCES)] for i in range(n)]
    whole = policy.act(images(n), sentences, temperature=temperature, keys=keys(n))
    order = np.random.default_rng(5).permutation(n)
    shuffled = policy.act(
        images(n)[order], [sentences[i] for i in order], temperature=temperature, keys=[keys(n)[i] for i in order]
    )
    assert torch.equal(whole.logprobs[order], shuffled.logprobs)
    for rows in ([7], [10, 3], list(range(9))):
        part = policy.act(
            torch.from_numpy(images(n))[rows],
            [sentences[i] for i in rows],
            temperature=temperature,
            keys=[keys(n)[i] for i in rows],
        )
        assert torch.equal(part.tokens, whole.tokens[rows]) and torch.equal(part.logprobs, whole.logprobs[rows])


def test_recomputed_logprobs_match_and_carry_gradients(policy: TinyVLA) -> None:
    output = policy.act(images(5), SENTENCES, temperature=1.6, keys=keys(5))
    logprobs, entropy = policy.logprobs_and_entropy(images(5), SENTENCES, output.tokens, temperature=1.6)
    assert (logprobs - output.logprobs).exp().sub(1).abs().max() < 1e-5  # the ratio before the first update
    torch.testing.assert_close(policy.logprobs(images(5), SENTENCES, output.tokens, temperature=1.6), logprobs)
    torch.testing.assert_close(policy.entropy(images(5), SENTENCES, temperature=1.6), entropy.detach())
    assert entropy.min() > 0 and entropy.max() <= math.log(256) + 1e-4
    logprobs.sum().backward()
    missing = [name for name, p in policy.named_parameters() if p.grad is None]
    assert missing == ["auxiliary_head.weight", "auxiliary_head.bias"]  # read-out: training only
    policy.zero_grad()


def test_policy_sees_image_and_sentence(policy: TinyVLA) -> None:
    base = policy.logits(images(1), SENTENCES[:1])
    assert not torch.allclose(base, policy.logits(images(1, seed=9), SENTENCES[:1]), atol=1e-4)
    assert not torch.allclose(base, policy.logits(images(1), SENTENCES[1:2]), atol=1e-4)
    swapped = ["stack the red block onto the blue block"]
    assert not torch.allclose(base, policy.logits(images(1), swapped), atol=1e-5), "word order must matter"


def test_wrong_inputs_are_named(policy: TinyVLA) -> None:
    with pytest.raises(InvalidOptionError, match=r"uint8 \(2, 32, 32, 3\), expected uint8 \(2, 64, 64, 3\)"):
        policy.act(images(2, size=32), SENTENCES[:2], temperature=1.0, keys=keys(2))
    with pytest.raises(InvalidOptionError, match="float64"):
        policy.act(images(1) / 255.0, SENTENCES[:1], temperature=1.0, keys=keys(1))
    with pytest.raises(InvalidOptionError, match=r"\(1, 8\), expected \(1, 56\)"):
        policy.logprobs(images(1), SENTENCES[:1], torch.zeros(1, 8, dtype=torch.long), temperature=1.0)
    with pytest.raises(InvalidOptionError, match="width 30"):
        TinyVLAConfig(width=30, heads=4)


def test_construction_is_seeded_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    a, b, c = TinyVLA(SMALL, seed=1), TinyVLA(SMALL, seed=1), TinyVLA(SMALL, seed=2)
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(a.stem.weight, b.stem.weight) and not torch.equal(a.stem.weight, c.stem.weight)


def test_save_and_load(policy: TinyVLA, tmp_path: Path) -> None:
    policy.save_pretrained(tmp_path, metadata={"steps": 5})
    loaded = load_policy(tmp_path)
    assert isinstance(loaded, TinyVLA) and not loaded.training
    a = policy.act(images(2), SENTENCES[:2], temperature=1.0, keys=keys(2))
    b = loaded.act(images(2), SENTENCES[:2], temperature=1.0, keys=keys(2))
    assert torch.equal(a.tokens, b.tokens) and torch.equal(a.logprobs, b.logprobs)
    assert load_policy(loaded) is loaded


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "config.json").unlink(), "config.json is missing"),
        (lambda p: (p / "config.json").write_text("{"), "cannot be read as JSON"),
        (lambda p: (p / "config.json").write_text('{"kind": "judge"}'), "'judge', not 'tiny_vla'"),
        (lambda p: edit(p, width=64), "has shape"),
        (lambda p: edit(p, trunk_blocks=2), "missing"),
        (lambda p: edit(p, width="32"), "expected integers"),
        (lambda p: edit(p, surprise=1), "surprise"),
        (lambda p: edit(p, heads=5), "width 32 is not divisible"),
        (lambda p: (p / "model.safetensors").write_bytes(b"\x00" * 40), "model.safetensors"),
        (lambda p: poison(p), "model.safetensors"),
    ],
)
def test_damaged_checkpoints_are_refused(policy: TinyVLA, tmp_path: Path, damage: object, message: str) -> None:
    policy.save_pretrained(tmp_path)
    damage(tmp_path)  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=message):
        load_policy(tmp_path)


def edit(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def poison(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["stem.bias"][0] = float("nan")
    save_file(tensors, folder / "model.safetensors")


def test_unknown_specs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="config.json is missing"):
        load_policy(tmp_path / "nothing")
    with pytest.raises(InvalidOptionError, match="int is not a policy: it lacks"):
        load_policy(3)  # type: ignore[arg-type]


def test_package_import_is_light() -> None:
    code = "import sys, rawdream_env.policies; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
