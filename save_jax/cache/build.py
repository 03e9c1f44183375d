"""Builds a cache for a training run's config: its splits, its model, and then the arrays."""

from collections.abc import Sequence
from typing import Any

from save_jax import cache, compilation, optimizer, resume, sharding, train
from save_jax import config as configuration
from save_jax.cache import writing
from save_jax.data import open_splits
from save_jax.errors import UserError
from save_jax.parameters import Parameters
from save_jax.progress import say

SHOWN_PARTS = ", ".join(cache.PARTS)


def run(
    config: dict[str, Any],
    out: str,
    *,
    parts: Sequence[str] | None = None,
    splits: Sequence[str] | None = None,
    dtype: str = "float16",
    trust_archive: bool = False,
) -> None:
    """Writes a cache, or resumes an incomplete one.

    Args:
        config: a training run's.
        out: the cache's directory.
        parts, splits, dtype, trust_archive: as the flags.

    Raises:
        UserError: what is asked for is not frozen, does not fit, or `out` is of something else.
    """
    configuration.check(config)
    configuration.set_matmul_precision(config)
    compilation.use_cache(config["compilation_cache"])
    model = configuration.model_config(config)
    rates = configuration.optimizer_config(config, total_steps=1)
    mesh = sharding.make_mesh(config["mesh"])
    sharding.check_batch_size("eval_batch_size", config["eval_batch_size"], mesh)
    data = open_splits(config)
    structure, abstract = train.abstract_state(model, optimizer.ALL_FROZEN, mesh)
    parts = _chosen(parts, cache.frozen_parts(model, rates, abstract.frozen))
    names = splits or [config["data"]["train_split"], config["data"]["eval_split"]]
    opened = {name: data.to_cache(name, parts) for name in dict.fromkeys(names)}

    given: Parameters = {}
    if config["init_from"]:
        given = resume.load_weights(config, model, abstract.frozen, trust_archive=trust_archive)
    else:
        say(resume.RANDOM.format(seed=config["seed"]))
    _, state = train.create_state(model, optimizer.ALL_FROZEN, config["seed"], mesh, given)
    for name, (split, batches) in opened.items():
        trains = name == config["data"]["train_split"]
        writing.write(
            out,
            split,
            batches,
            model=model,
            structure=structure,
            params=state.frozen,
            parts=[part for part in parts if trains or part not in cache.ONLY_TRAINING],
            dtype=dtype,
            mesh=mesh,
            batch_size=config["eval_batch_size"],
        )
    say(f"train from it with --config.cache.dir={out}")


def _chosen(parts: Sequence[str] | None, frozen: Sequence[str]) -> Sequence[str]:
    parts = parts or ()
    if set(parts) - set(cache.PARTS):
        raise UserError(f"--parts={','.join(parts)}: expected some of {SHOWN_PARTS}")
    moving = [part for part in parts if part not in frozen]
    if moving:
        raise UserError(
            f"--parts={','.join(parts)}: {', '.join(moving)} would change while this config "
            "trains, or its model has no such branch. Frozen are "
            f"{', '.join(frozen)}; config.optimizer.clip=0 and config.optimizer.ast=0 freeze CLIP "
            "and AST."
        )
    if all(part == "teacher" for part in parts or frozen):
        raise UserError(
            "nothing to cache: no encoder is frozen. config.optimizer.clip=0 (and "
            ".clip_stem=0) freeze CLIP, config.optimizer.ast=0 freezes AST"
        )
    return parts or frozen
