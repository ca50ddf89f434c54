"""Train with TRL's GRPOTrainer in the dream or in the simulator: its arguments, callbacks and trackers, our rollouts.

pip install 'rawdream-env[trl]'
python examples/trl_grpo.py --updates 1 --groups 1 --num-envs 8         the smallest: 9 s on one processor core
python examples/trl_grpo.py --updates 2                                 30 s, 32 rollouts or more per update
python examples/trl_grpo.py --updates 2 --env rawdream/PiperSim-v0      12 s
"""

import argparse

import gymnasium as gym
from trl import GRPOConfig

from rawdream_env.policies import load_policy
from rawdream_env.trainers.trl import EnvGRPOTrainer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--env", default="rawdream/PiperDream-v0", help="id of an environment")
parser.add_argument("--policy", default="embedded", help="the policy to improve: a name, folder or hub id")
parser.add_argument("--num-envs", type=int, default=32)
parser.add_argument("--groups", type=int, default=4, help="groups of 8 rollouts per update")
parser.add_argument("--updates", type=int, default=10)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", default="runs/trl", help="folder for logs and the policy")
parser.add_argument("--env-options", nargs="*", default=[], metavar="KEY=VALUE", help="for example judge=scripted")
args = parser.parse_args()

options = dict(pair.split("=", 1) for pair in args.env_options)
env = gym.make_vec(args.env, num_envs=args.num_envs, autoreset_mode="Disabled", **options)
policy = load_policy(args.policy)
settings = GRPOConfig(
    args.out, num_generations=8, per_device_train_batch_size=8 * args.groups, gradient_accumulation_steps=1,
    max_steps=args.updates, learning_rate=1e-4, lr_scheduler_type="constant", temperature=0.7, epsilon=0.2,
    epsilon_high=0.28, loss_type="grpo",
    bf16=False, use_cpu=True, seed=args.seed, logging_steps=1, save_strategy="no", report_to="none",
)  # fmt: skip
trainer = EnvGRPOTrainer(policy, env, settings)
trainer.train()
for line in trainer.state.log_history:
    if "success_rate" in line:
        print(
            f"step {line['step']}: success {100 * line['success_rate']:.0f} % (n={line['n']:.0f}), loss {line['loss']:.3g}"
        )
policy.save_pretrained(f"{args.out}/policy")
env.close()
