"""Compiling for devices that are not there: it is the program that runs, and what it takes."""

import functools
import json
import math
import platform
import sys

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from configs import msrvtt
from data_pipelines.preparation import prepare
from data_pipelines.recipe import Recipe
from launch.compile import command, hlo, roofline
from launch.compile import program as compile_
from save_jax import main, sharding, train
from save_jax.errors import UserError
from save_jax.meter import Meter
from tests.support import miniatures, system
from tests.support.training import mesh_of

CLIP = {
    "embed_dim": 16,
    "image_size": 32,
    "patch_size": 16,
    "vision_width": 16,
    "vision_layers": 2,
    "vision_heads": 2,
    "text_width": 16,
    "text_layers": 2,
    "text_heads": 2,
}
AST = {"fbank_frames": 64, "stride": 16, "width": 16, "layers": 1, "heads": 2}
needs_libtpu = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64",
    reason="the TPU compiler exists for Linux on x86-64 only",
)


@pytest.fixture(autouse=True)
def libtpu_environment(monkeypatch):
    system.use_libtpu(monkeypatch)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root, out = tmp_path_factory.mktemp("miniature"), tmp_path_factory.mktemp("prepared")
    miniatures.msrvtt(root, n_train=4, n_test=3)
    recipe = Recipe(encoding="raw", image_size=32, fbank_frames=64, max_frames=4)
    prepare("msrvtt", root=str(root), out=str(out), recipe=recipe, workers=1)
    return out


def tiny(data_dir: str = "") -> dict:
    config = msrvtt.get_config()
    with config.ignore_type():
        config.model.clip, config.model.ast = ConfigDict(CLIP), ConfigDict(AST)
    config.model.update(fusion_layers=1, audio_queries=4, remat="products")
    config.mesh.fsdp = 2
    config.update(batch_size=16, micro_batch=8, eval_batch_size=8, steps=3)
    config.eval_caption_batch_size = 8
    config.data.update(max_frames=4, max_words=16, dir=str(data_dir))
    return config.to_dict()


class Captured(Exception):
    """The run has come to where it would train."""


def run(config: dict, workdir, monkeypatch) -> dict[str, str]:
    """What a run of save_jax.main lowers, from its own arrays."""
    lowered = {}

    def record(name, function):
        def recording(*arguments):
            lowered[name] = function.lower(*arguments).as_text()
            raise Captured

        return recording

    def training(state, train_step, *, training, evaluate, **_):
        evaluations = evaluate.__self__._evaluations
        evaluation, evaluator = evaluations.data, evaluations._evaluator
        _, batch = next(sharding.prefetch(training.batches(0, 1), state.step.sharding.mesh))
        lowered["training step"] = train_step.lower(state, batch).as_text()
        params = {**state.trained, **state.frozen}
        evaluator.encode_video = record("video embedding", evaluator.encode_video)
        with pytest.raises(Captured):
            evaluator.embed_videos(params, evaluation)
        evaluator.encode_text = record("caption embedding", evaluator.encode_text)
        with pytest.raises(Captured):
            evaluator.embed_captions(params, evaluation.caption_ids)
        raise Captured

    monkeypatch.setattr(train, "train", training)
    monkeypatch.setattr(Meter, "compiled", lambda self, step: step)
    precision = jax.config.values["jax_default_matmul_precision"]
    try:
        with pytest.raises(Captured):
            main.run(config, workdir)
    finally:
        jax.config.update("jax_default_matmul_precision", precision)
    return lowered


def test_what_is_compiled_is_what_runs(prepared, tmp_path, monkeypatch):
    """Letter by letter, with shardings and donated arrays; and another batch sharding differs."""
    monkeypatch.setattr(sharding, "LEAST_SLICED", 100)
    config = tiny(prepared)
    mesh = sharding.make_mesh(config["mesh"])
    runs = run(config, tmp_path, monkeypatch)
    programs = compile_.trace_programs(config, mesh, jax.devices())
    assert list(programs) == list(runs)
    for name, traced in programs.items():
        assert traced.lower().as_text() == runs[name], name
    step = runs["training step"]
    assert '{"data", "fsdp"}' in step  # the batch's rows
    assert step.count("tf.aliasing_output") + step.count("jax.buffer_donor") > 100
    assert "HIGHEST" in step

    monkeypatch.setattr(
        sharding, "batch_sharding", lambda mesh: jax.NamedSharding(mesh, jax.P("data"))
    )
    other = compile_.trace_programs(config, mesh, jax.devices(), training_only=True)
    assert other["training step"].lower().as_text() != runs["training step"]


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "tiny.py"
    path.write_text(
        "from ml_collections import ConfigDict\n"
        f"def get_config():\n    return ConfigDict({tiny()!r})\n"
    )
    return str(path)


@needs_libtpu
def test_a_tpu_slice(config_file, capsys):
    arguments = [f"--config={config_file}", "--topology=v5e:2x2", "--config.dtype=bfloat16"]
    # Half the compile time, and nothing that would be special to a TPU.
    arguments += ["--config.micro_batch=0", "--config.model.remat=none", "--config.mesh.fsdp=1"]
    arguments += ["--config.model.speech_weight=0."]
    assert command.main([*arguments, "--batch=32", "--json"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    text = "\n".join(lines)
    assert "v5e:2x2: 4 devices (TPU v5 lite; data 4, fsdp 1), bfloat16, 32 clips per" in text
    assert "total of 16" in text and "roofline, ms" in text
    result = json.loads(last)
    assert (
        result["fits"] and result["batch_size"] == 32 and result["mesh"] == {"data": 4, "fsdp": 1}
    )
    step = result["programs"]["training step"]
    assert step["needed"] == pytest.approx(
        sum(step[k] for k in ("arguments", "output", "temporaries", "code"))
    )
    # Each chip has its own rows of the batch, and all parameters and moments.
    frames = 32 / 4 * 4 * 32 * 32 * 3
    assert step["arguments"] > frames
    # Gradients are added up over all chips, layer by layer.
    assert step["collectives"]["all-reduce"]["count"] >= 4
    assert step["collectives"]["all-reduce"]["bytes"] > 0
    assert step["unknown_loops"] == 0
    assert step["hbm_bytes"] > 0 and step["flops"] > 0 and step["seconds"] > 0
    limits = step["limits"]
    assert limits["seconds"] == max(limits[k] for k in ("compute", "memory", "interconnect"))
    assert limits["bound"] in ("compute", "memory", "interconnect")
    assert limits["compute"] == pytest.approx(step["flops"] / 197e12)


@needs_libtpu
def test_what_does_not_fit_is_told_with_what_it_would_need():
    target = compile_.find_target("v5e:1x1")
    assert target.chip and target.devices[0].device_kind == target.chip.kind
    one = jax.sharding.SingleDeviceSharding(target.devices[0])
    x = jax.ShapeDtypeStruct((2**16, 2**16), jnp.bfloat16, sharding=one)  # 8 GiB each
    traced = jax.jit(lambda x, y: jnp.sin(x @ y) @ x).trace(x, x)
    measured = compile_.measure(traced, target, "bfloat16", 1.0)
    assert not measured.fits and measured.needed > 16 * roofline.GIB
    small = jax.ShapeDtypeStruct((2**10, 2**10), jnp.bfloat16, sharding=one)
    traced = jax.jit(lambda x: x @ x).trace(small)
    measured = compile_.measure(traced, target, "bfloat16", 2.0**31)
    assert measured.fits
    assert measured.arguments == measured.output == 2**21
    assert measured.hbm_bytes == pytest.approx(2**22, rel=0.5)
    assert measured.compiler_flops == pytest.approx(2**31, rel=0.01)


@needs_libtpu
@pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache:UserWarning")
def test_a_program_that_libtpu_cannot_read_back(monkeypatch):
    target = compile_.find_target("v5e:1x1")
    one = jax.sharding.SingleDeviceSharding(target.devices[0])
    x = jax.ShapeDtypeStruct((2**10, 2**10), jnp.float32, sharding=one)
    traced = jax.jit(lambda x: jnp.sin(x @ x).sum()).trace(x)
    read_back = compile_.measure(traced, target, "float32", 2.0**31)

    def fail(compiled):
        raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure")

    monkeypatch.setattr(jax.stages.Compiled, "as_text", fail)
    dumped = compile_.measure(traced, target, "float32", 2.0**31)
    assert read_back.hbm_bytes > 2**20
    assert dumped._replace(seconds=0) == read_back._replace(seconds=0)


@pytest.mark.parametrize(
    "message, gib",
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory in hbm. Used 17.5G of 15.7G hbm.", 17.5),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (1.25T) exceeds available HBM (15.75G).",
            1280,
        ),
        ("RESOURCE_EXHAUSTED: Ran out of memory in vmem. Used 32.4M of 16.0M vmem.", math.inf),
        ("INTERNAL: Used 3.0G of 15.7G hbm, and failed", 0),
        ("INTERNAL: a mistake of the compiler", 0),
    ],
)
def test_how_much_the_compiler_would_have_needed_is_read_from_its_message(message, gib):
    assert compile_._out_of_memory(message) == gib * roofline.GIB


def measured(fits: bool) -> compile_.Measured:
    limits = roofline.roofline(roofline.CHIPS["v4"], "float32", 275e10, 12e9, 3e9)
    return compile_.Measured(
        *(1e9, 0.0, 2e9, 1e6, 4e9), fits, 275e10, 1e12, 12e9, {}, 0, 1.5, limits
    )


def test_exit_codes_and_the_table_of_several(config_file, monkeypatch, capsys):
    """Without compiling: the numbers come from a stand-in."""

    def stand_in(config, target, *, training_only=False):
        return {"training step": measured(target.name != "cpu:8")}

    target = functools.partial(
        compile_.Target, devices=jax.devices(), platform="cpu", chip=roofline.CHIPS["v4"]
    )
    monkeypatch.setattr(compile_, "report", stand_in)
    monkeypatch.setattr(compile_, "find_target", target)
    assert command.main([f"--config={config_file}", "--topology=cpu:4,cpu:2"]) == 0
    head, line, first, second = capsys.readouterr().out.splitlines()
    assert len({row.count("|") for row in (head, line, first, second)}) == 1
    assert "| cpu:4 | 16 | 3.73 of 32 | 2.75 |" in first and "60.0 ms | compute" in first
    assert command.main([f"--config={config_file}", "--topology=cpu:8"]) == 1
    output = capsys.readouterr()
    assert "3.73 NO" in output.out
    assert "the training step needs 3.73 GiB of a cpu:8 chip's 32" in output.err
    for remedy in ("topology", "--batch", "micro_batch", "remat", "fsdp"):
        assert remedy in output.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology=v9:2x2"], "expected a TPU slice (v4:2x2x1"),
        (["--topology=v5e:2by4"], "expected v5e: and the chips along each axis, such as v5e:1x1,"),
        (["--topology=v5e"], "v5e:2x4"),
        (["--topology=cpu:none"], "cpu:N, gpu:N, or here"),
        (["--topology=cpu:64"], "expected at most 8"),
        (["--topology=gpu:8"], "JAX finds no gpu here"),
        (["--topology=cpu:8", "--batch=12", "--config.micro_batch=4"], "multiple of 8, say 16"),
        (["--topology=cpu:8", "--config.micro_batch=3"], "config.micro_batch = 3"),
        (["--topology=cpu:8", "--batch=16", "--config.micro_batch=32"], "batch_size = 16, or 0"),
        (["--topology=cpu:8", "--config.mesh.fsdp=3"], "config.mesh"),
        (["--topology=cpu:8", "--config.nokey=3"], "nokey"),
        (["--topology=cpu:8", "--config.cache.dir=cache"], "config.cache.dir"),
        (["--topology=cpu:8", "--stray"], "stray"),
        pytest.param(["--topology=v5e:3x5"], "v5e:2x4", marks=needs_libtpu),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(config_file, arguments, message, capsys):
    assert command.main([f"--config={config_file}", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and "Traceback" not in error


def test_a_missing_compiler_says_what_to_install(monkeypatch):
    monkeypatch.setattr(compile_.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[compile\]'"):
        compile_.find_target("v5e:2x4")


#### Reading a compiled program.


def program(f, *arguments) -> hlo.Program:
    text = jax.jit(f).lower(*arguments).compile().as_text()
    assert text is not None
    return hlo.Program(text)


def test_a_collective_counts_as_often_as_its_loop_runs():
    mesh = mesh_of(8)
    rows = jax.P("data")

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(rows, rows), out_specs=(rows, rows))
    def f(x, y):
        def body(x, _):
            return jnp.sin(x) + jax.lax.psum(jnp.cos(x), "data"), None

        x, _ = jax.lax.scan(body, x, length=5)
        y = jax.lax.all_gather(y, "data").sum(0) + jax.lax.ppermute(y, "data", [(0, 1), (1, 0)])
        return x, jax.lax.psum_scatter(jnp.tile(y, (8, 1)), "data", tiled=True)

    found = program(f, jnp.ones((8, 100)), jnp.ones((16, 30))).collectives(8)
    sizes = {kind: (each.count, each.bytes) for kind, each in found.items()}
    assert sizes == {
        "all-reduce": (5, 5 * 2 * 7 / 8 * 400),
        "all-gather": (1, 7 * 2 * 30 * 4),
        "collective-permute": (1, 2 * 30 * 4),
        "reduce-scatter": (1, 7 / 8 * 16 * 30 * 4),
    }
    assert "f32[1,100]" in found["all-reduce"].largest


def test_memory_traffic_of_a_loop_counts_slices_as_often_as_it_runs():
    def f(x):
        return jax.lax.map(lambda row: jnp.sin(row) * 2, x)

    x = jnp.ones((64, 10_000))
    once = 2 * 64 * 10_000 * 4  # each row is read and written
    assert once <= program(f, x).hbm_bytes() <= 3 * once


TPU_TEXT = """HloModule step, is_scheduled=true

%fused (a: f32[12,8], b: f32[8], c: s32[]) -> f32[12,8] {
  %a = f32[12,8]{1,0:T(8,128)} parameter(0)
  %b = f32[8]{0:T(128)} parameter(1)
  %c = s32[]{:T(128)} parameter(2)
  ROOT %u = f32[12,8]{1,0:T(8,128)} dynamic-update-slice(%a, %b, %c, %c)
}

%async (p: bf16[4,8]) -> (bf16[4,8], bf16[16,8]) {
  %p = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
  %g = bf16[16,8]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7, GROUPS, metadata={op_name="ours"}
  ROOT %s = (bf16[4,8]{1,0}, bf16[16,8]{1,0}) custom-call(%g), START
}

%rest (p.2: bf16[4,8]) -> bf16[16,8] {
  %p.2 = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %g.2 = bf16[16,8]{1,0:T(8,128)(2,1)} all-gather(%p.2), channel_id=7, GROUPS
}

%condition (t: (s32[], f32[12,8])) -> pred[] {
  %t = (s32[]{:T(128)}, f32[12,8]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%t), index=0
  %n = s32[]{:T(128)} constant(12)
  ROOT %lt = pred[]{:T(512)} compare(%i, %n), direction=LT
}

%body (t.2: (s32[], f32[12,8])) -> (s32[], f32[12,8]) {
  %t.2 = (s32[]{:T(128)}, f32[12,8]{1,0:T(8,128)}) parameter(0)
  %i.2 = s32[]{:T(128)S(6)} get-tuple-element(%t.2), index=0
  %x = f32[12,8]{1,0:T(8,128)} get-tuple-element(%t.2), index=1
  %r = f32[8]{0:T(128)S(1)} constant({...})
  %f = f32[12,8]{1,0:T(8,128)} fusion(%x, %r, %i.2), kind=kLoop, calls=%fused
  ROOT %o = (s32[]{:T(128)}, f32[12,8]{1,0:T(8,128)}) tuple(%i.2, %f)
}

ENTRY %main (x.2: f32[12,8], w: bf16[4,8]) -> f32[12,8] {
  %x.2 = f32[12,8]{1,0:T(8,128)} parameter(0)
  %w = bf16[4,8]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %st = (bf16[4,8]{1,0}, bf16[16,8]{1,0:S(1)}) fusion(%w), kind=kCustom, calls=%async
  %en = bf16[16,8]{1,0:T(8,128)(2,1)S(1)} fusion(%w), kind=kCustom, calls=%rest
  %in = (s32[]{:T(128)}, f32[12,8]{1,0:T(8,128)}) tuple(%zero, %x.2)
  %loop = (s32[]{:T(128)}, f32[12,8]{1,0:T(8,128)}) while(%in), condition=%condition, body=%body
  ROOT %out = f32[12,8]{1,0:T(8,128)} get-tuple-element(%loop), index=1
}
""".replace("GROUPS", "replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}").replace(
    "START", 'custom_call_target="AsyncCollectiveStart"'
)


def test_what_only_the_tpu_compiler_writes():
    """Loop bounds in conditions, collectives taken apart, memory on the chip, updates in place."""
    found = hlo.Program(TPU_TEXT)
    assert found.unknown_loops == 0
    [(kind, gathered)] = found.collectives(8).items()
    assert (kind, gathered.count, gathered.bytes) == ("all-gather", 1, 3 * 4 * 8 * 2)
    assert gathered.largest == "bf16[16,8] of ours"
    started = 4 * 8 * 2  # the part of the start's result that lies in HBM
    assert found.hbm_bytes() == 12 * 8 * 4 + started
