"""The data sets that preparation knows, by name.

A data set is a module with `VARIANTS: tuple[str, ...]`, the first being the default, and
`read_annotations(root, variant) -> dict[split name, list[Clip]]`, which raises UserError naming
every file it looked for and did not find.
"""

import importlib
import types

from save_jax.errors import UserError

# Modules are named, not imported, so that using one data set never pays for, or fails by, another.
DATASETS = {
    "demo": "data_pipelines.datasets.demo",
    "msrvtt": "data_pipelines.datasets.msrvtt",
}


def load_dataset(name: str) -> types.ModuleType:
    """Returns the data set module called `name`; UserError when there is none."""
    if name not in DATASETS:
        raise UserError(f"expected a data set out of {sorted(DATASETS)}, found {name!r}")
    return importlib.import_module(DATASETS[name])


def check_variant(name: str, variant: str | None) -> str:
    """Returns `variant`, or for none the default of data set `name`; UserError when unknown."""
    variants = load_dataset(name).VARIANTS
    if variant and variant not in variants:
        raise UserError(f"expected a variant of {name} out of {list(variants)}, found {variant!r}")
    return variant or variants[0]
