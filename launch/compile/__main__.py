"""Runs `python -m launch.compile`, which is defined in `launch.compile.command`."""

import sys

from launch.compile.command import main

if __name__ == "__main__":
    sys.exit(main())
