"""The command `python -m launch.compile`; what it does is in `launch.compile.command`."""

import sys

from launch.compile.command import main

if __name__ == "__main__":
    sys.exit(main())
