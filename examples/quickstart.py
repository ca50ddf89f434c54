"""Step a robot's dream like any Gymnasium environment, and write each episode as a gif.

    python examples/quickstart.py
    python examples/quickstart.py --env rawdream/PiperSim-v0      # the same loop in the simulator

Every success is imagined again with fresh noise (dual-noise verification). One that does not repeat is flagged, and its film
has an orange border. Random actions rarely succeed; the example shows the loop.
"""

import argparse

import gymnasium as gym

import rawdream_env  # noqa: F401  (registers the ids)
from rawdream_env.wrappers import DualNoiseVerification, Record

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--env", default="rawdream/PiperDream-v0")
parser.add_argument("--num-envs", type=int, default=4)
parser.add_argument("--steps", type=int, default=8, help="action chunks per environment; an episode has 8")
parser.add_argument("--videos", default="videos/quickstart", help="folder for the gifs")
parser.add_argument("--env-options", nargs="*", default=[], metavar="KEY=VALUE", help="for example world_model=null")
args = parser.parse_args()

options = dict(option.split("=", 1) for option in args.env_options)
envs = gym.make_vec(args.env, num_envs=args.num_envs, return_frames=True, **options)
if hasattr(envs.unwrapped, "replay"):  # a world model; a simulator has no noise to redraw
    envs = DualNoiseVerification(envs)
envs = Record(envs, args.videos)

envs.action_space.seed(0)
obs, info = envs.reset(seed=0)
print("tasks:", *info["instruction"], sep="\n  ")
for step in range(args.steps):
    obs, reward, terminated, truncated, info = envs.step(envs.action_space.sample())
    print(f"chunk {step}: image {obs['image'].shape}, reward {reward}, over {terminated | truncated}")
envs.close()
print(f"{envs.n_videos} films in {envs.folder}")
