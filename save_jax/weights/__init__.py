"""Weights of other implementations: their names and ours, and the two ways between them.

The tables in `names` are the only place that knows PyTorch's names; `load` reads what
users have, `python -m save_jax.weights` imports and exports. PyTorch is imported only to read or
write its own pickles.
"""

from save_jax.weights.loading import Loaded, load, parse

__all__ = ["Loaded", "load", "parse"]
