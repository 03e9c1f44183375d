"""An example of a sweep: the demo at three rates of the new layers, two seeds each.

python -m launch.sweep --config=configs/demo_sweep.py --workdir=runs/sweep
"""

import itertools
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from configs import demo


def get_config(model: str = "save") -> ConfigDict:
    """Returns the demo; see configs/demo.py."""
    return demo.get_config(model)


def sweep() -> Iterator[dict[str, Any]]:
    """Yields a grid; any Python that yields dictionaries of overrides will do."""
    for rate, seed in itertools.product((3e-4, 1e-3, 3e-3), (0, 1)):
        yield {"optimizer.new": rate, "seed": seed}
