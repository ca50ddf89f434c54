"""``rawdream plan``: memory and time of one GRPO step on given GPUs, before anything starts. Every number is an estimate.

Parameters, operations and kept activations are counted from the configurations of the models (``plan_costs.py``). Times are
operations over peak rate times utilisation, or bytes over bandwidth where that takes longer. What does not fit is refused with
the smallest change that would.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch

from rawdream_env.config import parse_choice
from rawdream_env.errors import InvalidOptionError, NotEnoughMemoryError
from rawdream_env.evaluation.reporting.numbers import aligned
from rawdream_env.trainers.common.distributed import Parallel
from rawdream_env.trainers.grpo.plan_costs import DreamCost, PolicyCost, dream_cost, policy_cost
from rawdream_env.world_models.memory import GIB, needed_memory, rollout_memory


@dataclass(frozen=True)
class Card:
    """A GPU: memory in GiB as its driver reports it; dense operations per second of matrix products in bfloat16 and float32;
    bytes per second of its memory, and of its link to other GPUs in one direction.
    """

    memory_gib: float
    bfloat16: float
    float32: float
    bandwidth: float
    link: float


CARDS: dict[str, Card] = {
    "rtx-4090": Card(23.6, 165e12, 83e12, 1.01e12, 32e9),
    "l40s": Card(44.4, 362e12, 92e12, 0.86e12, 32e9),
    "a100-40": Card(39.4, 312e12, 19.5e12, 1.56e12, 300e9),
    "a100-80": Card(79.3, 312e12, 19.5e12, 2.04e12, 300e9),
    "h100": Card(79.1, 989e12, 67e12, 3.35e12, 450e9),
    "h200": Card(139.8, 989e12, 67e12, 4.8e12, 450e9),
}
"""Of the manufacturer's data sheets, without sparsity."""
_HOST_LINK = 6e9
"""Assumed bytes per second of copies between a GPU and pageable host memory."""


@dataclass(frozen=True)
class PlanConfig:
    """Options of ``rawdream plan``. Those of ``rawdream policy grpo`` have its names and meaning."""

    policy: str = "openvla-oft-7b"
    """"openvla-oft-7b", "tiny-vla", or a checkpoint folder of OpenVLA-OFT, of which only config.json is read."""
    world_model: str = "wan2.1-1.3b"
    """"wan2.1-1.3b", "embedded" (the bundled video model), or "none": a simulator."""
    gpu: str = "h100"
    """rtx-4090, l40s, a100-40, a100-80, h100 or h200."""
    gpus: int = 1
    """Number of GPUs, each with its own process, environments and world model."""
    parallel: Parallel = "none"
    """With several GPUs: "ddp" replicates the policy, "fsdp2" shards it during updates."""
    lora_rank: int = 32
    """Rank of LoRA adapters; 0: all weights are trained."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of the policy's weights; adapters are float32."""
    gradient_checkpointing: bool = False
    """Compute the language model's activations again in the backward pass."""
    microbatch_size: int = 256
    """Chunks in a forward pass of the update, per GPU."""
    num_envs: int = 64
    """Episodes imagined in parallel, per GPU."""
    offload_world_model: bool = False
    """Keep the world model's weights in host memory during updates."""
    group_size: int = 8
    """Rollouts that share a start."""
    groups_per_step: int = 8
    """Groups per step over all GPUs, without dropped ones."""
    epochs: int = 1
    """Passes over a step's trajectories."""
    minibatches: int = 2
    """Updates per pass."""
    max_kl: float | None = 0.05
    """None: without the guard, which costs a forward pass and a copy of the trained weights and moments."""
    ema: float = 0.95
    """0: without averaged weights."""
    chunks: int = 28
    """Chunks per episode (28 x 8 actions: the horizon of LIBERO-Spatial)."""
    kept_groups: float = 0.6
    """Assumed share of groups that are neither all success nor all failure; dropped ones are replaced."""
    replayed: float = 0.3
    """Assumed share of episodes that are imagined again for dual-noise verification (paper: 0.3)."""
    policy_utilisation: float = 0.4
    """Assumed share of the peak rate that the policy's matrix products reach."""
    dream_utilisation: float = 0.4
    """The same of the world model."""

    def __post_init__(self) -> None:
        """Refuse values that make no plan."""
        parse_choice("gpu", self.gpu, list(CARDS))
        for name in ("gpus", "microbatch_size", "num_envs", "groups_per_step", "epochs", "minibatches", "chunks"):
            if getattr(self, name) < 1:
                raise InvalidOptionError(f"{name}={getattr(self, name)} must be at least 1.")
        for name in ("kept_groups", "policy_utilisation", "dream_utilisation"):
            if not 0 < getattr(self, name) <= 1:
                raise InvalidOptionError(f"{name}={getattr(self, name)} must be above 0 and at most 1.")
        if not 0 <= self.replayed <= 1 or self.lora_rank < 0 or self.group_size < 2:
            raise InvalidOptionError("replayed must lie between 0 and 1, lora_rank be 0 or more, group_size 2 or more.")
        if (self.gpus > 1) == (self.parallel == "none"):
            raise InvalidOptionError(f"gpus={self.gpus} does not fit parallel={self.parallel!r}: one GPU needs 'none', more "
                                     "need 'ddp' or 'fsdp2'.")  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """Bytes on each GPU during rollouts and updates, by part, and seconds of a step, by phase; all estimated."""

    config: PlanConfig
    rollout: dict[str, int]
    update: dict[str, int]
    seconds: dict[str, float]
    videos: int
    policy: PolicyCost
    imagined: float
    """Operations to imagine a chunk; 0 with a simulator."""

    @property
    def peak(self) -> int:
        """Bytes needed on a GPU, with fragmentation and CUDA's context."""
        return max(needed_memory(parts, "cuda") for parts in (self.rollout, self.update))

    @property
    def fits(self) -> bool:
        """Whether the card has as much."""
        return self.peak <= CARDS[self.config.gpu].memory_gib * GIB

    def __str__(self) -> str:
        c, card = self.config, CARDS[self.config.gpu]
        names = list(dict.fromkeys([*self.rollout, *self.update]))
        rows = [["memory per GPU, estimated", "rollouts, GiB", "update, GiB"]]
        rows += [[n, *(f"{parts.get(n, 0) / GIB:.2f}" for parts in (self.rollout, self.update))] for n in names]
        totals = [needed_memory(parts, "cuda") / GIB for parts in (self.rollout, self.update)]
        rows.append(
            [f"total (of {card.memory_gib:g}), with 8 % and 1 GiB on top", *(f"{total:.2f}" for total in totals)]
        )
        times = [["time per step, estimated", "seconds"], *([n, f"{s:.1f}"] for n, s in self.seconds.items())]
        whole = sum(self.seconds.values())
        times.append(["step", f"{whole:.1f}"])
        rollout_s = sum(s for name, s in self.seconds.items() if name.startswith("rollouts"))
        judge = (
            f"Judge: apart, not counted; it judges {self.videos} videos a step, {self.videos / rollout_s:.2f} a second."
        )
        trained = f"{self.policy.trained / 1e6:.4g} M of {self.policy.weights / 1e6:.5g} M weights are trained"
        rate = getattr(card, c.dtype)
        assumed = (
            f"Assumed: {c.gpus} x {c.gpu}, {rate / 1e12:g} TFLOP/s {c.dtype} (world model {card.bfloat16 / 1e12:g}, bfloat16), "
            f"{card.bandwidth / 1e12:g} TB/s, link {card.link / 1e9:g} GB/s; {100 * c.policy_utilisation:g} % and "
            f"{100 * c.dream_utilisation:g} % of the peak (policy, world model); {100 * c.kept_groups:g} % of groups kept; "
            f"{100 * c.replayed:g} % of episodes verified, {c.chunks} chunks an episode; {trained}. Operations of a "
            f"chunk: {self.policy.act / 1e12:.3g} TFLOP to act, {self.policy.train / 1e12:.3g} to learn, "
            f"{self.imagined / 1e12:.3g} to imagine."
        )
        return "\n".join([*aligned(rows), "", *aligned(times), "", judge, assumed])


def plan(config: PlanConfig) -> Plan:
    """The plan, if it fits.

    Raises:
        NotEnoughMemoryError: it does not; the message has the smallest change that would.
        InvalidOptionError: options that do not fit.
    """
    made = estimate(config)
    if made.fits:
        return made
    worst = max((made.rollout, made.update), key=lambda parts: sum(parts.values()))
    listed = ", ".join(f"{name} {size / GIB:.1f}" for name, size in worst.items() if size > GIB / 20)
    phase = "the update" if worst is made.update else "rollouts"
    change = next((words for words, other in changes(config) if estimate(other).fits), "")
    advice = f"Smallest change that fits: {change}" if change else "No change of a few options, GPUs or card fits"
    raise NotEnoughMemoryError(
        f"{phase} would need about {made.peak / GIB:.1f} GiB per GPU ({listed}), but the {config.gpu} has "
        f"{CARDS[config.gpu].memory_gib:g}. {advice} (estimated)."
    )


def estimate(config: PlanConfig) -> Plan:
    """Memory and time of a step, whether it fits or not."""
    policy, dream = _costs(config.policy, config.lora_rank, config.dtype, config.world_model)
    episodes = config.groups_per_step / config.kept_groups * config.group_size
    videos = round(episodes * (1 + config.replayed))
    imagined = 0.0 if dream is None else dream.chunk
    rollout, update = memory(config, policy, dream)
    return Plan(config, rollout, update, seconds(config, policy, dream), videos, policy, imagined)


def memory(config: PlanConfig, policy: PolicyCost, dream: DreamCost | None) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes by part on one GPU during rollouts and during the update."""
    shards = config.gpus if config.parallel == "fsdp2" else 1
    trained = policy.trained_bytes // shards
    always = {
        "optimizer": 2 * trained,
        "averaged weights": trained if config.ema else 0,
    }
    imagining = {} if dream is None else {"world model": dream.weight_bytes}
    gathered = policy.weight_bytes + (trained if shards > 1 else 0)
    rollout = {"policy": gathered, **imagining, **always}
    if dream is not None:  # freed before the update: all episodes are over
        rollout["imagined rollouts"] = _imagined_bytes(dream, config.num_envs)
    kept = policy.inputs if config.gradient_checkpointing else policy.saved
    update = {
        "policy": policy.weight_bytes // shards + (2 * policy.block if shards > 1 else 0),
        **({} if config.offload_world_model else imagining),
        **always,
        "gradients": trained,
        "copy for max_kl": 3 * trained if config.max_kl is not None else 0,
        "activations": config.microbatch_size * kept,
    }
    return rollout, update


def seconds(config: PlanConfig, policy: PolicyCost, dream: DreamCost | None) -> dict[str, float]:
    """Seconds of a step by phase."""
    card, shards = CARDS[config.gpu], config.gpus
    rate = getattr(card, config.dtype) * config.policy_utilisation
    kept = config.groups_per_step * config.group_size * config.chunks / shards  # chunks per GPU
    acted = kept / config.kept_groups
    blocks = acted / 8  # TokenPolicy.act_batch rows at a time
    updates = config.epochs * config.minibatches
    again = policy.forward if config.gradient_checkpointing else 0
    guard = policy.forward if config.max_kl is not None else 0
    spent = {"rollouts, policy": max(acted * policy.act / rate, blocks * policy.weight_bytes / card.bandwidth)}
    if dream is not None:
        imagined = acted * (1 + config.replayed)
        spent["rollouts, world model"] = imagined * dream.chunk / (card.bfloat16 * config.dream_utilisation)
        if config.offload_world_model:
            spent["world model to the host and back"] = 2 * dream.weight_bytes / _HOST_LINK
    passes = max(config.epochs * kept / config.microbatch_size, updates)
    computed = config.epochs * kept * (policy.train + again + guard) / rate
    spent["update"] = max(computed, 3 * passes * policy.weight_bytes / card.bandwidth)
    if config.parallel == "ddp":
        spent["exchange of gradients"] = updates * 2 * policy.trained_bytes / card.link
    elif config.parallel == "fsdp2":
        moved = passes * (2 * policy.weight_bytes + policy.trained_bytes) + policy.weight_bytes
        spent["exchange of weights and gradients"] = moved / card.link
    return spent


def changes(config: PlanConfig) -> Iterator[tuple[str, PlanConfig]]:
    """Changes in the order of their price: memory for time first, then other training, then more or larger GPUs."""
    halved = _halved(config.microbatch_size)
    options: list[Mapping[str, object]] = [{"microbatch_size": n} for n in halved]
    dreamless = config.offload_world_model or config.world_model == "none"
    offload = {} if dreamless else {"offload_world_model": True}
    checkpointing = (
        {} if config.gradient_checkpointing or config.policy == "tiny-vla" else {"gradient_checkpointing": True}
    )
    if checkpointing:
        options = [o for o in options if int(str(o["microbatch_size"])) >= 4]  # smaller ones leave the GPU idle
    options += [{**offload, **option} for option in ({}, *options)]
    if checkpointing:
        options += [checkpointing, *({**checkpointing, "microbatch_size": n} for n in halved)]
    envs = _halved(config.num_envs)
    options += [{"num_envs": n} for n in envs]
    small = {**checkpointing, "microbatch_size": min(config.microbatch_size, 8)}
    options += [{**small, "num_envs": n} for n in envs]
    small["num_envs"] = min(config.num_envs, 16)
    savings: list[Mapping[str, object]] = [{}, small, {**small, **offload}]
    options += savings[2:]
    if config.lora_rank == 0 and config.policy != "tiny-vla":
        options += [{**more, "lora_rank": 32} for more in savings]
    options += [{**more, "gpus": count, "parallel": "fsdp2"} for count in (2, 4, 8, 16) if count > config.gpus
                for more in savings]  # fmt: skip
    larger = [name for name in CARDS if CARDS[name].memory_gib > CARDS[config.gpu].memory_gib]
    larger.sort(key=lambda name: CARDS[name].memory_gib)
    options += [{**more, "gpu": name} for name in larger for more in savings]
    for option in options:
        words = " ".join(
            f"--{n.replace('_', '-')}" + ("" if v is True else f" {v}")
            for n, v in option.items() if v != getattr(config, n)
        )  # fmt: skip
        yield words, replace(config, **option)  # type: ignore[arg-type]


def _halved(value: int) -> list[int]:
    """Powers of two below ``value``, the largest first."""
    return [1 << i for i in reversed(range((value - 1).bit_length()))]


@functools.lru_cache(maxsize=64)
def _imagined_bytes(dream: DreamCost, num_envs: int) -> int:
    return sum(rollout_memory(dream.arch, dream.codec, num_envs, num_envs, torch.bfloat16).values())


@functools.lru_cache(maxsize=8)
def _costs(policy: str, lora_rank: int, dtype: str, world_model: str) -> tuple[PolicyCost, DreamCost | None]:
    return policy_cost(policy, lora_rank, getattr(torch, dtype)), dream_cost(world_model, torch.bfloat16)
