"""Simulators: the MuJoCo twin of the Piper tabletop, scripted drivers and worker processes."""
