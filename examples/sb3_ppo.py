"""Improve the bundled policy with PPO of stable-baselines3, in the dream or in the simulator: only the id changes.

    pip install 'rawdream-env[sb3]'
    python examples/sb3_ppo.py --env dream
    python examples/sb3_ppo.py --env sim --updates 20 --out runs/sb3

PPO starts from the bundled policy (``SB3TokenPolicy``). Before and after training, the policy's success rate is measured in
the simulator, from the same starts, with 95 % Wilson intervals. With --out the policy is saved for
``rawdream policy evaluate``.
"""

import argparse
from collections import deque

import gymnasium as gym
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecMonitor
from tqdm import tqdm

import rawdream_env  # noqa: F401  (registers the ids)
from rawdream_env.statistics import Rate
from rawdream_env.trainers.policy.validation import simulator_success
from rawdream_env.wrappers import InstructionObservation, SB3TokenPolicy, SB3VecEnv, TokenActions

IDS = {"dream": "rawdream/PiperDream-v0", "sim": "rawdream/PiperSim-v0"}
# The reward is the task's relation in the state that the world model imagines; the bundled judge of videos is slower.
OPTIONS = {"dream": {"judge": "state", "judge_every": "chunk", "dtype": "bfloat16"}}
HORIZON = 8  # chunks in an episode, and in a rollout of every environment
CRITIC_FIRST = 4  # rollouts before the actor's first update

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--env", default="dream", help="dream, sim or the id of an environment")
parser.add_argument("--num-envs", type=int, default=64)
parser.add_argument(
    "--updates", type=int, default=60, help="rollouts of 8 chunks in every environment, each with an update"
)
parser.add_argument("--steps", type=int, help="the same in action chunks over all environments")
parser.add_argument("--lr", type=float, default=2e-4)
parser.add_argument("--average", type=float, default=0.95, help="decay per update of the averaged weights; 0: the last")
parser.add_argument("--temperature", type=float, default=0.7, help="of sampling in training; evaluation is also greedy")
parser.add_argument("--episodes", type=int, default=50, help="simulator episodes per task, before and after; 0: none")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", help="folder for the model of stable-baselines3 and the policy")
parser.add_argument(
    "--env-options",
    nargs="*",
    default=[],
    metavar="KEY=VALUE",
    help="instead of the usual ones, for example world_model=null",
)
args = parser.parse_args()


class Average(BaseCallback):
    """The average of the actor's weights over the updates, decaying by ``decay``: what is measured and saved at the end.

    The noise of the last updates averages out, as in the project's own trainer (``rawdream policy grpo --ema``).
    """

    def __init__(self, decay):
        super().__init__()
        self.decay, self.updates = decay, 0

    def _on_training_start(self):
        self.weights = [weight.detach().clone() for weight in self.model.policy.actor.parameters()]

    def _on_step(self):
        return True

    @torch.no_grad()
    def _on_rollout_start(self):  # after every update, and once before the first
        decay = min(self.decay, (self.updates + 1) / (self.updates + 6))
        for average, weight in zip(self.weights, self.model.policy.actor.parameters(), strict=True):
            average.lerp_(weight, 1 - decay)
        self.updates += 1

    @torch.no_grad()
    def _on_training_end(self):
        self._on_rollout_start()
        for average, weight in zip(self.weights, self.model.policy.actor.parameters(), strict=True):
            weight.copy_(average)


class FitCritic(BaseCallback):
    """After every rollout, fit the critic to the returns of the last rollouts: PPO's own steps are too few for it."""

    def __init__(self, rollouts=6, steps=40):
        super().__init__()
        self.steps, self.recent = steps, deque(maxlen=rollouts)

    def _on_training_start(self):
        self.optimizer = torch.optim.AdamW(self.model.policy.critic.parameters(), lr=1e-3)

    def _on_step(self):
        return True

    def _on_rollout_end(self):
        buffer, policy = self.model.rollout_buffer, self.model.policy
        features = []
        for step in range(buffer.buffer_size):
            observations = {name: torch.from_numpy(values[step]) for name, values in buffer.observations.items()}
            features.append(policy.critic_features(observations))
        self.recent.append((torch.cat(features), torch.from_numpy(buffer.returns.flatten())))
        policy.fit_critic(*map(torch.cat, zip(*self.recent, strict=True)), self.optimizer, self.steps)


class Progress(BaseCallback):
    """A progress bar with the success rate of the last update's episodes in the training environment."""

    def _on_training_start(self):
        self.bar = tqdm(total=updates, desc="PPO", unit="update")

    def _on_rollout_start(self):
        self.outcomes = []

    def _on_step(self):
        ended = zip(self.locals["infos"], self.locals["dones"], strict=True)
        self.outcomes += [info["is_success"] for info, done in ended if done]
        return True

    def _on_rollout_end(self):
        self.bar.set_postfix_str(f"success {sum(self.outcomes) / max(1, len(self.outcomes)):.0%}")
        self.bar.update()

    def _on_training_end(self):
        self.bar.close()


def measure(name):
    """Print the success rates of the trained actor in the simulator."""
    for temperature in (0.0, args.temperature) if args.episodes else ():
        rates = simulator_success(model.policy.actor, args.episodes, temperature=temperature, progress=True)
        total = Rate.of(sum(rate.successes for rate in rates.values()), sum(rate.n for rate in rates.values()))
        print(f"{name}, temperature {temperature:g}: {total}")
        for task, rate in rates.items():
            print(f"  {task:12} {rate}")


def learning_rate(left):
    """Zero while the critic learns, at first; warm-up in the next 4 updates, since Adam's first steps are too large.

    ``left`` falls from 1 to 0.
    """
    first = min(CRITIC_FIRST, updates // 4)
    return args.lr * min(1.0, max(0.0, ((1 - left) * updates - first) / 4))


options = dict(option.split("=", 1) for option in args.env_options) or OPTIONS.get(args.env, {})
envs = gym.make_vec(IDS.get(args.env, args.env), num_envs=args.num_envs, autoreset_mode="SameStep", **options)
envs = TokenActions(InstructionObservation(envs, words=True))
batch = HORIZON * args.num_envs
updates = args.updates if args.steps is None else max(1, args.steps // batch)
model = PPO(
    SB3TokenPolicy,
    VecMonitor(SB3VecEnv(envs, end_at_horizon=True)),
    n_steps=HORIZON,
    batch_size=max(2, batch // 2),
    n_epochs=1,
    learning_rate=learning_rate,
    gamma=1.0,  # an episode's return is 1 or 0
    gae_lambda=0.95,
    clip_range=0.5,  # of the ratio of a chunk, the product over its 56 tokens
    max_grad_norm=5.0,
    vf_coef=0.0,  # FitCritic trains the critic
    policy_kwargs={"temperature": args.temperature},
    seed=args.seed,
    device="cpu",
)
measure("before")
model.learn(updates * batch, callback=[Progress(), FitCritic(), Average(args.average)])
envs.close()
measure("after")
if args.out:
    model.save(f"{args.out}/ppo.zip")
    model.policy.actor.save_pretrained(f"{args.out}/policy")
