"""Train PPO of stable-baselines3 in the dream or in the simulator: only the id changes.

    pip install 'rawdream-env[sb3]'
    python examples/sb3_ppo.py --steps 2000
    python examples/sb3_ppo.py --steps 2000 --env rawdream/PiperSim-v0

The example shows the interface. PPO from scratch does not learn four manipulation tasks from a sparse reward in 2,000 chunks;
use ``rawdream policy grpo`` to improve a pre-trained policy.
"""

import argparse

import gymnasium as gym
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import VecMonitor

import rawdream_env  # noqa: F401  (registers the ids)
from rawdream_env.wrappers import SB3VecEnv

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--env", default="rawdream/PiperDream-v0")
parser.add_argument("--num-envs", type=int, default=4)
parser.add_argument("--steps", type=int, default=2000, help="action chunks over all environments")
parser.add_argument("--env-options", nargs="*", default=[], metavar="KEY=VALUE", help="for example world_model=null")
args = parser.parse_args()

options = dict(option.split("=", 1) for option in args.env_options)
envs = gym.make_vec(args.env, num_envs=args.num_envs, autoreset_mode="SameStep", **options)
model = PPO(
    "MultiInputPolicy",
    VecMonitor(SB3VecEnv(envs)),
    n_steps=64,
    batch_size=64,
    n_epochs=2,
    policy_kwargs={"features_extractor_kwargs": {"cnn_output_dim": 64}, "net_arch": [64]},
    seed=0,
    verbose=1,
)
model.learn(args.steps)
envs.close()
