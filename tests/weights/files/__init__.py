"""Tests of save_jax/weights/files."""
