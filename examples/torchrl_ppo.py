"""Improve the bundled policy with PPO of TorchRL, in the dream or in the simulator.

    pip install 'rawdream-env[torchrl]'
    python examples/torchrl_ppo.py --env dream
    python examples/torchrl_ppo.py --env sim --updates 40

The actor is the bundled policy's network; the critic reads its features. Before and after training, the success rate is
measured in the simulator, from the same starts, with 95 % Wilson intervals. Settings are those of ``sb3_ppo.py``.
"""

import argparse
from collections import deque

import gymnasium as gym
import torch
from tensordict.nn import TensorDictModule
from torch import nn
from torch.distributions import Categorical, Independent
from torchrl.envs import GymWrapper
from torchrl.modules import ProbabilisticActor, ValueOperator
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE
from tqdm import tqdm

import rawdream_env  # noqa: F401  (registers the ids)
from rawdream_env.policies import load_policy
from rawdream_env.statistics import Rate
from rawdream_env.trainers.policy.validation import simulator_success
from rawdream_env.wrappers import InstructionObservation, TokenActions

IDS = {"dream": "rawdream/PiperDream-v0", "sim": "rawdream/PiperSim-v0"}
# The reward is the task's relation in the state that the world model imagines; the bundled judge of videos is slower.
OPTIONS = {"dream": {"judge": "state", "judge_every": "chunk", "dtype": "bfloat16"}}
CRITIC_FIRST = 4  # rollouts before the actor's first update

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--env", default="dream", help="dream, sim or the id of an environment")
parser.add_argument("--num-envs", type=int, default=64)
parser.add_argument(
    "--updates", type=int, default=60, help="rollouts of 8 chunks in every environment, each with an update"
)
parser.add_argument("--lr", type=float, default=2e-4)
parser.add_argument("--average", type=float, default=0.95, help="decay per update of the averaged weights; 0: the last")
parser.add_argument("--temperature", type=float, default=0.7, help="of sampling in training; evaluation is also greedy")
parser.add_argument("--episodes", type=int, default=50, help="simulator episodes per task, before and after; 0: none")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", help="folder for the policy")
parser.add_argument("--env-options", nargs="*", default=[], metavar="KEY=VALUE", help="instead of the usual ones")
args = parser.parse_args()


class Actor(nn.Module):
    """The policy's scores of its action tokens, at the sampling temperature."""

    def __init__(self):
        super().__init__()
        self.policy = policy

    def forward(self, image, instruction):
        """Scores (B, 56, 256) of images (B, H, W, 3) and word ids (B, 16)."""
        _, steps = self.policy.features(image, instruction)
        return self.policy.token_logits(steps) / args.temperature


class Critic(nn.Module):
    """A value from the policy's features, detached. It is fitted to the returns of the last six rollouts: PPO's own steps are
    too few for it, and over a critic that does not know how hard a task is, the policy forgets the hard tasks.
    """

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3 * policy.config.width, 128), nn.SiLU(), nn.Linear(128, 1))
        nn.init.zeros_(self.net[-1].weight)
        self.optimizer, self.recent = torch.optim.AdamW(self.net.parameters(), lr=1e-3), deque(maxlen=6)

    @staticmethod
    @torch.no_grad()
    def features(image, instruction):
        """What it reads of images (..., H, W, 3) and word ids (..., 16): (B, 3 D)."""
        return policy.features(image.flatten(0, -4), instruction.flatten(0, -2))[0].flatten(1)

    def forward(self, image, instruction):
        """Values (..., 1)."""
        return 10.0 * self.net(self.features(image, instruction)).view(*image.shape[:-3], 1)

    def fit(self, image, instruction, returns, steps=40):
        """Regress on returns (B,), with those of earlier rollouts."""
        self.recent.append((self.features(image, instruction), returns))
        features, returns = map(torch.cat, zip(*self.recent, strict=True))
        for _ in range(steps):
            rows = torch.randint(len(returns), (min(256, len(returns)),))
            loss = nn.functional.mse_loss(10.0 * self.net(features[rows])[:, 0], returns[rows])
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()


def measure(name):
    """Print the success rates of the policy in the simulator."""
    for temperature in (0.0, args.temperature) if args.episodes else ():
        rates = simulator_success(policy, args.episodes, temperature=temperature, progress=True)
        total = Rate.of(sum(rate.successes for rate in rates.values()), sum(rate.n for rate in rates.values()))
        print(f"{name}, temperature {temperature:g}: {total}")
        for task, rate in rates.items():
            print(f"  {task:12} {rate}")


torch.manual_seed(args.seed)
policy = load_policy("embedded")
options = dict(option.split("=", 1) for option in args.env_options) or OPTIONS.get(args.env, {})
envs = gym.make_vec(IDS.get(args.env, args.env), num_envs=args.num_envs, autoreset_mode="Disabled", **options)
env = GymWrapper(TokenActions(InstructionObservation(envs, words=True)))
env.set_seed(args.seed)

observed = ["image", "instruction"]
actor = ProbabilisticActor(
    TensorDictModule(Actor(), observed, ["logits"]),
    in_keys=["logits"],
    distribution_class=lambda logits: Independent(Categorical(logits=logits), 1),
    return_log_prob=True,
)
value = Critic()
critic = ValueOperator(value, in_keys=observed)
advantage = GAE(gamma=1.0, lmbda=0.95, value_network=critic, deactivate_vmap=True)  # an episode's return is 1 or 0
# The clipped ratio is that of a chunk, the product over its 56 tokens.
loss_of = ClipPPOLoss(actor, critic, clip_epsilon=0.5, entropy_bonus=False, normalize_advantage=True)
optimizer = torch.optim.Adam(policy.parameters(), args.lr, eps=1e-5)
# Zero while the critic learns, then a warm-up: Adam's first steps are too large.
first = min(CRITIC_FIRST, args.updates // 4)
schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: min(1.0, max(0.0, (update - first + 1) / 4)))
average = torch.optim.swa_utils.AveragedModel(
    policy, avg_fn=lambda mean, now, n: mean.lerp(now, 1 - min(args.average, (n + 1) / (n + 6)))
)
average.update_parameters(policy)

measure("before")
bar = tqdm(range(args.updates), desc="PPO", unit="update")
for _ in bar:
    with torch.no_grad():
        data = env.rollout(8, actor, break_when_any_done=False)
        data["next", "terminated"] = data["next", "done"]  # an episode without success at the horizon has failed
        advantage(data)
    chunks = data.exclude("logits").reshape(-1)
    value.fit(chunks["image"], chunks["instruction"], chunks["value_target"][:, 0])
    for part in chunks[torch.randperm(len(chunks))].split(max(2, len(chunks) // 2)):
        losses = loss_of(part)
        optimizer.zero_grad()
        losses["loss_objective"].backward()
        nn.utils.clip_grad_norm_(policy.parameters(), 5.0)
        optimizer.step()
    schedule.step()
    average.update_parameters(policy)  # the noise of the last updates averages out
    rewards, ends = data["next", "reward"].sum(), data["next", "done"].sum()
    bar.set_postfix_str(f"success {rewards / ends.clamp(min=1):.0%}, kl {losses['kl_approx']:.3f}")
env.close()
policy.load_state_dict(average.module.state_dict())
measure("after")
if args.out:
    policy.save_pretrained(args.out)
