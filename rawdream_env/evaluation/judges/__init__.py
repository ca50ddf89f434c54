"""Evaluation of a judge on episodes with a known outcome."""
