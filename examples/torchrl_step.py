"""Collect a rollout in the dream with TorchRL's GymWrapper, as one TensorDict.

    pip install 'rawdream-env[torchrl]'
    python examples/torchrl_step.py

Make the environment with ``autoreset_mode="Disabled"``: TorchRL then resets the rows that are over. (With SameStep it
loses the last observation of an episode when observations are dicts and infos contain strings.)
"""

import argparse

import gymnasium as gym
from torchrl.envs import GymWrapper

import rawdream_env  # noqa: F401  (registers the ids)

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--env", default="rawdream/PiperDream-v0")
parser.add_argument("--steps", type=int, default=10, help="action chunks per environment")
parser.add_argument("--env-options", nargs="*", default=[], metavar="KEY=VALUE", help="for example world_model=null")
args = parser.parse_args()

options = dict(option.split("=", 1) for option in args.env_options)
env = GymWrapper(gym.make_vec(args.env, num_envs=2, autoreset_mode="Disabled", **options))
env.set_seed(0)
data = env.rollout(args.steps, break_when_any_done=False)  # random actions
print(data)
print("rewards", data["next", "reward"].squeeze(-1).tolist())
print("over   ", data["next", "done"].squeeze(-1).int().tolist())
env.close()
