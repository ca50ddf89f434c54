"""Validation of a policy during training: held-out metrics, and success rates in the simulator."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from rawdream_env.envs.episodes import make_env, run_episodes
from rawdream_env.policies.base import TokenPolicy
from rawdream_env.policies.tiny_vla import TinyVLA
from rawdream_env.robots import find_robot
from rawdream_env.seeding import mix
from rawdream_env.statistics import Rate
from rawdream_env.trainers.policy.batches import Batch, gather_batch
from rawdream_env.trainers.policy.config import SFTConfig
from rawdream_env.trainers.policy.demonstrations import Demonstrations
from rawdream_env.trainers.policy.losses import READOUT_SCALE, token_loss
from rawdream_env.types import Policy, Start


@torch.no_grad()
def validate(
    policy: TokenPolicy, held_out: Demonstrations, config: SFTConfig, *, samples: int = 512
) -> dict[str, float]:
    """Greedy held-out metrics of a policy on at most ``samples`` samples, the same at every call.

    ``val_loss`` (nats per token), ``val_token_accuracy`` (exact bin), ``val_action_error`` (mean |a - a*|, action units),
    ``val_gripper_accuracy`` (sign), and, if the data contain positions, ``val_tool_mm``, ``val_object_mm``, ``val_goal_mm``:
    median distance of the read-out positions in millimetres.
    """
    rng = np.random.default_rng(mix(config.seed, 0x7E57))
    chosen = rng.permutation(len(held_out))[:samples]
    batch = gather_batch([(held_out, chosen)], rng, config.device)
    rows = config.microbatch_size or 64
    outputs = [_scores(policy, batch.rows(i, rows)) for i in range(0, len(chosen), rows)]
    logits, readout = (torch.cat(parts) for parts in zip(*outputs, strict=True))
    tokens, predicted = policy.encode_actions(batch.actions), logits.argmax(-1)
    actions = policy.decode_actions(predicted)
    numbers = {
        "val_loss": float(token_loss(logits, tokens, config.label_sigma or 0.0)),
        "val_token_accuracy": float((tokens == predicted).float().mean()),
        "val_action_error": float((actions - batch.actions).abs().mean()),
        "val_gripper_accuracy": float(((actions[..., -1] > 0) == (batch.actions[..., -1] > 0)).float().mean()),
    }
    if not isinstance(policy, TinyVLA):
        return numbers
    off = readout.float() * readout.new_tensor(READOUT_SCALE) - batch.readout
    for name, first in (("tool", 0), ("object", 7), ("goal", 10)):
        distance = off[:, first : first + 3].norm(dim=-1)
        if not torch.isnan(distance).all():
            numbers[f"val_{name}_mm"] = float(distance.nanmedian()) * 1e3
    return numbers


def _scores(policy: TokenPolicy, batch: Batch) -> tuple[Tensor, Tensor]:
    """Token scores (B, L, 256), and the read-out (B, 13) of a TinyVLA, else (B, 0)."""
    if isinstance(policy, TinyVLA):
        return policy.forward_train(batch.frames, policy.word_ids(batch.instructions))
    return policy.logits(batch.frames, batch.instructions), batch.readout[:, :0]


def simulator_success(
    policy: Policy,
    episodes: int,
    *,
    sim_env: str = "",
    seed: int = 1_000_000,
    temperature: float = 0.0,
    num_envs: int = 32,
    progress: bool = False,
    **options: Any,
) -> dict[str, Rate]:
    """Success rates of ``policy`` on every task of a simulator, by task name, with Wilson intervals.

    Episode i of a task starts from simulator seed ``seed + i`` and acts from noise key ``NoiseKey(seed + i)``, so the
    result does not depend on ``num_envs``. An episode succeeds when the task is done after any chunk.

    Args:
        policy: the policy to measure.
        episodes: number of episodes per task.
        sim_env: id of the simulator environment; that of the default robot when empty.
        seed: simulator seed of the first episode.
        temperature: sampling temperature of the policy; 0 is greedy.
        num_envs: maximum number of episodes at once.
        progress: show a progress bar.
        options: keyword arguments of the environment, such as layout and num_workers.
    """
    env: Any = make_env(sim_env or find_robot().sim_env, min(num_envs, episodes), **options)
    blank = np.zeros(env.single_observation_space["image"].shape, np.uint8)  # the simulator starts from the seed
    rates = {}
    with closing(env):
        for task_id, (name, instruction) in enumerate(env.unwrapped.tasks):
            starts = [Start(blank, instruction, task_id, seed=seed + i) for i in range(episodes)]
            rollouts = run_episodes(env, starts, policy, temperature=temperature)
            bar = tqdm(rollouts, name, episodes, unit="episode", leave=False, disable=not progress)
            rates[name] = Rate.over(rollout.success_any for rollout in bar)
    return rates
