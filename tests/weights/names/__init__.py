"""Tests of save_jax/weights/names."""
