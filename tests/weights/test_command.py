"""The command line: weights in, weights out, and the same bits again."""

import contextlib
import errno
import json
import logging
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from save_jax import checkpoint, weights
from save_jax.weights import export, table
from save_jax.weights.__main__ import main
from save_jax.weights.names import save
from tests.support import reference, small, weight_files

_, EXPECTED = small.abstract(small.config())
MODELS = {"save": {}, "avigate": small.AVIGATE, "clip4clip": weight_files.SOUNDLESS}


def run(*arguments) -> int:
    return main([str(argument) for argument in arguments])


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    """Names, shapes, dtypes and bits."""
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert (value.dtype, value.shape) == (right[name].dtype, right[name].shape), name
        assert torch.equal(value, right[name]), name


@pytest.mark.parametrize("model", MODELS)
def test_import_then_export_is_exact(model, tmp_path, capsys):
    state = weight_files.save_state(**MODELS[model])
    kinds = {value.dtype for value in state.values()}
    assert kinds == {torch.float16, torch.float32}
    torch.save(state | weight_files.spare(), tmp_path / "pytorch_model.bin.3")
    assert run("import", tmp_path / "pytorch_model.bin.3", f"--out={tmp_path / 'ours'}") == 0
    assert "not used by the model: asr_query_tokens" in capsys.readouterr().out
    back = tmp_path / "back.bin"
    assert run("export", tmp_path / "ours", "--format=save-pytorch", f"--out={back}") == 0
    assert_same(torch.load(back, weights_only=True), state)


def test_what_is_not_rounded_in_the_source_is_not_rounded(tmp_path):
    """Files in which all is float32, or whose parts have dtypes of their own."""
    state = {name: value.float() for name, value in weight_files.save_state().items()}
    state["query_tokens"] = state["query_tokens"].bfloat16()
    state["clip.visual.proj"] += 1e-5
    torch.save(state, tmp_path / "a.bin")
    assert run("import", tmp_path / "a.bin", f"--out={tmp_path / 'ours'}") == 0
    assert run("export", tmp_path / "ours", "--format=save-pytorch", f"--out={tmp_path / 'b'}") == 0
    assert_same(torch.load(tmp_path / "b", weights_only=True), state)


def ours_at_random(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {k: rng.normal(size=v.shape).astype(np.float32) for k, v in EXPECTED.items()}


@pytest.mark.parametrize("form", export.FORMATS)
def test_export_then_import_is_exact(form, tmp_path):
    ours = ours_at_random()
    checkpoint.write_parameters(tmp_path / "run", ours, step=40)
    file = tmp_path / "file"
    assert run("export", tmp_path / "run", f"--format={form}", f"--out={file}") == 0
    assert run("import", file, f"--out={tmp_path / 'again'}") == 0
    for source in (file, tmp_path / "again"):
        again = weights.load(str(source), small.config(), EXPECTED).parameters
        assert again.keys() == ours.keys()
        for name, value in ours.items():
            np.testing.assert_array_equal(again[name], value, err_msg=name)


def test_an_export_of_a_run_warns_of_nothing(tmp_path, caplog, capfd):
    with contextlib.closing(checkpoint.Checkpoints(tmp_path / "run")) as checkpoints:
        ours = jax.tree.map(jnp.asarray, ours_at_random())
        checkpoints.save(checkpoint.TrainState(jnp.int32(40), ours, {}, (), (), {}), 40)
    file = tmp_path / "file"
    absl = logging.getLogger("absl")
    absl.addHandler(caplog.handler)
    level = absl.level
    absl.setLevel(logging.WARNING)  # as in a new process; save_jax.main lets errors through alone
    try:
        assert run("export", tmp_path / "run", "--format=safetensors", f"--out={file}") == 0
    finally:
        absl.removeHandler(caplog.handler)
        absl.setLevel(level)
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == []
    assert capfd.readouterr().err == ""


def test_dtypes_of_an_export(tmp_path, capsys):
    """Float16 as the reference has it, and float32 where that would round, unless asked to."""
    ours = ours_at_random()
    ours["audio_projection.kernel"] = np.float32(np.float16(ours["audio_projection.kernel"]))
    checkpoint.write_parameters(tmp_path / "run", ours)
    expected = weight_files.mixed(reference.SAVE(small.SIZES).state_dict())
    half = {name for name, value in expected.items() if value.dtype == torch.float16}
    for dtype, found in (
        ("lossless", {"clip.audio_projection"}),
        ("reference", half),
        ("float32", set()),
    ):
        file = tmp_path / dtype
        arguments = ["--format=save-pytorch", f"--dtype={dtype}", f"--out={file}"]
        assert run("export", tmp_path / "run", *arguments) == 0
        state = torch.load(file, weights_only=True)
        assert state.keys() == expected.keys()
        assert {name for name, value in state.items() if value.dtype == torch.float16} == found
        output = capsys.readouterr().out
        count = len(half) - 1
        assert (f"{count} tensors are float32 where" in output) == (dtype == "lossless")


def test_the_references_dtypes():
    """Spec section 12, at full size: what OpenAI's own conversion to float16 converts."""
    with torch.device("meta"):
        model = reference.SAVE(reference.Sizes())
    half = set()
    for prefix, module in model.clip.named_modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d, torch.nn.MultiheadAttention)):
            own = (f"{prefix}.{name}" for name, _ in module.named_parameters(recurse=False))
            half |= {f"clip.{name}" for name in own}
    half |= {"clip.text_projection", "clip.visual.proj", "clip.audio_projection"}
    found = {name for name in model.state_dict() if export.reference_dtype(name) == "float16"}
    assert found == half


def test_an_import_holds_what_the_source_holds(tmp_path):
    """And `init_from` reads it as it reads the source."""
    torch.save(weight_files.ast_state(), tmp_path / "ast.pth")
    weight_files.hugging_face_clip().save_pretrained(tmp_path / "clip")
    sources = [tmp_path / "ast.pth", tmp_path / "clip"]
    assert run("import", *sources, f"--out={tmp_path / 'both'}") == 0
    direct = weights.load(list(map(str, sources)), small.config(), EXPECTED)
    again = weights.load(str(tmp_path / "both"), small.config(), EXPECTED)
    assert again.absent == direct.absent
    assert again.parameters.keys() == direct.parameters.keys()
    for name, value in direct.parameters.items():
        np.testing.assert_array_equal(again.parameters[name], value)
    facts = json.loads((tmp_path / "both/weights.json").read_text())
    assert facts["sources"] == list(map(str, sources))


def test_import_for_a_config(tmp_path, capsys):
    torch.save(weight_files.save_state(), tmp_path / "a")
    out = f"--out={tmp_path / 'ours'}"
    assert run("import", tmp_path / "a", out, "--clip=ViT-B/32") == 2
    assert "of the wrong shape" in capsys.readouterr().err
    assert run("import", tmp_path / "a", out, "--config=configs/msrvtt.py:9k") == 2
    assert "of the wrong shape" in capsys.readouterr().err
    assert run("import", tmp_path / "a", out, "--clip=ViT-Z") == 2
    assert run("import", tmp_path / "a", out, "--config=no.py") == 2
    assert run("import", tmp_path / "a", out, "--config=configs/demo.py", "--ast=base") == 2
    assert not (tmp_path / "ours").exists()


def test_nothing_is_overwritten_unasked(tmp_path, capsys):
    checkpoint.write_parameters(tmp_path / "run", ours_at_random())
    file, ours = tmp_path / "file", tmp_path / "ours"
    file.write_text("precious")
    arguments = ["export", tmp_path / "run", "--format=safetensors", f"--out={file}"]
    assert run(*arguments) == 2
    assert "exists: give another --out, or --overwrite" in capsys.readouterr().err
    assert file.read_text() == "precious"
    assert run(*arguments, "--overwrite") == 0
    assert run("import", file, f"--out={ours}") == 0
    assert run("import", file, f"--out={ours}") == 2
    assert run("import", file, f"--out={ours}", "--overwrite") == 0
    assert run("import", file, f"--out={tmp_path / 'run'}", "--overwrite") == 2
    assert "that no import made" in capsys.readouterr().err
    assert weights.load(str(ours), small.config(), EXPECTED).absent == ()


def test_what_a_link_points_to_is_replaced(tmp_path):
    checkpoint.write_parameters(tmp_path / "run", ours_at_random())
    file, ours, link = tmp_path / "file", tmp_path / "ours", tmp_path / "link"
    assert run("export", tmp_path / "run", "--format=safetensors", f"--out={file}") == 0
    assert run("import", file, f"--out={ours}") == 0
    link.symlink_to("ours")
    written = (ours / "weights.json").stat().st_mtime_ns
    assert run("import", file, f"--out={link}", "--overwrite") == 0
    assert link.is_symlink() and not ours.is_symlink()
    assert (ours / "weights.json").stat().st_mtime_ns > written
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link", "ours", "run"]


@pytest.mark.parametrize(
    ("number", "code"), [(errno.EIO, os.EX_TEMPFAIL), (errno.ENOSPC, 2), (errno.EACCES, 2)]
)
def test_a_disk_that_fails_is_no_mistake_of_the_users(tmp_path, monkeypatch, capsys, number, code):
    checkpoint.write_parameters(tmp_path / "run", ours_at_random())

    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(export.safetensors, "write", fail)
    out = tmp_path / "file"
    assert run("export", tmp_path / "run", "--format=safetensors", f"--out={out}") == code
    error = capsys.readouterr().err
    assert f"cannot write {out}: " in error and os.strerror(number) in error


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch, capsys):
    checkpoint.write_parameters(tmp_path / "run", ours_at_random())
    before = sorted(tmp_path.iterdir())

    def full(path, *_):
        pathlib.Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(export.safetensors, "write", full)
    out = tmp_path / "file"
    assert run("export", tmp_path / "run", "--format=safetensors", f"--out={out}") == 2
    assert "No space left" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_a_disk_that_fills_up_ends_in_one_message(tmp_path):
    checkpoint.write_parameters(tmp_path / "run", ours_at_random())
    before = sorted(tmp_path.iterdir())
    command = [sys.executable, "-m", "save_jax.weights", "export", str(tmp_path / "run")]
    command += ["--format=safetensors", f"--out={tmp_path / 'file'}"]
    result = subprocess.run(
        ["bash", "-c", 'ulimit -f 16 && exec "$@"', "bash", *command],
        cwd=pathlib.Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2, result.stderr
    assert f"cannot write {tmp_path / 'file'}: " in result.stderr
    assert "File too large" in result.stderr and "Traceback" not in result.stderr
    assert sorted(tmp_path.iterdir()) == before


def test_mistakes_end_in_one_message(tmp_path):
    for arguments in (
        ["import", "/no/such/file", f"--out={tmp_path / 'a'}"],
        ["export", str(tmp_path), "--format=safetensors", f"--out={tmp_path / 'a'}"],
        ["export", str(tmp_path), "--format=onnx", f"--out={tmp_path / 'a'}"],
        ["frobnicate"],
        [],
    ):
        assert main(arguments) == 2
    root = pathlib.Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-m", "save_jax.weights", "import", __file__, f"--out={tmp_path / 'a'}"],
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and "begins with" in result.stderr
    assert "Traceback" not in result.stderr


def test_memory_while_importing_the_full_model(tmp_path):
    """Peak below 3 × the file's size in float32, PyTorch and JAX themselves included."""
    with torch.device("meta"):
        state = reference.SAVE(reference.Sizes()).state_dict()
    generator = torch.Generator().manual_seed(0)
    filled = {
        name: torch.empty(value.shape, dtype=getattr(torch, export.reference_dtype(name)))
        .normal_(0, 0.02, generator=generator)
        for name, value in state.items()
    }  # fmt: skip
    float32 = 4 * sum(value.numel() for value in filled.values())
    torch.save(filled, tmp_path / "pytorch_model.bin.4")
    program = (
        "import sys; from save_jax.weights.__main__ import main; code = main()\n"
        # Not getrusage: its maximum begins with what the process that started this one held.
        "status = dict(line.split(':', 1) for line in open('/proc/self/status'))\n"
        "print(1024 * int(status['VmHWM'].split()[0])); sys.exit(code)"
    )

    def peak(*arguments) -> int:
        result = subprocess.run(
            [sys.executable, "-c", program, *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[2])},
            capture_output=True,
            text=True,
            check=True,
        )
        return int(result.stdout.splitlines()[-1])

    ours, back = tmp_path / "ours", tmp_path / "back"
    source = tmp_path / "pytorch_model.bin.4"
    imported = peak("import", source, f"--out={ours}", "--config=configs/msrvtt.py")
    exported = peak("export", ours, "--format=save-pytorch", f"--out={back}")
    print(f"peak: import {imported / float32:.2f}, export {exported / float32:.2f} of float32")
    assert imported < 3 * float32
    assert exported < 3 * float32
    assert_same(torch.load(back, weights_only=True, mmap=True), filled)


def test_float16_state_survives_as_float32_parameters():
    """Every finite float16 is a float32, so that both ways are exact whatever the values."""
    values = np.arange(2**16, dtype=np.uint16).view(np.float16)
    values = values[np.isfinite(values)]
    ours = {"clip.visual.proj": jnp.array(values[:63488].reshape(496, 128), jnp.float32)}
    state, kept = export.to_state(ours)
    assert kept == 0 and state["clip.visual.proj"].dtype == np.float16
    again = table.from_torch(save.TABLE, state, {"clip.visual.proj": (496, 128)})
    np.testing.assert_array_equal(again["clip.visual.proj"], ours["clip.visual.proj"])
