"""The same policy from the same starts in the dream and in the simulator."""
