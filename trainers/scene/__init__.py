"""Training of the scene world model's parts."""
