"""Wan's video transformer as a causal, action-conditioned world model."""
