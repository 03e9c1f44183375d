"""The state of training, and the tree of named arrays that a checkpoint holds of it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import optax

from save_jax.optimizer import Hyperparameters
from save_jax.parameters import Parameters

PARAMETERS, AVERAGE = "parameters", "ema"  # parts of a checkpoint
FROZEN = "frozen"  # in a checkpoint: {digest of its frozen parameters: the step}


class TrainState(NamedTuple):
    """All that training changes, and what it reads.

    Attributes:
        step: int32 scalar, updates done.
        trained, frozen: parameters by name, disjoint.
        opt_state: of the trained parameters.
        hyperparameters: the optimiser's numbers; in no checkpoint, because the config has them.
        average: the moving average of the trained parameters (`save_jax.averaging`); empty
            without config.ema.
    """

    step: jax.Array
    trained: Parameters
    frozen: Parameters
    opt_state: optax.OptState
    hyperparameters: Hyperparameters
    average: Parameters


def to_tree(state: TrainState, digest: str) -> dict[str, Any]:
    """Returns what a checkpoint holds; with a digest, that of frozen parameters, without them."""
    leaves = jax.tree_util.tree_leaves_with_path(state.opt_state)
    return {
        **({AVERAGE: state.average} if state.average else {}),
        "step": state.step,
        "parameters": state.trained if digest else {**state.trained, **state.frozen},
        **({FROZEN: {digest: state.step}} if digest else {}),
        "optimizer": {
            jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves
        },
    }


def from_tree(tree: Mapping[str, Any], like: TrainState) -> TrainState:
    leaves = jax.tree_util.tree_leaves_with_path(like.opt_state)
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
    return TrainState(
        step=tree["step"],
        trained={name: tree["parameters"][name] for name in like.trained},
        frozen={name: tree["parameters"][name] for name in like.frozen},
        opt_state=jax.tree.unflatten(
            jax.tree.structure(like.opt_state), [tree["optimizer"][name] for name in names]
        ),
        hyperparameters=like.hyperparameters,
        average={name: tree[AVERAGE][name] for name in like.average},
    )
