"""Measures the training step and its utilisation against the same step in plain PyTorch.

The batch is random and already in memory; `input` measures reading. PyTorch's step is that of the
model in --reference, by default the one that the tests compare with, with fused attention and, in
bfloat16, autocast. It runs in a separate process, and the two take turns. Utilisation is the step's
floating-point operations per second over those of one large matrix product, measured in the same
run.
"""

import argparse
import dataclasses
import importlib.util
import json
import multiprocessing
import os
import pathlib
import statistics
import sys
import time
import types
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from launch.benchmark import flags
from launch.compile import program
from save_jax import config as configuration
from save_jax import sharding, train
from save_jax.batch import Batch
from save_jax.errors import UserError
from save_jax.flops import count_flops
from save_jax.models.save import SAVEConfig

# SAVE in plain PyTorch: part of a clone of the repository, not of an installed package.
REFERENCE = pathlib.Path(__file__).parents[2] / "tests/support/reference.py"
TOTAL_STEPS = 1000  # of the schedule; its first steps are measured


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds this command's flags."""
    flags.add_step_flags(parser, steps=3)
    parser.add_argument("--no_torch", action="store_true", help="do not measure PyTorch")
    parser.add_argument(
        "--reference",
        type=pathlib.Path,
        default=REFERENCE,
        metavar="FILE.py",
        help="SAVE in PyTorch (default: tests/support/reference.py of the clone)",
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measures everything, prints a table and a line of JSON; returns what the JSON says.

    Raises:
        UserError: a flag or the config is wrong, or PyTorch or --reference is missing.
    """
    config = flags.config_of(options)
    configuration.set_matmul_precision(config)
    model = configuration.model_config(config)
    batch = random_batch(model, config)
    torch_turn = None
    if not options.no_torch:
        torch_turn = _start_torch(options.reference, config, model, batch)
    ours, flops, compile_seconds = _our_turn(config, model, batch)

    seconds: dict[str, list[float]] = {"jax": [], "torch": []}
    ours(1)  # the first call of each is slower than the others
    if torch_turn:
        torch_turn(1)
    for _ in range(options.turns):
        seconds["jax"] += ours(options.steps)
        if torch_turn:
            seconds["torch"] += torch_turn(options.steps)
    best = matrix_product_rate(config["dtype"]) * jax.device_count()

    step = statistics.median(seconds["jax"])
    result = {
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "dtype": config["dtype"],
        "batch": config["batch_size"],
        "compile_seconds": compile_seconds,
        "step_seconds": step,
        "clips_per_second": config["batch_size"] / step,
        "flops": flops,
        "matrix_product_flops_per_second": best,
        "utilisation": flops / step / best,
    }
    if torch_turn:
        theirs = statistics.median(seconds["torch"])
        result |= {"torch_step_seconds": theirs, "ratio_to_torch": theirs / step}
        torch_turn(0)
    _print(result)
    print(json.dumps(result))
    return result


def random_batch(model: SAVEConfig, config: dict[str, Any]) -> Batch:
    """Returns random clips of a config's sizes, all with sound and speech."""
    rng = np.random.default_rng(0)
    end = model.clip.vocab_size - 1  # the last token of a text, where its embedding is read
    shapes = program.batch_shapes(config, model, config["batch_size"], training=True)

    def made(shape: jax.ShapeDtypeStruct | None) -> np.ndarray | None:
        if shape is None:
            return None
        if shape.dtype == bool:
            return np.ones(shape.shape, bool)
        if shape.dtype == np.uint8:
            return rng.integers(0, 256, shape.shape, np.uint8)
        if shape.dtype == np.int32:
            ids = rng.integers(1, end, shape.shape, np.int32)
            ids[..., -1] = end
            return ids
        return rng.standard_normal(shape.shape).astype(shape.dtype)

    return Batch(*map(made, shapes))._replace(index=np.arange(config["batch_size"], dtype=np.int32))


def matrix_product_rate(dtype: str) -> float:
    """Returns the most floating-point operations per second of a large product on one device."""
    size = 2048 if jax.default_backend() == "cpu" else 8192
    a = jnp.ones((size, size), dtype)
    product = jax.jit(lambda a: a @ a)
    product(a).block_until_ready()
    times = []
    for _ in range(10):
        start = time.perf_counter()
        product(a).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


Turn = Callable[[int], list[float]]  # takes that many steps; returns the seconds of each


def _our_turn(config: dict[str, Any], model: SAVEConfig, batch: Batch) -> tuple[Turn, float, float]:
    """Returns our step, its floating-point operations, and the seconds that it took to compile."""
    mesh = sharding.make_mesh(config["mesh"])
    sharding.check_batch_size("batch_size", config["batch_size"], mesh)
    rates = configuration.optimizer_config(config, TOTAL_STEPS)
    structure, state = train.create_state(model, rates, config["seed"], mesh)
    step = train.make_train_step(
        structure, rates, configuration.loss_config(config), mesh, config["micro_batch"]
    )
    on_device = sharding.put_batch(batch, mesh)
    flops = count_flops(jax.make_jaxpr(step)(state, on_device))
    start = time.perf_counter()
    compiled = train.jit_train_step(step, state).lower(state, on_device).compile()
    compile_seconds = time.perf_counter() - start

    def turn(steps: int) -> list[float]:
        nonlocal state
        seconds = []
        for _ in range(steps):
            start = time.perf_counter()
            state, scalars = compiled(state, on_device)
            jax.block_until_ready(scalars)
            seconds.append(time.perf_counter() - start)
        return seconds

    return turn, flops, compile_seconds


def _start_torch(
    file: pathlib.Path, config: dict[str, Any], model: SAVEConfig, batch: Batch
) -> Turn:
    """Returns PyTorch's step, in a process that waits while it is not its turn."""
    missing = None
    if not file.is_file():
        missing = f"{file}, which does not exist"
    elif not importlib.util.find_spec("torch"):
        missing = "the package 'torch', which is not installed"
    if missing:
        raise UserError(
            f"PyTorch's step needs {missing}: run this in a clone of the repository after "
            "pip install -e '.[test]', or give --no_torch"
        )
    if not (model.sound_weight and model.speech_weight and config["loss"]["soft_albef_weight"]):
        raise UserError(
            "PyTorch's step exists for SAVE only, with sound, speech and soft-ALBEF: for another "
            "model, give --no_torch"
        )
    clip, ast = dataclasses.asdict(model.clip), dataclasses.asdict(model.ast)
    sizes = dict(
        clip,
        fbank_frames=ast["fbank_frames"],
        mel_bins=ast["mel_bins"],
        audio_width=ast["width"],
        audio_layers=ast["layers"],
        audio_heads=ast["heads"],
        audio_patch=ast["patch_size"],
        audio_stride=ast["stride"],
        fusion_layers=model.fusion_layers,
        fusion_heads=model.fusion_heads,
        queries=model.audio_queries,
    )
    here, there = multiprocessing.Pipe()
    arguments = (there, file, sizes, batch, config, jax.default_backend() == "gpu")
    process = multiprocessing.get_context("spawn").Process(
        target=_torch_process, args=arguments, daemon=True
    )
    # OpenMP's waiting threads would otherwise spin, and take processors from our step.
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    process.start()

    def turn(steps: int) -> list[float]:
        try:
            here.send(steps)
            return here.recv()
        except (EOFError, BrokenPipeError) as error:
            raise UserError("PyTorch's process ended: see its message above") from error

    return turn


def _load(file: pathlib.Path) -> types.ModuleType:
    """Imports a Python file that belongs to no package."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None  # as for every name that ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


def _torch_process(
    orders: Connection,
    file: pathlib.Path,
    sizes: dict[str, int],
    batch: Batch,
    config: dict[str, Any],
    on_gpu: bool,
) -> None:
    """Takes as many steps as each order says, and sends back the seconds of each; 0 ends it."""
    import torch

    reference, loss = _load(file), config["loss"]
    torch.set_num_threads(os.cpu_count() or 1)
    device = torch.device("cuda" if on_gpu else "cpu")
    torch.set_default_device(device)
    reference.ASTAttention.forward = _fused_attention
    model = reference.SAVE(reference.Sizes(**sizes))
    parameters = dict(model.named_parameters())
    for name, value in parameters.items():
        value.requires_grad_(reference.PEAK_RATES[reference.group_of(name)] > 0)
    adam = reference.BertAdam(parameters, TOTAL_STEPS)
    arrays = {
        name: torch.tensor(value, device=device)
        for name, value in batch._asdict().items()
        if value is not None
    }

    def step() -> None:
        for value in parameters.values():
            value.grad = None
        with torch.autocast(device.type, torch.bfloat16, enabled=config["dtype"] == "bfloat16"):
            text = model.clip.text(arrays["caption_ids"])
            video = model.video(
                *(arrays[name] for name in ("frames", "frame_mask", "fbank", "transcript_ids"))
            )
        text, video = text.float(), type(video)(*(x.float() for x in video))
        margin = (loss[key] for key in ("margin_beta", "margin_delta"))
        contrastive = reference.contrastive(
            text, video, arrays["frame_mask"], model.clip.logit_scale, *margin
        )
        soft_albef = reference.soft_albef(
            video.visual,
            video.audio,
            *(arrays[name] for name in ("teacher_video", "teacher_audio", "has_audio")),
        )
        (contrastive + loss["soft_albef_weight"] * soft_albef).backward()
        adam.step()
        if on_gpu:
            torch.cuda.synchronize()

    while steps := orders.recv():
        seconds = []
        for _ in range(steps):
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
        orders.send(seconds)
    orders.send([])


def _fused_attention(self: Any, x: Any) -> Any:
    """Computes the reference's attention of AST with PyTorch's fused kernel."""
    import torch

    batch, tokens, width = x.shape
    qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads)
    out = torch.nn.functional.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))
    return self.proj(out.transpose(1, 2).reshape(batch, tokens, width))


def _print(result: dict[str, Any]) -> None:
    print(f"{result['device']}, {result['dtype']}, batch {result['batch']}")
    rows = [("", "s/step", "clips/s")]
    rows.append(("save_jax", f"{result['step_seconds']:.3f}", f"{result['clips_per_second']:.2f}"))
    if "torch_step_seconds" in result:
        theirs = result["torch_step_seconds"]
        rows.append(("PyTorch", f"{theirs:.3f}", f"{result['batch'] / theirs:.2f}"))
    for name, step, clips in rows:
        print(f"{name:<10}{step:>10}{clips:>10}")
    if "ratio_to_torch" in result:
        print(f"save_jax reaches {result['ratio_to_torch']:.2f} times PyTorch's clips/s")
    print(
        f"{result['flops'] / 1e9:,.0f} GFLOP per step, {result['utilisation']:.1%} of a matrix "
        f"product's {result['matrix_product_flops_per_second'] / 1e9:,.0f} GFLOP/s; compiled in "
        f"{result['compile_seconds']:.0f} s"
    )
