"""Checks that others can run on their own environments."""
