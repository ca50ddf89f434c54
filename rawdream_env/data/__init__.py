"""Data sets in LeRobotDataset v3.0 folders: reading, writing, collecting, importing. Import the modules directly."""
