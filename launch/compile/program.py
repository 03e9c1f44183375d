"""Traces and compiles a config's programs for devices that are not there, and measures them."""

import contextlib
import importlib.util
import math
import os
import pathlib
import re
import tempfile
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from data_pipelines.recipe import Recipe
from launch.compile import hlo, roofline
from launch.compile.roofline import CHIPS, GIB, Chip
from save_jax import config as configuration
from save_jax import evaluate, sharding, train
from save_jax.batch import Batch
from save_jax.errors import UserError
from save_jax.flops import count_flops
from save_jax.models.save import SAVEConfig

# Without these, the TPU compiler queries a metadata server, and takes a lock that is needed only by
# a user of real chips.
LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


class Target(NamedTuple):
    """The devices to compile for.

    Attributes:
        name: the topology, as the user gave it.
        devices: real devices, or descriptions of devices.
        platform: "tpu", "gpu" or "cpu".
        chip: the chip's published figures; None if unknown.
    """

    name: str
    devices: list[jax.Device]
    platform: str
    chip: Chip | None


class Measured(NamedTuple):
    """The requirements of one program on one chip.

    Attributes:
        arguments, output, temporaries, code: bytes; output without arrays aliased to arguments.
        needed: total bytes; if it does not compile, the bytes that the compiler says it would need.
        fits: whether it compiles and fits the chip.
        flops: floating-point operations of the chip's matrix products.
        compiler_flops: the compiler's own count, which takes a loop's body once.
        hbm_bytes: bytes moved between chip and HBM.
        collectives: kind -> the collectives of that kind.
        unknown_loops: loops whose length the compiled text does not give; counted once.
        seconds: compile time.
        limits: the least time by compute, memory and interconnect; None if unknown.
    """

    arguments: float
    output: float
    temporaries: float
    code: float
    needed: float
    fits: bool
    flops: float
    compiler_flops: float
    hbm_bytes: float
    collectives: dict[str, hlo.Collective]
    unknown_loops: int
    seconds: float
    limits: roofline.Roofline | None


def find_target(name: str) -> Target:
    """Returns the devices that a topology's name stands for.

    Raises:
        UserError: there is no such topology, or its compiler or devices are missing.
    """
    kind, _, shape = name.partition(":")
    if kind in CHIPS:
        return Target(name, _tpu_devices(kind, shape), "tpu", CHIPS[kind])
    if name == "here":
        devices = jax.devices()
        kinds = {chip.kind: chip for chip in CHIPS.values()}
        return Target(name, devices, devices[0].platform, kinds.get(devices[0].device_kind))
    if kind in ("cpu", "gpu") and re.fullmatch(r"[1-9][0-9]*", shape):
        return Target(name, _local_devices(kind, int(shape)), kind, None)
    known = "; ".join(chip.shapes for chip in CHIPS.values())
    raise UserError(
        f"--topology={name}: expected a TPU slice ({known}; other shapes of these chips too), "
        "cpu:N, gpu:N, or here"
    )


def _tpu_devices(kind: str, shape: str) -> list[jax.Device]:
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", shape):
        raise UserError(
            f"--topology={kind}:{shape}: expected {kind}: and the chips along each axis, such as "
            f"{CHIPS[kind].shapes}"
        )
    if not importlib.util.find_spec("libtpu"):
        raise UserError(
            "compiling for a TPU needs the package libtpu (Linux on x86-64). In a clone of the "
            "repository: pip install -e '.[compile]'"
        )
    for key, value in LIBTPU.items():
        os.environ.setdefault(key, value)
    options: dict[str, Any] = {}
    if kind == "v4":
        options["chip_config_name"] = "megacore"  # both cores as one device, as on Cloud TPU
    if re.fullmatch(r"1(x1)*", shape):
        options["chips_per_host_bounds"] = [1, 1, 1]
    try:
        return topologies.get_topology_desc(
            platform="tpu", topology_name=f"{kind}:{shape}", **options
        ).devices
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        raise UserError(
            f"--topology={kind}:{shape}: the TPU compiler knows no such slice ({error}); "
            f"try {CHIPS[kind].shapes}"
        ) from error


def _local_devices(kind: str, count: int) -> list[jax.Device]:
    if kind == "cpu" and "device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):  # JAX has its devices already
            jax.config.update("jax_num_cpu_devices", count)
    try:
        devices = jax.devices(kind)
    except RuntimeError as error:
        raise UserError(
            f"--topology={kind}:{count}: JAX finds no {kind} here, and its compiler for GPUs needs "
            "one. On a machine with a GPU, in a clone of the repository: pip install -e '.[cuda]', "
            "then --topology=here"
        ) from error
    if len(devices) < count:
        raise UserError(
            f"--topology={kind}:{count}: expected at most {len(devices)}, as many as JAX has here"
        )
    return devices[:count]


#### The programs of a run, with shapes instead of arrays.


def batch_shapes(config: dict[str, Any], model: SAVEConfig, size: int, *, training: bool) -> Batch:
    """Returns the shapes of a global batch of `size` clips for this config."""
    data = config["data"]
    frames, words, side = data["max_frames"], data["max_words"], model.clip.image_size

    def rows(dtype: str, *shape: int, wanted: float = True) -> jax.ShapeDtypeStruct | None:
        return jax.ShapeDtypeStruct((size, *shape), dtype) if wanted else None

    teacher = training and bool(config["loss"]["soft_albef_weight"])
    sound = bool(model.sound_weight)
    return Batch(
        frames=rows("uint8", frames, side, side, 3),
        frame_mask=rows("bool", frames),
        caption_ids=rows("int32", words, wanted=training),
        transcript_ids=rows("int32", words, wanted=model.speech_weight),
        fbank=rows("float16", model.ast.fbank_frames, model.ast.mel_bins, wanted=sound),
        has_audio=rows("bool", wanted=sound),
        teacher_video=rows("float32", Recipe().teacher_size, wanted=teacher),
        teacher_audio=rows("float32", Recipe().teacher_size, wanted=teacher),
        has_teacher=rows("bool", wanted=teacher),
        index=rows("int32"),
    )


def trace_programs(
    config: dict[str, Any],
    mesh: jax.sharding.Mesh,
    devices: Sequence[jax.Device],
    *,
    training_only: bool = False,
) -> dict[str, jax.stages.Traced]:
    """Traces the programs that `save_jax.main` compiles for this config; returns them by name.

    Args:
        config: all of its values.
        mesh: the mesh over which arrays are sharded.
        devices: the devices on which the programs would run.
        training_only: leaves out evaluation.

    Raises:
        UserError: the config does not fit the mesh, or contradicts itself.
    """
    configuration.check_run(config)
    if config["cache"]["dir"]:
        raise UserError(
            "config.cache.dir is set, but only programs without a cache are compiled here: give "
            "--config.cache.dir="
        )
    sharding.check_batch_sizes(config, mesh)
    model = configuration.model_config(config, devices)
    loss = configuration.loss_config(config)
    # The number of steps is an argument of the program; without data, an epoch's is unknown.
    rates = configuration.optimizer_config(config, config["steps"] or 1)
    structure, state = train.abstract_state(model, rates, mesh)
    step = train.jit_train_step(
        train.make_train_step(structure, rates, loss, mesh, config["micro_batch"]), state
    )
    # As in `save_jax.main`: otherwise a TPU would multiply float32 in bfloat16.
    with jax.default_matmul_precision(configuration.matmul_precision(config["dtype"])):
        batch = batch_shapes(config, model, config["batch_size"], training=True)
        programs = {"training step": step.trace(state, sharding.abstract_batch(batch, mesh))}
        if training_only:
            return programs
        evaluator = evaluate.Evaluator.of(config, structure, mesh)
        params = {**state.trained, **state.frozen}
        batch = batch_shapes(config, model, config["eval_batch_size"], training=False)
        most = config["eval_caption_batch_size"]
        shape = sharding.even_size(most, most, mesh.size), config["data"]["max_words"]
        ids = jax.ShapeDtypeStruct(shape, "int32", sharding=sharding.batch_sharding(mesh))
        programs["video embedding"] = evaluator.encode_video.trace(
            params, sharding.abstract_batch(batch, mesh)
        )
        programs["caption embedding"] = evaluator.encode_text.trace(params, ids)
    return programs


#### Their requirements.


def measure(traced: jax.stages.Traced, target: Target, dtype: str, flops: float) -> Measured:
    """Compiles a program and reads its requirements from the compiler.

    Args:
        traced: the program.
        target: the devices to compile for.
        dtype: dtype of its matrix products.
        flops: floating-point operations of the whole program, on all devices.
    """
    devices = len(target.devices)
    lowered = traced.lower()
    start = time.monotonic()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed = _out_of_memory(str(error))
        if not needed:
            raise
        unknown = (math.nan,) * 4
        return Measured(
            *unknown, needed, False, flops / devices, math.nan, math.nan, {}, 0,
            time.monotonic() - start, None,
        )  # fmt: skip
    seconds = time.monotonic() - start
    memory = compiled.memory_analysis()
    arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    output = memory.output_size_in_bytes - memory.alias_size_in_bytes
    code = memory.generated_code_size_in_bytes
    needed = arguments + output + temporaries + code
    program = hlo.Program(_text(lowered, compiled))
    collectives = program.collectives(devices)
    hbm_bytes = program.hbm_bytes()
    sent = math.fsum(each.bytes for each in collectives.values())
    chip = target.chip
    return Measured(
        arguments,
        output,
        temporaries,
        code,
        needed,
        chip is None or needed <= chip.memory,
        flops / devices,
        (compiled.cost_analysis() or {}).get("flops", math.nan),
        hbm_bytes,
        collectives,
        program.unknown_loops,
        seconds,
        roofline.roofline(chip, dtype, flops / devices, hbm_bytes, sent) if chip else None,
    )


def _text(lowered: jax.stages.Lowered, compiled: jax.stages.Compiled) -> str:
    """Returns a compiled program's text."""
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError:
        text = None
    if text is None:
        # libtpu 0.0.52 cannot print some of its programs for v6e. The text that it dumps while it
        # compiles is the same.
        with tempfile.TemporaryDirectory(prefix="save_jax-compile-") as folder:
            options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
            lowered.compile(compiler_options=options)
            (path,) = pathlib.Path(folder).glob("*.after_optimizations.txt")
            text = path.read_text()
    return text


def _out_of_memory(message: str) -> float:
    """Returns the bytes that the compiler would have needed; 0 if the message is another one."""
    if "RESOURCE_EXHAUSTED" not in message:
        return 0.0
    used = re.search(
        r"(?:Used |HLO temporaries \()(\d+(?:\.\d+)?)([KMGT]?)"
        r"(?: of [\d.]+[KMGT]? hbm|\) exceeds available HBM)",
        message,
    )
    if used:
        number, unit = used.groups()
        return float(number) * {"": 1, "K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}[unit]
    return math.inf  # of another memory, or in an unknown wording


def report(
    config: dict[str, Any], target: Target, *, training_only: bool = False
) -> dict[str, Measured]:
    """Compiles all programs of a config for a target."""
    mesh = sharding.make_mesh(config["mesh"], target.devices)
    programs = trace_programs(config, mesh, target.devices, training_only=training_only)
    return {
        name: measure(traced, target, config["dtype"], count_flops(traced.jaxpr))
        for name, traced in programs.items()
    }
