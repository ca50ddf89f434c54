"""Real arms and their software twins (to come)."""
