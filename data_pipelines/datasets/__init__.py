"""The data sets that preparation knows, by name.

A data set is a module with

- `VARIANTS: tuple[str, ...]`, the first being the default;
- `RECIPE: dict[str, int]`, the fields of Recipe in which this data set differs from the default;
- `read_annotations(root, variant) -> Annotations`, which raises UserError naming every file it
  looked for and did not find. Transcripts are not read there;
- `asr_file(root) -> str`, the path of its file of transcripts, which need not exist.
"""

import importlib
import types

from save_jax.errors import UserError

# Modules are named, not imported, so that one data set never depends on the imports of another.
DATASETS = {
    name: f"data_pipelines.datasets.{name}"
    for name in ("charades", "demo", "folder", "lsmdc", "msrvtt", "vatex")
}


def load_dataset(name: str) -> types.ModuleType:
    """Returns the data set module called `name`; raises UserError when there is none."""
    if name not in DATASETS:
        raise UserError(f"expected a data set out of {', '.join(sorted(DATASETS))}, found {name!r}")
    return importlib.import_module(DATASETS[name])


def check_variant(name: str, variant: str | None) -> str:
    """Returns `variant`, or if empty the default of data set `name`; UserError if unknown."""
    variants = load_dataset(name).VARIANTS
    if variant and variant not in variants:
        raise UserError(
            f"expected a variant of {name} out of {', '.join(variants)}, found {variant!r}"
        )
    return variant or variants[0]
