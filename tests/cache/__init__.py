"""Tests of save_jax/cache, below the model; tests/test_cache.py has the command and the runs."""
