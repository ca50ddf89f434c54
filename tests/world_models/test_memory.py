"""Memory estimates against what is really allocated at tiny sizes, free memory, and refusals before anything is allocated."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import rawdream_env  # noqa: F401
from rawdream_env.errors import NotEnoughMemoryError
from rawdream_env.seeding import NoiseKey
from rawdream_env.world_models import memory
from rawdream_env.world_models.autoencoders import AutoencoderConfig, FrameCodec, PackedFrameAutoencoder
from rawdream_env.world_models.memory import free_memory, module_bytes, rollout_memory, training_memory
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
    head_blocks=1, arm_map_channels=384, warp_last_frame=True,
)  # fmt: skip


def codec_of(kind: str) -> FrameCodec:
    if kind == "packed":
        return PackedFrameAutoencoder(AutoencoderConfig(widths=(16, 16)))
    from diffusers import AutoencoderKLWan

    vae = WanVAE(AutoencoderKLWan(base_dim=4), 64)
    return vae if kind == "wan" else TinyDecoderCodec(vae, TinyDecoder(16, (8, 8, 8, 8)))


def build(arch: WanConfig, kind: str = "packed", context_cache: str = "step") -> WanWorldModel:
    settings = RolloutConfig(num_inference_steps=1) if arch.pose_dim else RolloutConfig(arm_map=None)
    return WanWorldModel(WanWorldModelTransformer(arch), codec_of(kind), settings, context_cache=context_cache)  # type: ignore[arg-type]


class PeakBytes(TorchDispatchMode):
    """The most bytes of new storages alive at once; ``existing`` tensors are not counted."""

    def __init__(self, existing: list[torch.Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: dict[int, Any] = {s._cdata: s for s in (x.untyped_storage() for x in existing)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor) and (storage := x.untyped_storage())._cdata not in self.known:
                self.follow(storage)
        return out

    def follow(self, storage: torch.UntypedStorage) -> None:
        name, size = storage._cdata, storage.nbytes()

        def gone(_: object) -> None:
            self.known.pop(name, None)
            self.live -= size

        self.known[name] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)


@pytest.mark.parametrize("arch", [WAN, STEM], ids=["wan", "stem"])
@pytest.mark.parametrize(
    ("kind", "cache", "at_once"),
    [("packed", "step", 0), ("packed", "rolling", 2), ("wan", "step", 0), ("wan", "step", 2), ("tiny", "none", 0)],
)
def test_a_step_stays_within_the_estimate(arch: WanConfig, kind: str, cache: str, at_once: int) -> None:
    """States are exact; what ``imagine`` allocates at most is at most the estimate, at least half of it."""
    rows, dtype = 6, torch.bfloat16
    model = build(arch, kind, cache).to("cpu", dtype)
    model.micro_batch_size = at_once
    weights = [x for m in (model.transformer, model.autoencoder) for x in (*m.parameters(), *m.buffers())]  # type: ignore[attr-defined]
    assert module_bytes((model.transformer, model.autoencoder), dtype) == sum(x.nbytes for x in weights)  # type: ignore[arg-type]
    frames, keys = torch.zeros(rows, *model.frame_shape, dtype=torch.uint8), [NoiseKey(i) for i in range(rows)]
    state = model.start(frames, keys, torch.zeros(rows, 7))
    actions = torch.zeros(rows, 8, 7)
    for _ in range(4):
        state, _ = model.imagine(state, actions)
    model.imagine(state, actions)  # fills the tables of noise levels
    states = [state.anchor, state.recent, state.conditions, state.arm_maps, state.pose, *state.cache]
    parts = rollout_memory(arch, model.autoencoder, rows, at_once or rows, dtype, model.context_cache)
    assert parts["states"] == 4 * sum(x.nbytes for x in states)
    streams = sum(x.nbytes for x in state.decoder)
    states += state.decoder
    assert parts["decoder streams"] == streams * 2 + (streams * at_once // rows)
    conditions, prompt = model._condition_cache._times.values(), model._condition_cache.prompt
    tables = [x for c in conditions for x in (c.vector, c.modulation)] + [x for p in prompt for x in p or ()]
    with torch.no_grad(), PeakBytes([*weights, *states, *tables, actions]) as counted:
        kept = model.imagine(state, actions)
        del kept
    used = counted.peak + sum(x.nbytes for x in states)
    assert used <= sum(parts.values()) <= 2 * used, (used, parts)


def test_training_memory_shrinks_with_every_option() -> None:
    arch = wan_config("wan2.1-1.3b")
    whole = sum(training_memory(arch, 4, 9).values())
    for option in ({"rows": 2}, {"checkpointing": True}, {"shards": 8}, {"offload": True}):
        assert sum(training_memory(**{"arch": arch, "rows": 4, "frames": 9, **option}).values()) < whole  # type: ignore[arg-type]


def test_an_environment_computes_as_many_rows_at_once_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
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
    need = [sum(rollout_memory(WAN, model.autoencoder, 6, n, torch.float32).values()) for n in (1, 2, 4, 6)]
    assert need[0] < need[1] < min(need[2:])
    free = min(need[2:]) - 1
    at_once, fewer = dream(6)
    assert at_once == 2 and torch.equal(all_rows, fewer)
    free = need[0] - 1
    with pytest.raises(
        NotEnoughMemoryError, match=r"Imagining 6 episodes, 1 at a time, needs .* use fewer environments"
    ):
        dream(6)
    free = min(need[2:]) - 1
    model.micro_batch_size = 4
    with pytest.raises(NotEnoughMemoryError, match="Imagining 6 episodes, 4 at a time, needs"):
        dream(6)


def test_the_old_name_of_micro_batch_size_still_works() -> None:
    with pytest.warns(DeprecationWarning, match="micro_batch_size"):
        envs = gym.make_vec("rawdream/PiperDream-v0", 1, judge="none", micro_batch=3)
    assert envs.unwrapped.world_model.micro_batch_size == 3
    envs.close()


def test_weights_that_do_not_fit_are_not_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(WAN)
    monkeypatch.setattr(memory, "free_memory", lambda device: 1000)
    with pytest.raises(NotEnoughMemoryError, match=r"The world model needs .* 0.00 GiB are free on meta; use dtype="):
        model.to("meta", torch.bfloat16)
    assert model.device.type == "cpu" and model.transformer.proj_out.weight.dtype == torch.float32
    assert issubclass(NotEnoughMemoryError, MemoryError)


def test_free_memory_of_the_host(tmp_path: Path) -> None:
    def write(name: str, text: str) -> None:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    assert memory.host_memory(tmp_path) == 2**63  # a system that says nothing
    write("proc/meminfo", "MemTotal: 900 kB\nMemAvailable:  500 kB\n")
    assert memory.host_memory(tmp_path) == 500 * 1024
    write("sys/fs/cgroup/memory.max", "max\n")
    write("sys/fs/cgroup/memory.current", "5\n")
    assert memory.host_memory(tmp_path) == 500 * 1024
    write("sys/fs/cgroup/memory.max", "300005\n")
    assert memory.host_memory(tmp_path) == 300_000
    write("sys/fs/cgroup/memory/memory.limit_in_bytes", "200007")
    write("sys/fs/cgroup/memory/memory.usage_in_bytes", "7")
    assert memory.host_memory(tmp_path) == 200_000
    assert 2**20 < free_memory("cpu") < 2**63
