"""SAVE: text-to-video retrieval with what is seen, heard and said, in JAX and Flax."""

import atexit
import sys

from save_jax.errors import interruptible_start, leave_if_interrupted

__version__ = "0.1.0"

# Python's name for a program while `python -m` imports the packages that hold it: this is a
# command's start, and no library's import.
if sys.argv[:1] == ["-m"]:
    interruptible_start()
    atexit.register(leave_if_interrupted)  # first of all, so it is called last
