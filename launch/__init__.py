"""Around training: comparing runs."""

from save_jax import errors as errors  # first: with it, Ctrl-C ends a start with one message
