"""GRPO in imagination."""
