"""The AgileX Piper tabletop: everything that knows this robot and its scene."""
