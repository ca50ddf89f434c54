"""Recipes of several stages that make shipped checkpoints."""
