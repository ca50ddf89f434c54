"""Improve the bundled policy with PPO of TorchRL, in the dream or in the simulator.

    pip install 'rawdream-env[torchrl]'
    python examples/torchrl_ppo.py --env dream
    python examples/torchrl_ppo.py --env sim --updates 40

The actor is the bundled policy's network; the critic reads its features. Before and after training, the success rate is
measured in the simulator, from the same starts, with 95 % Wilson intervals. Settings are those of ``sb3_ppo.py``.
"""

import argparse

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

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--env", default="dream", help="dream, sim or the id of an environment")
parser.add_argument("--num-envs", type=int, default=64)
parser.add_argument(
    "--updates", type=int, default=40, help="rollouts of 8 chunks in every environment, each with an update"
)
parser.add_argument("--lr", type=float, default=2e-4)
parser.add_argument("--temperature", type=float, default=0.7, help="of sampling in training; evaluation is greedy")
parser.add_argument("--episodes", type=int, default=50, help="simulator episodes per task, before and after; 0: none")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", help="folder for the policy")
parser.add_argument("--env-options", nargs="*", default=[], metavar="KEY=VALUE", help="for example world_model=null")
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
    """A value from the policy's features. The gain lets it learn faster than the actor, at the same learning rate."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3 * policy.config.width, 128), nn.SiLU(), nn.Linear(128, 1))
        nn.init.zeros_(self.net[-1].weight)

    def forward(self, image, instruction):
        """Values (..., 1) of images (..., H, W, 3) and word ids (..., 16)."""
        with torch.no_grad():
            registers, _ = policy.features(image.flatten(0, -4), instruction.flatten(0, -2))
        return 10.0 * self.net(registers.flatten(1)).view(*image.shape[:-3], 1)


def measure(name):
    """Print the success rates of the policy in the simulator."""
    if args.episodes:
        rates = simulator_success(policy, args.episodes, progress=True)
        total = Rate.of(sum(rate.successes for rate in rates.values()), sum(rate.n for rate in rates.values()))
        for task, rate in {"all tasks": total, **rates}.items():
            print(f"{name} {task:12} {rate}")


torch.manual_seed(args.seed)
policy = load_policy("embedded")
options = dict(option.split("=", 1) for option in args.env_options)
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
critic = ValueOperator(Critic(), in_keys=observed)
advantage = GAE(gamma=1.0, lmbda=0.95, value_network=critic, deactivate_vmap=True)  # an episode's return is 1 or 0
# The clipped ratio is that of a chunk, the product over its 56 tokens.
loss_of = ClipPPOLoss(actor, critic, clip_epsilon=0.5, entropy_bonus=False, critic_coeff=0.5, normalize_advantage=True)
optimizer = torch.optim.Adam(loss_of.parameters(), args.lr, eps=1e-5)
warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: min(1.0, (update + 1) / 4))

measure("before")
bar = tqdm(range(args.updates), desc="PPO", unit="update")
for _ in bar:
    with torch.no_grad():
        data = env.rollout(8, actor, break_when_any_done=False)
        data["next", "terminated"] = data["next", "done"]  # an episode without success at the horizon has failed
        advantage(data)
    chunks = data.exclude("logits").reshape(-1)
    for part in chunks[torch.randperm(len(chunks))].split(max(2, len(chunks) // 2)):
        losses = loss_of(part)
        optimizer.zero_grad()
        (losses["loss_objective"] + losses["loss_critic"]).backward()
        nn.utils.clip_grad_norm_(loss_of.parameters(), 5.0)
        optimizer.step()
    warm_up.step()
    rewards, ends = data["next", "reward"].sum(), data["next", "done"].sum()
    bar.set_postfix_str(f"success {rewards / ends.clamp(min=1):.0%}, kl {losses['kl_approx']:.3f}")
env.close()
measure("after")
if args.out:
    policy.save_pretrained(args.out)
