"""Shared by all trainers: run folders, the training loop, processes, interrupts."""
