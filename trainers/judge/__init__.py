"""Training of judges and reward models."""
