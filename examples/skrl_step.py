"""Step the dream through skrl's wrap_env: observations, rewards and ends are torch tensors.

    pip install 'rawdream-env[skrl]'
    python examples/skrl_step.py

skrl flattens observations and actions (here 64*64*3 and 8*7 numbers) and expects SameStep autoreset.
"""

import argparse

import gymnasium as gym
import torch
from skrl.envs.wrappers.torch import wrap_env

import rawdream_env  # noqa: F401  (registers the ids)

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--env", default="rawdream/PiperDream-v0")
parser.add_argument("--steps", type=int, default=10, help="action chunks per environment")
parser.add_argument("--env-options", nargs="*", default=[], metavar="KEY=VALUE", help="for example world_model=null")
args = parser.parse_args()

options = dict(option.split("=", 1) for option in args.env_options)
env = wrap_env(gym.make_vec(args.env, num_envs=2, autoreset_mode="SameStep", **options), wrapper="gymnasium")
noise = torch.Generator().manual_seed(0)
observation, info = env.reset()
for step in range(args.steps):
    actions = torch.rand(env.num_envs, 56, generator=noise) * 2 - 1
    observation, reward, terminated, truncated, info = env.step(actions)
    over = (terminated | truncated).flatten().tolist()
    print(f"chunk {step}: observation {tuple(observation.shape)}, reward {reward.flatten().tolist()}, over {over}")
env.close()
