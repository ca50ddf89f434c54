"""Data sets: LeRobotDataset v3.0 folders, and instructions for play in hindsight. Import the modules directly."""
