"""Train PPO of RLlib in the dream or in the simulator: only the id changes.

    pip install rawdream-env 'ray[rllib]'
    python examples/rllib_ppo.py --updates 2
    python examples/rllib_ppo.py --updates 2 --env sim

Untested: written for ray 2.60; no update has been run yet.

RLlib copies single environments itself. The example shows the interface. A Gaussian policy from scratch does not learn four
manipulation tasks from a sparse reward in a few updates; ``sb3_ppo.py`` and ``torchrl_ppo.py`` start from the bundled
policy.
"""

import argparse

import gymnasium as gym
import numpy as np
import ray
from ray.rllib.algorithms.ppo import PPOConfig
from ray.tune.registry import register_env

from rawdream_env.wrappers import FlatAction, ImageOnly

IDS = {"dream": "rawdream/PiperDream-v0", "sim": "rawdream/PiperSim-v0"}
HORIZON = 8  # chunks in an episode

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--env", default="dream", help="dream, sim or the id of an environment")
parser.add_argument("--num-envs", type=int, default=16, help="environments per runner")
parser.add_argument("--runners", type=int, default=0, help="processes with environments; 0: this one")
parser.add_argument("--updates", type=int, default=10)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", help="folder for a checkpoint")
parser.add_argument("--env-options", nargs="*", default=[], metavar="KEY=VALUE", help="for example world_model=null")
args = parser.parse_args()


def make(config):
    """One environment."""
    import rawdream_env  # noqa: F401  (registers the ids, in every process)

    env = ImageOnly(FlatAction(gym.make(IDS.get(args.env, args.env), horizon=HORIZON, **config)))
    unit = gym.spaces.Box(0, 1, env.observation_space.shape, np.float32)  # RLlib does not scale images
    return gym.wrappers.TransformObservation(env, lambda image: image / np.float32(255), unit)


ray.init(include_dashboard=False, log_to_driver=False)
register_env("rawdream", make)
batch = HORIZON * args.num_envs * max(1, args.runners)
config = (
    PPOConfig()
    .environment("rawdream", env_config=dict(option.split("=", 1) for option in args.env_options))
    .env_runners(
        num_env_runners=args.runners,
        num_envs_per_env_runner=args.num_envs,
        rollout_fragment_length=HORIZON,
    )
    .training(gamma=1.0, lr=1e-4, train_batch_size_per_learner=batch, minibatch_size=max(2, batch // 4), num_epochs=2)
    .debugging(seed=args.seed)
)
algorithm = config.build_algo()
for update in range(args.updates):
    result = algorithm.train()["env_runners"]
    print(f"update {update + 1}: {result['num_episodes']} episodes, mean return {result['episode_return_mean']:.2f}")
if args.out:
    print("saved", algorithm.save_to_path(args.out))
algorithm.stop()
ray.shutdown()
