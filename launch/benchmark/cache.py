"""Measures the training step with and without a cache of the frozen encoders' outputs.

For one config, with CLIP and AST frozen, on prepared data: writes a cache, then trains alternately
with it and without. Both ways use the functions of the training loop, reading included: a step's
time runs from the request for its batch to its loss and the updated state.
"""

import argparse
import json
import pathlib
import statistics
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import jax

from launch.benchmark import flags
from save_jax import config as configuration
from save_jax import sharding, train
from save_jax.cache import build
from save_jax.data import Splits

FROZEN = {"clip": 0.0, "clip_stem": 0.0, "ast": 0.0}  # learning rates


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds this command's flags."""
    flags.add_step_flags(parser, steps=2)
    parser.add_argument(
        "--data", required=True, metavar="DIR", help="a prepared directory, like config.data.dir"
    )
    parser.add_argument(
        "--dtype", default="float16", help="dtype of AST's cached states (default: %(default)s)"
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measures everything, prints a table and a line of JSON; returns what the JSON says.

    Raises:
        UserError: a flag or the config is wrong, or --data is not a prepared directory.
    """
    frozen = [f"--config.optimizer.{group}={rate}" for group, rate in FROZEN.items()]
    config = flags.config_of(options, [*frozen, f"--config.data.dir={options.data}"])
    with tempfile.TemporaryDirectory(prefix="save_jax-benchmark-") as folder:
        started = time.monotonic()
        split = config["data"]["train_split"]
        build.run(config, folder, splits=[split], dtype=options.dtype)
        writing = time.monotonic() - started
        size = sum(path.stat().st_size for path in pathlib.Path(folder).rglob("*.npy"))
        total = 1 + options.turns * options.steps
        ways = {
            "computed": steps(config, total),
            "cached": steps({**config, "cache": {"dir": folder}}, total),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        losses: dict[str, list[float]] = {name: [] for name in ways}
        compiling = {name: next(way)[0] for name, way in ways.items()}
        for _ in range(options.turns):
            for name, way in ways.items():
                for _ in range(options.steps):
                    elapsed, loss = next(way)
                    seconds[name].append(elapsed)
                    losses[name].append(loss)
    step = {name: statistics.median(found) for name, found in seconds.items()}
    result = {
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "dtype": config["dtype"],
        "batch": config["batch_size"],
        "step_seconds": step,
        "clips_per_second": {name: config["batch_size"] / x for name, x in step.items()},
        "first_step_seconds": compiling,
        "ratio": step["computed"] / step["cached"],
        "largest_difference_of_losses": max(
            abs(a - b) for a, b in zip(losses["computed"], losses["cached"], strict=True)
        ),
        "cache_bytes": size,
        "writing_seconds": writing,
    }
    for name, x in step.items():
        print(f"{name:<10}{x:>10.3f} s per step{config['batch_size'] / x:>12.2f} clips/s")
    print(
        f"the cache ({size / 1e6:.1f} MB) gives {result['ratio']:.1f} times the clips/s; losses "
        f"differ by up to {result['largest_difference_of_losses']:.1e}"
    )
    print(json.dumps(result))
    return result


def steps(config: dict[str, Any], count: int) -> Iterator[tuple[float, float]]:
    """Trains step by step; yields the seconds and the loss of each. The first step compiles."""
    configuration.set_matmul_precision(config)
    model, loss = configuration.model_config(config), configuration.loss_config(config)
    rates = configuration.optimizer_config(config, count)
    mesh = sharding.make_mesh(config["mesh"])
    sharding.check_batch_size("batch_size", config["batch_size"], mesh)
    data = Splits(config)
    training = data.training()
    structure, state = train.create_state(model, rates, config["seed"], mesh)
    data.use_cache({**state.trained, **state.frozen}, rates, mesh)
    step = train.jit_train_step(
        train.make_train_step(structure, rates, loss, mesh, config["micro_batch"]), state
    )
    batches = sharding.prefetch(training.batches(0, count), mesh)
    for _ in range(count):
        started = time.monotonic()
        _, batch = next(batches)
        state, scalars = step(state, batch)
        value = float(scalars["loss"])
        # The loss is ready before the updated state is.
        jax.block_until_ready(state)
        yield time.monotonic() - started, value
