"""The row of ``benchmarks.gpu`` for OpenVLA-OFT: acting, and a GRPO step in the world model, on one card with random weights.

The policy has bfloat16 weights created on the device, LoRA adapters and gradient checkpointing; the world model is the eager
one that training uses. A judge that answers at once stands for the reward. The step is short (``chunks`` per episode): times
are also given per chunk. Estimates are those of ``rawdream plan``.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from benchmarks.device import NOMINAL, peak_memory, synchronize
from benchmarks.gpu_models import world_model

if TYPE_CHECKING:
    from benchmarks.gpu_rows import Bench, Found

INSTRUCTION = "put the red block that lies on the left into the pot"


@dataclass(frozen=True)
class Sizes:
    """The episodes of the step, all running at once."""

    lora_rank: int
    groups: int
    group_size: int
    chunks: int
    microbatch: int


SIZES = {"full": Sizes(32, 2, 8, 8, 16), "tiny": Sizes(4, 1, 4, 2, 3)}


class _Words:
    """A stand-in for Llama's tokenizer: an id per word."""

    def encode(self, text: str, add_special_tokens: bool = False) -> Any:
        """``ids`` of the words."""
        return SimpleNamespace(ids=[1000 + len(word) for word in text.split()])


class _Timed:
    """A function that adds up the seconds spent in it."""

    def __init__(self, function: Callable[..., Any], device: str) -> None:
        self.function, self.device, self.seconds = function, device, 0.0

    def __call__(self, *args: Any, **options: Any) -> Any:
        synchronize(self.device)
        begin = time.monotonic()
        found = self.function(*args, **options)
        synchronize(self.device)
        self.seconds += time.monotonic() - begin
        return found


def policy_config(size: str) -> Any:
    """OpenVLA-7B's sizes, or those of the tests' policy."""
    from rawdream_env.policies.openvla_oft.config import OpenVLAOFTConfig
    from rawdream_env.policies.openvla_oft.vision import DINOV2_L, SIGLIP_SO400M
    from rawdream_env.testing.openvla_oft import TINY

    return OpenVLAOFTConfig(DINOV2_L, SIGLIP_SO400M) if size == "full" else TINY


def random_policy(config: Any, device: str, dtype: Any, lora_rank: int) -> Any:
    """OpenVLA-OFT with adapters and gradient checkpointing. No weight exists in another precision or on the host."""
    import torch

    from rawdream_env.policies.openvla_oft.policy import OpenVLAOFT
    from rawdream_env.testing.openvla_oft import IDENTITY

    with torch.device("meta"):
        policy: Any = OpenVLAOFT(config, _Words(), {"any": {"action": IDENTITY}})
    policy.to(dtype).to_empty(device=device)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.02)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    policy.language_model.rebuild_rotary(torch.device(device))
    policy.add_lora(lora_rank)
    policy.enable_gradient_checkpointing()
    return policy.eval()


def openvla(bench: Bench) -> Found:
    """Acting (chunks/s, tokens/s, share of the roofline), and the phases and memory of a GRPO step."""
    import torch

    from rawdream_env.trainers.grpo.plan import PlanConfig, memory
    from rawdream_env.trainers.grpo.plan_costs import DreamCost, openvla_cost
    from rawdream_env.world_models.memory import GIB, module_bytes, needed_memory, require_memory

    sizes, config = SIZES[bench.size.name], policy_config(bench.size.name)
    cost, models = openvla_cost(config, sizes.lora_rank, bench.dtype), (bench.transformer, bench.codec)
    dream = DreamCost(bench.size.arch, bench.codec, 0, module_bytes(models, bench.dtype), 0.0)
    episodes = sizes.groups * sizes.group_size
    options = PlanConfig(gradient_checkpointing=True, microbatch_size=sizes.microbatch, num_envs=episodes)
    parts = max(memory(options, cost, dream), key=lambda found: sum(found.values()))
    new = {name: size for name, size in parts.items() if name != "world model"}  # that one is there already
    require_memory(new, bench.device, "a GRPO step of OpenVLA-OFT", "use a card with more")
    cuda = bench.device.startswith("cuda")
    others = (torch.cuda.memory_allocated(bench.device) if cuda else 0) - dream.weight_bytes  # models of other rows
    policy = random_policy(config, bench.device, bench.dtype, sizes.lora_rank)

    numbers: dict[str, Any] = {"act": acting(bench, policy, cost)}
    act = numbers["act"]
    lines = [
        f"{cost.weights / 1e9:.3g} G weights, {cost.trained / 1e6:.4g} M trained; {cost.act / 1e12:.3g} TFLOP to act a "
        f"chunk, {cost.train / 1e12:.3g} forward and backward",
        f"acting, {policy.act_batch} rows: {act['chunks_per_s']:.3g} chunks/s, {act['tokens_per_s']:.4g} tokens/s; "
        f"{100 * act['share_of_measured_peak']:.0f} % of the measured peak, {100 * act['share_of_nominal']:.0f} % of nominal; "
        f"the language model alone {act['language_chunks_per_s']:.3g} chunks/s",
    ]
    step = GRPOStep(bench, policy, sizes)
    begin = time.monotonic()
    step()  # kernels are chosen and compiled
    if (needed := 1.2 * (time.monotonic() - begin)) > bench.left():
        raise TimeoutError(f"{lines[1]}; a GRPO step takes {needed:.0f} s, {max(bench.left(), 0):.0f} s are left")
    used, phases = peak_memory(step, bench.device), step.phases
    step.close()
    per_chunk = cost.train + (2 if step.guarded else 1) * cost.forward  # once more by checkpointing, once by the guard
    rate = step.kept * per_chunk / phases["update"]
    numbers["step"] = {
        "seconds": phases,
        "acted_chunks": step.acted,
        "kept_chunks": step.kept,
        "updated_chunks_per_s": step.kept / phases["update"],
        "update_share_of_measured_peak": rate / bench.peak,
        "update_share_of_nominal": rate / NOMINAL,
        "peak_bytes": None if used is None else used - others,
        "estimated_bytes": needed_memory(parts, "cuda"),
    }
    found = "not measured" if used is None else f"{(used - others) / GIB:.1f} GiB"
    lines += [
        f"GRPO step, {episodes} episodes of {sizes.chunks} chunks, {step.acted} chunks acted and {step.kept} kept: "
        + ", ".join(f"{name} {seconds:.3g} s" for name, seconds in phases.items()),
        f"update {step.kept / phases['update']:.3g} chunks/s in microbatches of {sizes.microbatch}, "
        f"{100 * rate / bench.peak:.0f} % of the measured peak; memory {found}, estimated "
        f"{needed_memory(parts, 'cuda') / GIB:.1f} GiB",
    ]
    return numbers, lines


def acting(bench: Bench, policy: Any, cost: Any) -> dict[str, Any]:
    """A block of rows: whole, image pipeline and vision towers included, and with the features of frames kept."""
    import torch

    from rawdream_env.seeding import NoiseKey

    rows, side = policy.act_batch, bench.size.image_size
    images = torch.randint(0, 256, (rows, side, side, 3), dtype=torch.uint8)
    texts, keys = [INSTRUCTION] * rows, [NoiseKey(i) for i in range(rows)]

    def act() -> Any:
        return policy.act(images, texts, temperature=1.6, keys=keys)

    def whole() -> Any:
        policy.feature_cache.clear()
        return act()

    times = bench.timed({"whole": whole, "language model": act})
    rate = rows * cost.act / times["whole"].median
    return {
        "chunks_per_s": rows / times["whole"].median,
        "tokens_per_s": rows * policy.num_action_tokens / times["whole"].median,
        "language_chunks_per_s": rows / times["language model"].median,
        "flops_per_s": rate,
        "share_of_measured_peak": rate / bench.peak,
        "share_of_nominal": rate / NOMINAL,
        **{name: spent.as_dict() for name, spent in times.items()},
    }


class GRPOStep:
    """A step of GRPO at every call; ``phases`` are the seconds of the last one."""

    def __init__(self, bench: Bench, policy: Any, sizes: Sizes) -> None:
        import numpy as np

        from rawdream_env.envs.dream import DreamVectorEnv
        from rawdream_env.judges.scripted import ScriptedJudge
        from rawdream_env.starts.memory import ListStarts
        from rawdream_env.trainers.grpo import GRPOConfig
        from rawdream_env.trainers.grpo.learner import Learner
        from rawdream_env.trainers.grpo.rollout import GroupCollector
        from rawdream_env.types import Start

        self.device, self.count = bench.device, 0
        self.config = GRPOConfig(
            Path(tempfile.gettempdir()), group_size=sizes.group_size, groups_per_step=sizes.groups,
            microbatch_size=sizes.microbatch, gradient_checkpointing=True, lora_rank=sizes.lora_rank,
        )  # fmt: skip
        self.guarded = self.config.max_kl is not None
        self.learner = Learner.of(policy, self.config)
        rng, side = np.random.default_rng(0), bench.size.image_size
        starts = [Start(rng.integers(0, 256, (side, side, 3), dtype=np.uint8), INSTRUCTION, 0) for _ in range(8)]
        self.act, self.judge = _Timed(policy.act, bench.device), _Timed(ScriptedJudge(), bench.device)
        policy.act = self.act
        self.env: Any = DreamVectorEnv(
            sizes.groups * sizes.group_size, world_model=world_model(bench.transformer, bench.codec), judge=self.judge,
            starts=ListStarts(starts), max_episode_steps=sizes.chunks, autoreset_mode="Disabled", device=bench.device,
        )  # fmt: skip
        self.collector = GroupCollector(
            self.env, policy, group_size=sizes.group_size, num_groups=sizes.groups, temperature=self.config.temperature
        )

    def __call__(self) -> None:
        """Roll out, judge, update."""
        from rawdream_env.trainers.grpo.grpo import update

        self.act.seconds = self.judge.seconds = 0.0
        collect, learn = _Timed(self.collector.collect, self.device), _Timed(update, self.device)
        rollouts = collect(self.count)
        learn(self.config, self.learner, rollouts, self.count)
        self.learner.follow(self.config.ema, self.count)
        self.count += 1
        self.acted = rollouts.counts.chunks
        self.kept = sum(len(member) for group in rollouts.groups for member, _ in group.counted)
        self.phases = {
            "rollout, policy": self.act.seconds,
            "rollout, world model and environment": collect.seconds - self.act.seconds - self.judge.seconds,
            "reward stub": self.judge.seconds,
            "update": learn.seconds,
        }

    def close(self) -> None:
        """Free the environment."""
        self.collector.close()
        self.env.close()
