"""SAVE: text-to-video retrieval with what is seen, heard and said, in JAX and Flax."""

__version__ = "0.1.0"
