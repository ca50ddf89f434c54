"""Memory estimates against what is really allocated at tiny sizes, free memory, and the ladder of presets."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rawdream_env.errors import NotEnoughMemoryError
from rawdream_env.seeding import NoiseKey
from rawdream_env.world_models import memory, memory_estimates
from rawdream_env.world_models.autoencoders import AutoencoderConfig, FrameCodec, PackedFrameAutoencoder
from rawdream_env.world_models.memory import GIB, choose_preset, free_memory, memory_presets, require_memory
from rawdream_env.world_models.memory_estimates import rollout_memory, training_memory
from rawdream_env.world_models.wan.attention import frame_mask, rope_tables
from rawdream_env.world_models.wan.config import WanConfig, wan_config
from rawdream_env.world_models.wan.rollout import RolloutConfig, WanWorldModel
from rawdream_env.world_models.wan.tiny_decoder import TinyDecoder, TinyDecoderCodec
from rawdream_env.world_models.wan.transformer import WanWorldModelTransformer
from rawdream_env.world_models.wan.vae import WanVAE

WAN = WanConfig(
    latent_shape=(16, 8, 8), num_layers=3, num_attention_heads=2, attention_head_dim=24, ffn_dim=192, text_dim=16,
    text_rows=2, pose_dim=0, stem_channels=0, residual=False,
)  # fmt: skip
STEM = WanConfig(
    num_layers=2, num_attention_heads=2, attention_head_dim=24, ffn_dim=64, stem_channels=16, stem_blocks=1,
    head_blocks=1, arm_map_channels=384, carry=True,
)  # fmt: skip


def codec_of(kind: str) -> FrameCodec:
    if kind == "packed":
        return PackedFrameAutoencoder(AutoencoderConfig(widths=(16, 16)))
    from diffusers import AutoencoderKLWan

    vae = WanVAE(AutoencoderKLWan(base_dim=4), 64)
    return vae if kind == "wan" else TinyDecoderCodec(vae, TinyDecoder(16, (8, 8, 8, 8)))


def build(arch: WanConfig, kind: str = "packed", reuse: str = "step") -> WanWorldModel:
    settings = RolloutConfig(num_inference_steps=1) if arch.pose_dim else RolloutConfig(arm_map=None)
    return WanWorldModel(WanWorldModelTransformer(arch), codec_of(kind), settings, reuse=reuse)  # type: ignore[arg-type]


def total(tensors: object) -> int:
    return sum(x.nbytes for x in tensors)  # type: ignore[attr-defined]


@pytest.mark.parametrize("arch", [WAN, STEM], ids=["wan", "stem"])
@pytest.mark.parametrize("kind", ["packed", "wan", "tiny"])
def test_weights_states_and_caches_are_exact(arch: WanConfig, kind: str) -> None:
    rows, dtype = 3, torch.bfloat16
    model = build(arch, kind, "rolling").to("cpu", dtype)
    parts = rollout_memory(arch, model.autoencoder, rows, dtype, "rolling").parts
    weights = [x for m in (model.transformer, model.autoencoder) for x in (*m.parameters(), *m.buffers())]  # type: ignore[attr-defined]
    assert parts["weights"] == total(weights)
    frames = torch.zeros(rows, *model.frame_shape, dtype=torch.uint8)
    state = model.start(frames, [NoiseKey(i) for i in range(rows)], torch.zeros(rows, 7))
    state, _ = model.imagine(state, torch.zeros(rows, 8, 7))
    assert parts["states"] == 3 * total([state.anchor, state.recent, state.conditions, state.arm_maps, state.pose])
    assert parts["decoder streams"] == 2 * total(state.decoder)
    assert parts["rolling caches"] == 3 * total(state.cache)


@pytest.mark.parametrize("arch", [WAN, STEM], ids=["wan", "stem"])
@pytest.mark.parametrize("reuse", ["step", "none", "rolling"])
def test_denoising_stays_within_the_estimate(arch: WanConfig, reuse: str) -> None:
    """Bytes alive at once while a full context is denoised; what depends on no row (masks, positions) is little."""
    model = build(arch, reuse=reuse).to("cpu", torch.bfloat16)
    rows = 4
    state = model.start(
        torch.zeros(rows, 64, 64, 3, dtype=torch.uint8), [NoiseKey(i) for i in range(rows)], torch.zeros(rows, 7)
    )
    for _ in range(4):
        state, _ = model.imagine(state, torch.zeros(rows, 8, 7))
    conditions, maps = state.conditions[:, -2:].clone(), state.arm_maps[:, -2:].clone()
    model._denoise(state, conditions, maps, 6)  # fills the tables of constants
    constants = [x for c in model._condition_cache._times.values() for x in (c.vector, c.modulation)]
    prompt = [x for keys in model._condition_cache.prompt for x in (keys if isinstance(keys, tuple) else [])]
    existing = [*model.transformer.parameters(), *model.transformer.buffers(), *constants, *prompt, conditions, maps]
    existing += [state.anchor, state.recent, state.conditions, state.arm_maps, state.pose, *state.cache]
    used = memory_estimates.peak_bytes(lambda: model._denoise(state, conditions, maps, 6), existing) / rows
    estimate = memory_estimates.denoise_bytes(arch, torch.bfloat16, model.reuse)
    assert used / 1.15 <= estimate <= 2.5 * used, (used, estimate)


@pytest.mark.parametrize("micro_batch", [0, 2])
def test_a_whole_step_stays_within_the_estimate(micro_batch: int) -> None:
    """With a decoder that remembers: what ``imagine`` allocates beside the state it is given."""
    model, rows = build(WAN, "wan").to("cpu", torch.bfloat16), 8
    model.micro_batch = micro_batch
    state = model.start(torch.zeros(rows, 64, 64, 3, dtype=torch.uint8), [NoiseKey(i) for i in range(rows)])
    for _ in range(4):
        state, _ = model.imagine(state, torch.zeros(rows, 8, 7))
    old = [state.anchor, state.recent, state.conditions, state.arm_maps, state.pose, *state.decoder]
    weights = [x for m in (model.transformer, model.autoencoder) for x in (*m.parameters(), *m.buffers())]  # type: ignore[attr-defined]
    actions = torch.zeros(rows, 8, 7)
    used = memory_estimates.peak_bytes(lambda: model.imagine(state, actions), [*weights, *old, actions]) + total(old)
    parts = rollout_memory(WAN, model.autoencoder, rows, torch.bfloat16, micro_batch=micro_batch or None).parts
    estimate = sum(parts.values()) - parts["weights"] - parts["headroom"]
    assert used <= (1 + memory_estimates.HEADROOM) * estimate <= 1.7 * used, (used, estimate)


def test_peak_counts_what_lives_at_once() -> None:
    def work() -> torch.Tensor:
        a = torch.zeros(1000)
        b = a + 1
        del a
        return (b + 1).view(10, 100)

    assert memory_estimates.peak_bytes(work) == 8000


def test_training_activations_within_the_estimate() -> None:
    """What autograd saves in one block under autocast, parameters aside."""
    torch.manual_seed(0)
    arch = wan_config("wan2.1-1.3b")
    small = WanConfig(**{**vars(arch), "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 32,
                         "ffn_dim": 373, "text_dim": 16, "text_rows": 1, "latent_shape": (16, 8, 8)})  # fmt: skip
    model = WanWorldModelTransformer(small)
    owned = {p.untyped_storage()._cdata for p in model.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in owned:
            saved[storage._cdata] = storage
        return x

    x = torch.randn(4, 9, 16, 64, requires_grad=True)
    rope = rope_tables(torch.arange(9), small.grid, 32)
    mask = frame_mask(torch.ones(9, 9, dtype=torch.bool).tril(), 16, x.device)
    modulation = torch.randn(4, 9, 6, 64)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), torch.autocast("cpu", torch.bfloat16):
        model.blocks[0](x, modulation, rope, mask, None, model.prompt_keys()[0])
    weights = sum(p.numel() for p in model.blocks[0].parameters()) * 2  # autocast's copies
    used = (sum(s.nbytes() for s in saved.values()) - weights) / (4 * 9 * 16)
    assert used / 1.15 <= memory_estimates.saved_per_token(small) <= 1.6 * used, used


def test_full_size_is_what_the_tables_say() -> None:
    arch = wan_config("wan2.1-1.3b")
    parts = rollout_memory(arch, num_envs=4).parts
    assert parts["decoder streams"] / 8 == pytest.approx(310e6, rel=0.01)
    assert 7 * memory_estimates.frame_keys_bytes(arch, torch.bfloat16) == pytest.approx(330e6, rel=0.01)
    assert 330e6 < memory_estimates.denoise_bytes(arch, torch.bfloat16) < 450e6
    assert rollout_memory(arch, num_envs=64, micro_batch=8).total < rollout_memory(arch, num_envs=64).total


def test_training_memory_shrinks_with_every_lever() -> None:
    arch = wan_config("wan2.1-1.3b")
    whole = training_memory(arch, 4, checkpointing=False).total
    levers = [
        training_memory(arch, 2, checkpointing=False),
        training_memory(arch, 4, checkpointing=True),
        training_memory(arch, 4, world_size=8, checkpointing=False),
        training_memory(arch, 4, optimizer="adamw8bit", checkpointing=False),
        training_memory(arch, 4, checkpointing=False, offload_optimizer=True),
    ]
    assert all(estimate.total < whole for estimate in levers)


def test_presets_climb_and_fit() -> None:
    presets = memory_presets()
    assert [p.total_gib for p in presets] == [24, 48, 80, 141]
    assert sorted(p.num_envs for p in presets) == [p.num_envs for p in presets]
    for preset in presets:
        assert preset.needed_bytes <= memory.USABLE * preset.total_gib * GIB
        assert preset.num_envs % preset.micro_batch == 0
        assert choose_preset(int(0.97 * preset.total_gib * GIB)) == preset
    with pytest.raises(NotEnoughMemoryError, match=r"8.00 GiB are free, but the smallest preset, '24gb'"):
        choose_preset(8 * GIB)


def test_the_table_of_the_documentation_is_the_estimated_one() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "world_model.md").read_text(encoding="utf-8")
    for line in memory.preset_table().splitlines()[2:]:
        assert line in page, line


def test_what_does_not_fit_is_refused_with_the_numbers() -> None:
    arch = wan_config("wan2.1-1.3b")
    estimate = rollout_memory(arch, num_envs=64)
    require_memory(estimate, estimate.total, "64 environments")
    for wanted, advice in ((estimate, "fewer environments"), (training_memory(arch, 12, checkpointing=False), "check")):
        with pytest.raises(NotEnoughMemoryError, match=r"needs \d+\.\d\d GiB \(weights .* but 20.00 GiB .*" + advice):
            require_memory(wanted, 20 * GIB, "this")
    assert set(memory._ADVICE) | {"headroom"} == set(estimate.parts) | set(training_memory(arch).parts)
    assert issubclass(NotEnoughMemoryError, MemoryError)


def test_an_environment_computes_as_many_rows_at_once_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    import gymnasium as gym

    import rawdream_env  # noqa: F401

    model = build(WAN, "wan")
    free = 2**40
    monkeypatch.setattr(memory, "free_memory", lambda device: free)

    def dream(num_envs: int) -> tuple[int, torch.Tensor]:
        envs = gym.make_vec(
            "rawdream/Dream-v0", num_envs, world_model=model, starts="null", judge="none", output="torch",
            max_episode_steps=3,
        )  # fmt: skip
        envs.reset(seed=0)
        envs.action_space.seed(0)
        actions = envs.action_space.sample()
        pictures = [envs.step(actions)[0]["image"] for _ in range(2)]
        return model._fitting, torch.stack(pictures)

    at_once, all_rows = dream(6)
    assert at_once == 0
    need = [rollout_memory(WAN, model.autoencoder, 6, torch.float32, micro_batch=n).without("weights", "headroom").total
            for n in (1, 2, 4, 6)]  # fmt: skip
    assert need[0] < need[1] < min(need[2:])
    free = min(need[2:]) - 1
    at_once, fewer = dream(6)
    assert at_once == 2 and torch.equal(all_rows, fewer)
    free = need[0] - 1
    with pytest.raises(
        NotEnoughMemoryError, match=r"Imagining 6 episodes, 1 at a time, needs .* take fewer environments"
    ):
        dream(6)
    free = min(need[2:]) - 1
    model.micro_batch = 4
    with pytest.raises(NotEnoughMemoryError, match="Imagining 6 episodes, 4 at a time, needs"):
        dream(6)


def test_weights_that_do_not_fit_are_not_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(WAN)
    monkeypatch.setattr(memory, "free_memory", lambda device: 1000)
    with pytest.raises(NotEnoughMemoryError, match=r"The world model needs .* most of it is weights: use bfloat16"):
        model.to("meta", torch.bfloat16)
    assert model.device.type == "cpu" and model.transformer.proj_out.weight.dtype == torch.float32


def test_free_memory_of_the_host(tmp_path: Path) -> None:
    def write(name: str, text: str) -> None:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    assert memory.host_memory(tmp_path) == 2**63  # a system that says nothing
    write("proc/meminfo", "MemTotal: 900 kB\nMemAvailable:  500 kB\n")
    assert memory.host_memory(tmp_path) == 500 * 1024
    write("proc/self/cgroup", "0::/job\n")
    write("sys/fs/cgroup/job/memory.max", "max\n")
    write("sys/fs/cgroup/job/memory.current", "5\n")
    assert memory.host_memory(tmp_path) == 500 * 1024
    write("sys/fs/cgroup/job/memory.max", "300005\n")
    assert memory.host_memory(tmp_path) == 300_000
    write("proc/self/cgroup", "9:cpu:/other\n4:memory:/job\n")
    write("sys/fs/cgroup/memory/job/memory.limit_in_bytes", "200007")
    write("sys/fs/cgroup/memory/job/memory.usage_in_bytes", "7")
    assert memory.host_memory(tmp_path) == 200_000
    assert 2**20 < free_memory("cpu") < 2**63
