"""The real AgileX Piper: what may be commanded, and the CAN frames that command it."""
