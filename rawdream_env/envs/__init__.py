"""Environments: the shared base, the dream, the simulator, and single-environment views of them."""
