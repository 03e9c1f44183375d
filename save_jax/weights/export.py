"""Our parameters as files for others: the reference's PyTorch checkpoint, and safetensors."""

import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from save_jax.weights import table
from save_jax.weights.files import pytorch, safetensors
from save_jax.weights.files.recognise import CONFIG
from save_jax.weights.names import save

FORMATS = ("save-pytorch", "safetensors")
# "lossless": as the source of an import had it, else the reference's, and float32 for each tensor
# that float16 would round. "reference": what the published checkpoints have, rounded if need be.
DTYPES = ("lossless", "reference", "float32")

# Kept in float32 by the reference, although inside `clip.`: LayerNorms, embeddings, positions,
# tokens and the temperature.
_FLOAT32 = re.compile(
    r"\.(ln_\w+|norm\d?)\.(weight|bias)$|embedding(\.weight)?$|\.pos_embed$|_token$|\.logit_scale$"
)


def reference_dtype(name: str) -> str:
    """Returns the dtype of a tensor in published checkpoints, by its name (spec section 12)."""
    half = name.startswith("clip.") and not _FLOAT32.search(name)
    return "float16" if half else "float32"


def to_state(
    parameters: table.State, dtypes: str = "lossless", names: Mapping[str, str] = {}
) -> tuple[dict[str, np.ndarray], int]:
    """Turns parameters into the reference's state dictionary.

    Args:
        parameters: by our names, the whole model's or a part.
        dtypes: one of `DTYPES`.
        names: name -> dtype in the PyTorch file that the parameters were imported from; its
            spelling is used. Only its entries for these parameters count.

    Returns:
        The state, and how many tensors the reference has in float16 and this keeps in float32.
    """
    spelled = {save.TABLE.canonical(name): name for name in names}
    state, kept = {}, 0
    for ours, value in parameters.items():
        for name, array in table.to_torch(save.TABLE, {ours: value}).items():
            dtype = "float32" if dtypes == "float32" else reference_dtype(name)
            if dtypes == "lossless":
                dtype = names.get(spelled.get(name), dtype)
            with np.errstate(over="ignore"):
                cast = array.astype(table.dtype(dtype))
            if dtypes == "lossless" and not np.array_equal(cast.astype(np.float32), array):
                cast, kept = array, kept + 1
            state[spelled.get(name, name)] = cast
    return state, kept


def write(
    path: pathlib.Path,
    parameters: table.State,
    form: str,
    dtypes: str = "lossless",
    names: Mapping[str, str] = {},
    config: Mapping[str, Any] | None = None,
) -> int:
    """Writes a file in one of `FORMATS`; see `to_state`. Safetensors have our names, float32.

    They also say by which config (`config.deciding`) the parameters were trained, if any is given;
    PyTorch's state dictionaries have no place for it.

    Returns:
        As `to_state`; 0 for safetensors.
    """
    if form == "safetensors":
        facts = {} if config is None else {CONFIG: json.dumps(config)}
        safetensors.write(path, {k: np.asarray(v) for k, v in parameters.items()}, facts)
        return 0
    state, kept = to_state(parameters, dtypes, names)
    pytorch.write(path, state)
    return kept
