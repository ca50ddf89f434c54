"""How good a policy is while it trains: held-out numbers, and success in the simulator."""

from __future__ import annotations

import numpy as np
import torch

from rawdream_env.piper.relations import find_task
from rawdream_env.policies.action_tokens import decode, encode
from rawdream_env.policies.tiny_vla import TinyVLA
from rawdream_env.seeding import NoiseKey, mix
from rawdream_env.statistics import Rate
from rawdream_env.trainers.policy.batches import gather_batch
from rawdream_env.trainers.policy.config import SFTConfig
from rawdream_env.trainers.policy.demonstrations import Demonstrations
from rawdream_env.trainers.policy.losses import READOUT_SCALE, token_loss
from rawdream_env.types import Policy


@torch.no_grad()
def validate(policy: TinyVLA, held_out: Demonstrations, config: SFTConfig, *, samples: int = 512) -> dict[str, float]:
    """Held-out numbers of a policy, greedy, on ``samples`` samples that are the same at every call.

    ``val_loss`` (nats a token), ``val_token_accuracy`` (exact bin), ``val_action_error`` (mean |a - a*|, action units),
    ``val_gripper_accuracy`` (sign), and where the data hold them ``val_tool_mm``, ``val_object_mm``, ``val_goal_mm``:
    median distance of the read-out positions in millimetres.
    """
    rng = np.random.default_rng(mix(config.seed, 0x7E57))
    chosen = rng.permutation(len(held_out))[:samples]
    batch = gather_batch([(held_out, chosen)], rng, config.device)
    outputs = [
        policy.forward_train(batch.frames[i : i + 64], policy.word_ids(batch.instructions[i : i + 64]))
        for i in range(0, len(chosen), 64)
    ]
    logits, readout = (torch.cat(parts) for parts in zip(*outputs, strict=True))
    tokens, predicted = encode(batch.actions), logits.argmax(-1).view(batch.actions.shape)
    numbers = {
        "val_loss": float(token_loss(logits, batch.actions, config.label_sigma)),
        "val_token_accuracy": float((tokens == predicted).float().mean()),
        "val_action_error": float((decode(predicted) - batch.actions).abs().mean()),
        "val_gripper_accuracy": float(
            ((decode(predicted)[..., -1] > 0) == (batch.actions[..., -1] > 0)).float().mean()
        ),
    }
    off = readout.float() * readout.new_tensor(READOUT_SCALE) - batch.readout
    for name, first in (("tool", 0), ("object", 7), ("goal", 10)):
        distance = off[:, first : first + 3].norm(dim=-1)
        if not torch.isnan(distance).all():
            numbers[f"val_{name}_mm"] = float(distance.nanmedian()) * 1e3
    return numbers


def evaluate_in_sim(
    policy: Policy,
    task: str,
    episodes: int,
    layout: str = "narrow",
    seed: int = 1_000_000,
    temperature: float = 0.0,
    *,
    num_workers: int = 0,
    batch: int = 32,
    max_episode_steps: int = 8,
) -> Rate:
    """Success of ``policy`` on ``task`` in the MuJoCo twin, with its Wilson interval.

    Episode i starts from simulator seed ``seed + i`` and acts from noise key ``NoiseKey(seed + i)``, so the result does
    not depend on ``batch`` (episodes stepped together) or ``num_workers`` (simulator processes). ``temperature`` 0 is
    greedy. An episode succeeds at the end of the first of at most ``max_episode_steps`` chunks at which the task's
    relation holds.
    """
    from rawdream_env.piper.workers import PiperWorkers

    goal = find_task(task)
    outcomes = np.zeros(episodes, dtype=bool)
    with PiperWorkers(min(batch, episodes), num_workers=num_workers, layout=layout) as workers:
        for first in range(0, episodes, batch):
            count = min(batch, episodes - first)
            rows = np.arange(count)
            seeds = [seed + first + int(r) for r in rows]
            frames = workers.reset(rows.tolist(), seeds, [goal.name] * count)
            for chunk in range(max_episode_steps):
                keys = [NoiseKey(seeds[r], chunk=chunk) for r in rows]
                output = policy.act(frames, [goal.instruction] * len(rows), temperature=temperature, keys=keys)
                result = workers.step(rows.tolist(), output.actions.cpu().numpy(), every_frame=False)
                outcomes[first + rows] |= result.success
                alive = ~result.success
                rows, frames = rows[alive], result.frames[alive][:, -1]
                if not len(rows):
                    break
    return Rate.over(outcomes.tolist())
