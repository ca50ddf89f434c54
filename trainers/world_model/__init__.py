"""Training of world models."""
