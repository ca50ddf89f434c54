"""Supervised training of policies."""
