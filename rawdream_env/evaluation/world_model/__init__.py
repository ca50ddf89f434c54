"""A world model against recorded episodes."""
