"""SAVE: text-to-video retrieval with what is seen, heard and said, in JAX and Flax."""

import sys

from save_jax.errors import interruptible_start

__version__ = "0.1.0"

# Python's name for a program while `python -m` imports the packages that hold it: this is a
# command's start, and no library's import.
if sys.argv[:1] == ["-m"]:
    interruptible_start()
