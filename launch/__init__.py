"""Commands around training: sweeps, reports, compiling for a TPU without one, benchmarks."""

from save_jax import errors as errors  # first: with it, Ctrl-C ends a start with one message
