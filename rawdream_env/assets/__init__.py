"""The embedded checkpoints: world model, judge, policy, start packs, and their model card."""
