"""The benchmarks' own parts: operation counts, timing, and the GPU script at its tiny size on a CPU."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import exact_trims, gpu, gpu_rows, refill
from benchmarks.device import counting_syncs, hardware, matmul_rate, peak_memory, timed
from benchmarks.gpu_models import FULL
from rawdream_env.errors import NotEnoughMemoryError
from rawdream_env.seeding import NoiseKey
from rawdream_env.trainers.grpo.plan_costs import dream_cost
from rawdream_env.world_models import flops
from rawdream_env.world_models.autoencoders import AutoencoderConfig, PackedFrameAutoencoder
from rawdream_env.world_models.wan.config import WanConfig, wan_config
from rawdream_env.world_models.wan.rollout import RolloutConfig, WanWorldModel
from rawdream_env.world_models.wan.transformer import WanWorldModelTransformer

WAN = WanConfig(
    num_layers=3, num_attention_heads=2, attention_head_dim=24, ffn_dim=64, text_dim=16, text_rows=2, pose_dim=0,
    stem_channels=0, residual=False,
)  # fmt: skip


@pytest.mark.parametrize("reuse", ["step", "none", "rolling"])
def test_flops_from_shapes_equal_those_counted(reuse: str) -> None:
    codec = PackedFrameAutoencoder(AutoencoderConfig(widths=(8, 8)))
    rollout = RolloutConfig(num_inference_steps=3, arm_map=None, anchor_noise_step=0.0)
    model = WanWorldModel(WanWorldModelTransformer(WAN), codec, rollout, context_cache=reuse)  # type: ignore[arg-type]
    model.to("cpu", torch.bfloat16)
    state = model.start(torch.zeros(2, 64, 64, 3, dtype=torch.uint8), [NoiseKey(0), NoiseKey(1)])
    for _ in range(4):  # the context is full, constants are in their tables
        state, _ = model.imagine(state, torch.zeros(2, 8, 7))
    row = state[:1]
    found = flops.counted(lambda: model._denoise(row, row.conditions[:, -2:], row.arm_maps[:, -2:], 6))
    assert found == flops.denoiser_flops(WAN, 3, reuse, dense=True)
    two = flops.counted(lambda: model._denoise(state, state.conditions[:, -2:], state.arm_maps[:, -2:], 6))
    assert two == 2 * flops.denoiser_flops(WAN, 3, reuse, dense=True, shared=1 if reuse == "none" else 2)


def test_flops_of_the_full_size() -> None:
    """Attention over masked pairs and over all 512 rows of the prompt costs 34.8 and 12.7 TFLOP; without, less."""
    arch = wan_config("wan2.1-1.3b")
    for reuse, expected, trimmed in (
        ("none", 34.8e12, 28.3e12),
        ("step", 12.7e12, 10.9e12),
        ("rolling", 9.8e12, 8.5e12),
    ):
        whole = flops.denoiser_flops(replace(arch, text_rows=512), 5, reuse, dense=True)
        assert whole == pytest.approx(expected, rel=0.02), reuse
        assert flops.denoiser_flops(arch, 5, reuse) == pytest.approx(trimmed, rel=0.02), reuse
    planned = dream_cost("wan2.1-1.3b", torch.bfloat16)
    assert planned is not None
    # Wan's decoder per latent frame: 3x3x3 layers of 384 channels at 32 x 32 (10) and 64 x 64 (5.5 in 2 frames), of 192 at
    # 128 x 128 (6 in 4), of 96 at 256 x 256 (6 in 4), and the layers that double height and width or the frame rate.
    layers = 27 * 2 * (384**2 * 1024 * (10 + 5.5 * 8) + 192**2 * 65536 * 6 + 96**2 * 262144 * 6)
    upsampling = 9 * 2 * (384 * 192 * (8192 + 65536) + 192 * 96 * 262144) + 6 * 384 * 768 * (1024 + 8192)
    assert flops.decode_flops(planned.codec) == pytest.approx(2 * (layers + upsampling), rel=0.01)
    assert flops.decode_flops(planned.codec) == pytest.approx(4.43e12, rel=0.001)
    assert planned.chunk == pytest.approx(12.1e12 + 4.43e12, rel=0.002)  # with the empty prompt of two different rows
    with pytest.raises(ValueError, match="without a convolutional stem"):
        flops.denoiser_flops(wan_config("embedded"), 5)


def test_timing_on_a_cpu() -> None:
    calls: list[str] = []
    times = timed({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, "cpu")
    assert calls[2:8] == ["a", "b", "b", "a", "a", "b"]
    assert len(times["a"].seconds) == 7
    with pytest.raises(TimeoutError, match="7 rounds take"):
        timed({"a": lambda: sum(range(10**5))}, "cpu", budget=lambda: 0.0)
    with pytest.raises(ValueError, match="3 rounds"):
        timed({}, "cpu", rounds=3)
    assert peak_memory(lambda: None, "cpu") is None
    with counting_syncs("cpu") as places:
        pass
    assert places == [] and hardware("cpu")["name"]
    assert matmul_rate(64, torch.float32) > 1e6


@pytest.mark.slow
def test_gpu_script_runs_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "gpu.json"
    assert gpu.main(["--tiny", "--device", "cpu", "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert found["size"] == "tiny" and found["hardware"]["name"]
    assert {name: row["status"] for name, row in found["rows"].items()} == dict.fromkeys(gpu_rows.ROWS, "done")
    numbers = {name: row["numbers"] for name, row in found["rows"].items()}
    assert {"B=1", "B=2"} <= set(numbers["exact"])
    assert all(row["frames_per_s"] > 0 for row in numbers["options"].values())
    assert numbers["naive"]["relative_difference"] < 0.02
    assert numbers["decode"]["largest_difference"] <= 2
    step = numbers["openvla"]["step"]
    assert step["acted_chunks"] >= step["kept_chunks"] > 0 and min(step["seconds"].values()) > 0
    assert numbers["openvla"]["act"]["tokens_per_s"] == pytest.approx(56 * numbers["openvla"]["act"]["chunks_per_s"])
    measured = [goal["goal"] for goal in found["goals"] if goal["found"] is not None]
    assert len(measured) == 6 and not any(goal["met"] for goal in found["goals"])  # B=8, B=64, waiting for a GPU: not
    assert "not judged at this size" in capsys.readouterr().out


def test_gpu_rows_say_why_they_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = gpu_rows.Bench(FULL, "cpu", time.monotonic() + 5)
    assert bench.run("exact") == {"status": "skipped", "reason": "needs 60 s, 5 s are left", "seconds": 0.0}

    def raises(error: Exception) -> object:
        def row(bench: gpu_rows.Bench) -> gpu_rows.Found:
            raise error

        return row

    for error, status in (
        (NotEnoughMemoryError("full"), "skipped"),
        (TimeoutError(), "skipped"),
        (KeyError(1), "failed"),
    ):
        monkeypatch.setitem(gpu_rows.ROWS, "exact", (raises(error), 0.0))
        assert bench.run("exact")["status"] == status
    if not torch.cuda.is_available():
        assert gpu.main([]) == 2
    missed = gpu.goals({"decode": {"numbers": {"ratio": {"median": 3.0}}}})
    assert [goal["met"] for goal in missed if goal["found"] is not None] == [False]


def test_refilled_slots_leave_episodes_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refill, "LENGTHS", (3, 1, 2))
    monkeypatch.setattr(refill, "SLOTS", 3)
    episodes = refill.Episodes(exact_trims.build(layers=1), 2)
    lockstep, steps = episodes.lockstep(), episodes.steps
    refilled = episodes.refilled()
    assert (steps, episodes.steps - steps) == (18, 12)
    assert all(torch.equal(lockstep[i], refilled[i]) for i in range(6))
