"""Cache of frozen encoders' outputs: written once, then read at every step.

`python -m save_jax.cache` writes a cache (`save_jax/cache/__main__.py`), `config.cache.dir` trains
and evaluates from one; it is on a disk or in a bucket. Of each array, DIR/SPLIT/ARRAY/ holds shards
of so many clips (or captions) each, and DIR/SPLIT/meta.json says what the array was made of
(weights, data and sizes) and, once all of it is there, the shards' checksums. A run of other
weights, data or sizes is refused.

`plan` says what there is to cache, `shards` how it is stored; `writing` and `reading` do that, and
`read_ahead` reads before the step asks. Nothing here needs TensorFlow: shards are NumPy's files.
"""

from save_jax.cache.plan import (
    ARRAYS,
    ONLY_TRAINING,
    PARTS,
    Plan,
    Split,
    differences,
    digest,
    frozen_parts,
    plans,
)
from save_jax.cache.reading import Cache, has_split, open_split

__all__ = (
    "ARRAYS",
    "ONLY_TRAINING",
    "PARTS",
    "Cache",
    "Plan",
    "Split",
    "differences",
    "digest",
    "frozen_parts",
    "has_split",
    "open_split",
    "plans",
)
