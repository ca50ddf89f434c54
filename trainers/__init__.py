"""Trainers, each one file that reads like its algorithm: world model, judge, policy, GRPO, and all of them in turn."""
