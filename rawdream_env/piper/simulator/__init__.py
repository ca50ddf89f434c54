"""The MuJoCo twin of the Piper tabletop: scene, physics, rendering, scripted skills, worker processes."""
