"""What runs on NVIDIA GPUs, traced and lowered without one: real configs at the published sizes.

JAX lowers cuDNN's attention with rules of its own: no package of NVIDIA's is needed. Only cuDNN's
version is asked of the installed library, and a stand-in answers that here. What XLA and cuDNN make
of the program is not seen.
"""

import re
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from configs import msrvtt
from launch.compile import program as compile_
from launch.sweep import points
from save_jax import config as configuration
from save_jax import sharding
from save_jax.errors import UserError
from save_jax.models import layers
from save_jax.weights import __main__ as weights

CALL = re.compile(
    r"@__cudnn\$fmhaSoftmax(Backward)?\(.*mask_type\\22: \\22(\w+)\\22"
    r".* : \(tensor<\d+x(\d+)x\d+x\d+xbf16>, tensor<\d+x(\d+)x.*\) -> "
)


@pytest.fixture
def cudnn(monkeypatch):
    """A cuDNN of version 9.10, as far as JAX asks."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)


def card(capability: str = "8.6", kind: str = "NVIDIA GeForce RTX 3090") -> jax.Device:
    """A GPU as JAX describes one."""
    return mock.Mock(
        spec=jax.Device, platform="gpu", device_kind=kind, compute_capability=capability
    )


def settings(model: str = "save", **overrides) -> dict:
    config = msrvtt.get_config(f"9k,{model}")
    config.update(dtype="bfloat16", batch_size=2, eval_batch_size=2)
    with config.ignore_type():
        config.update_from_flattened_dict(overrides)
    return config.to_dict()


def calls(lowered: jax.stages.Lowered) -> tuple[set, set]:
    """(queries, keys, mask) of all attention, forward and backward."""
    text = lowered.as_text()
    found = CALL.findall(text)
    assert len(found) == text.count("@__cudnn$")
    kinds = {kind: set() for kind in ("", "Backward")}
    for kind, mask, queries, keys in found:
        kinds[kind].add((int(queries), int(keys), mask))
    return tuple(kinds.values())


TEXT, AST = (32, 32, "CAUSAL"), (1214, 1214, "NO_MASK")
FRAMES, SOUND = (12, 12, "NO_MASK"), (12, 1214, "PADDING")  # the resampler hears 1,213


@pytest.mark.parametrize(
    ("model", "overrides", "expected"),
    [
        ("clip4clip", {"model.clip": "ViT-B/32"}, {(50, 50, "NO_MASK"), TEXT}),
        ("clip4clip", {"model.clip": "ViT-B/16"}, {(198, 198, "PADDING"), TEXT}),
        ("avigate", {}, {(50, 50, "NO_MASK"), TEXT, FRAMES, SOUND}),
        (
            "save",
            {
                "model.clip": "ViT-L/14",
                "model.audio_queries": 5,
                "model.remat": "products",
                "data.max_frames": 11,
                "data.max_words": 31,
                "micro_batch": 1,
            },
            {
                (258, 258, "PADDING"),
                (32, 32, "PADDING_CAUSAL"),
                (6, 1214, "PADDING"),
                (6, 6, "PADDING"),
                (12, 6, "PADDING"),
                (12, 32, "PADDING"),
                (12, 12, "PADDING"),
            },
        ),
    ],
)
def test_the_training_step_and_evaluation_lower_in_bfloat16(cudnn, model, overrides, expected):
    """Each number of queries and keys is even; forward and backward agree; AST is frozen."""
    mesh = sharding.make_mesh({"data": 1}, jax.devices()[:1])
    programs = compile_.trace_programs(settings(model, **overrides), mesh, [card()])
    found = {
        name: calls(traced.lower(lowering_platforms=("cuda",))) for name, traced in programs.items()
    }
    forward, backward = found["training step"]
    assert backward == expected
    assert forward == (expected if model == "clip4clip" else expected | {AST})
    video, none = found["video embedding"]
    captions, _ = found["caption embedding"]
    assert video | captions == forward and not none


def test_each_device_is_told_the_lengths_of_its_own_rows(cudnn):
    """XLA leaves the lengths whole otherwise, and a device's kernel has fewer rows than lengths."""
    mesh = sharding.make_mesh({"data": 4, "fsdp": 2})
    rows = jax.ShapeDtypeStruct(
        (16, 5, 1, 64), jnp.bfloat16, sharding=sharding.batch_sharding(mesh)
    )

    def attend(q, k, v):
        with sharding.on_mesh(mesh):
            return layers.attend(q, k, v, causal=False, kernel="cudnn")

    lowered = jax.jit(attend).trace(rows, rows, rows).lower(lowering_platforms=("cuda",))
    split = r'sharding_constraint %\S+ <@mesh, \[\{"data", "fsdp"\}\]> : tensor<16xi32>'
    assert len(re.findall(split, lowered.as_text())) == 2


RTX3090, H100 = card(), card("9.0", "NVIDIA H100 80GB HBM3")
T4, V100 = card("7.5", "Tesla T4"), card("7.0", "Tesla V100-SXM2-16GB")
AMD, CPU = card("gfx942", "AMD Instinct MI300X"), jax.devices()[0]
WIDE = {"model.clip": {"vision_width": 320, "vision_heads": 2}}


@pytest.mark.parametrize(
    ("devices", "overrides", "kernel"),
    [
        ([RTX3090, H100], {}, "cudnn"),
        ([RTX3090], {"dtype": "float32"}, "xla"),
        ([T4], {"dtype": "float32"}, "xla"),
        ([RTX3090], {"model.attention": "xla"}, "xla"),
        ([AMD], {}, "xla"),
        ([CPU], {}, "xla"),
        ([RTX3090], WIDE, "xla"),
        ([RTX3090], {"model.clip": {"embed_dim": 100}}, "xla"),
        ([RTX3090], {"model.ast": {"width": 60, "heads": 3}}, "xla"),
        ([RTX3090], {"model.ast": {"width": 60, "heads": 3}, "model.sound_weight": 0.0}, "cudnn"),
    ],
)
def test_auto_means_a_kernel_that_the_devices_have(devices, overrides, kernel):
    assert configuration.model_config(settings(**overrides), devices).attention == kernel


@pytest.mark.parametrize(
    ("devices", "overrides", "message"),
    [
        # XLA has no bfloat16 there either: "Unsupported algorithm on the current device(s)".
        ([RTX3090, V100], {}, "Tesla V100-SXM2-16GB .*8.0 .*found 7.0; set config.dtype = 'float3"),
        ([T4], {"model.attention": "xla"}, "Tesla T4 .*8.0 .*found 7.5; set config.dtype = 'float"),
        ([T4], {"model.attention": "cudnn"}, "Tesla T4 .*8.0 .*found 7.5"),
        ([AMD], {"model.attention": "cudnn"}, "an NVIDIA GPU .*'auto' chooses what fits"),
        ([CPU], {"model.attention": "cudnn"}, "an NVIDIA GPU .*'auto' chooses what fits"),
        ([RTX3090], {"model.attention": "cudnn", "dtype": "float32"}, "dtype = 'bfloat16'; 'auto'"),
        ([RTX3090], {"model.attention": "cudnn", **WIDE}, "heads of .* have: clip.vision 160; 'a"),
        ([RTX3090], {"model.attention": "flash"}, "expected one of auto, xla, cudnn"),
    ],
)
def test_what_the_devices_do_not_have_is_refused(devices, overrides, message):
    with pytest.raises(UserError, match=message):
        configuration.model_config(settings(**overrides), devices)


def test_a_config_for_a_gpu_may_be_checked_elsewhere(tmp_path, capsys):
    """By a sweep that a machine without a GPU sends to a cluster; where weights are imported."""
    overrides = ["--config.dtype=bfloat16", "--config.model.attention=cudnn"]
    resolved = points.resolve("configs/demo.py", overrides)
    assert resolved["model"]["attention"] == "cudnn"
    with pytest.raises(UserError, match="needs an NVIDIA GPU"):
        compile_.report(resolved, compile_.find_target("here"))
    config, out = tmp_path / "config.py", str(tmp_path / "imported")
    config.write_text(
        f"from ml_collections import ConfigDict\n\ndef get_config(): return ConfigDict({resolved})"
    )
    assert weights.main(["import", "/nowhere.pt", f"--config={config}", f"--out={out}"]) == 2
    error = capsys.readouterr().err
    assert "/nowhere.pt" in error and "NVIDIA" not in error
