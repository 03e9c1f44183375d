"""The command `python -m launch.compile`; what it does is in `launch.compile.program`."""

import sys

from launch.compile.program import main

if __name__ == "__main__":
    sys.exit(main())
