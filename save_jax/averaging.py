"""The exponential moving average of the trained parameters, which is evaluated beside them.

It is part of the state: sharded as the parameters, float32 as they are, and in each checkpoint, so
that a run that resumes ends with the same bits.
"""

from typing import cast

import jax
import jax.numpy as jnp
import optax

from save_jax import checkpoint
from save_jax.optimizer import Number
from save_jax.parameters import Parameters
from save_jax.train_state import AVERAGE


def start(trained: Parameters) -> Parameters:
    """Returns the average before the first step: a copy, as the step is given both to keep."""
    return jax.tree.map(jnp.copy, trained)


def update(average: Parameters, trained: Parameters, step: jax.Array, decay: Number) -> Parameters:
    """Returns the average after one more step.

    Update n, counted from 0, gives the average so far the weight min(decay, (1 + n)/(10 + n)), and
    the rest to the new parameters. So the initial ones soon count for nothing: else, short runs at
    a decay near 1 would end near where they began.

    Args:
        average: of the same names and shapes as `trained`.
        trained: the parameters after the update.
        step: updates done before it.
        decay: below 1.
    """
    decay = jnp.minimum(decay, (1 + step) / (10 + step))
    return cast(Parameters, optax.incremental_update(trained, average, 1 - decay))


def models(params: Parameters, average: Parameters) -> dict[str, Parameters]:
    """Returns what is evaluated: averaged parameters, of a run that has them, and parameters.

    Args:
        params: all of the model's.
        average: of those that train; empty for none.

    Returns:
        All of the model's parameters, by the name of their results: perhaps "ema", and "" last.
    """
    return ({AVERAGE: {**params, **average}} if average else {}) | {"": params}


def load(source: str, like: Parameters) -> Parameters:
    """Reads the average beside evaluated parameters; a run without config.ema has none.

    Args:
        source: a checkpoint.
        like: all of them (or abstract ones with shardings).

    Raises:
        UserError: the checkpoint is damaged.
    """
    names = checkpoint.parameter_shapes(source, AVERAGE)
    if not names:
        return {}
    return checkpoint.load_parameters(source, {name: like[name] for name in names}, AVERAGE)[1]
