"""``python -m rawdream_env``: the same as the ``rawdream`` command."""

from __future__ import annotations

import sys

from rawdream_env.cli import main

if __name__ == "__main__":
    sys.exit(main())
