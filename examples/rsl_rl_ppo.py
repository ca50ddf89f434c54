"""Train PPO of rsl_rl in the dream or in the simulator: only the id changes.

    pip install 'rawdream-env[rsl_rl]'
    python examples/rsl_rl_ppo.py --updates 2
    python examples/rsl_rl_ppo.py --updates 2 --env sim

The example shows the interface. A Gaussian policy from scratch does not learn four manipulation tasks from a sparse reward
in a few updates; ``sb3_ppo.py`` and ``torchrl_ppo.py`` start from the bundled policy.
"""

import argparse

import gymnasium as gym
import torch
from rsl_rl.env import VecEnv
from rsl_rl.runners import OnPolicyRunner
from tensordict import TensorDict

import rawdream_env  # noqa: F401  (registers the ids)
from rawdream_env.wrappers import FlatAction, TorchIO

IDS = {"dream": "rawdream/PiperDream-v0", "sim": "rawdream/PiperSim-v0"}
HORIZON = 8  # chunks in an episode, and in a rollout of every environment

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--env", default="dream", help="dream, sim or the id of an environment")
parser.add_argument("--num-envs", type=int, default=16)
parser.add_argument("--updates", type=int, default=10)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", help="folder for checkpoints and logs")
parser.add_argument("--env-options", nargs="*", default=[], metavar="KEY=VALUE", help="for example world_model=null")
args = parser.parse_args()


class RslRlEnv(VecEnv):
    """A vector environment with SAME_STEP autoreset as rsl_rl's ``VecEnv``: observations (B, 3, H, W) in [0, 1]."""

    def __init__(self, env, seed):
        self.env, self.device, self.cfg = TorchIO(FlatAction(env)), "cpu", {}
        self.num_envs, self.max_episode_length = env.num_envs, HORIZON
        self.num_actions = self.env.single_action_space.shape[0]
        self.episode_length_buf = torch.zeros(self.num_envs, dtype=torch.long)
        self.observations = self._tensors(self.env.reset(seed=seed)[0])

    def get_observations(self):
        """The last observations."""
        return self.observations

    def step(self, actions):
        """Step; the horizon is no time-out, since an episode without success has failed."""
        observations, rewards, terminated, truncated, _ = self.env.step(
            actions.clamp(-1, 1)
        )  # a Gaussian has no bounds
        self.observations, dones = self._tensors(observations), terminated | truncated
        self.episode_length_buf = torch.where(dones, 0, self.episode_length_buf + 1)
        return self.observations, rewards.float(), dones.long(), {}

    def _tensors(self, observations):
        image = observations["image"].permute(0, 3, 1, 2).float() / 255
        return TensorDict({"image": image}, batch_size=[self.num_envs])


model = {
    "class_name": "rsl_rl.models:CNNModel",
    "hidden_dims": [128],
    "cnn_cfg": {"output_channels": [16, 32, 32], "kernel_size": 4, "stride": 2},
}
gaussian = {"class_name": "rsl_rl.modules:GaussianDistribution", "init_std": 0.5}
settings = {
    "num_steps_per_env": HORIZON,
    "save_interval": 50,
    "obs_groups": {"actor": ["image"], "critic": ["image"]},
    "actor": {**model, "distribution_cfg": gaussian},
    "critic": model,
    "algorithm": {"class_name": "rsl_rl.algorithms:PPO", "gamma": 1.0, "num_learning_epochs": 2, "num_mini_batches": 4},
}
torch.manual_seed(args.seed)
options = dict(option.split("=", 1) for option in args.env_options)
envs = gym.make_vec(IDS.get(args.env, args.env), num_envs=args.num_envs, autoreset_mode="SameStep", **options)
runner = OnPolicyRunner(RslRlEnv(envs, args.seed), settings, log_dir=args.out, device="cpu")
runner.learn(args.updates)
envs.close()
