"""Every source at a small size, read exactly; and everything that can be wrong with one."""

import dataclasses
import io
import os
import pathlib
import pickle
import shutil
import subprocess
import sys
import zipfile

import jax
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from save_jax import checkpoint, sharding, weights
from save_jax import parameters as params
from save_jax.errors import UserError
from save_jax.models.save import SAVE, copy_clip_into_fusion
from save_jax.weights import loading
from save_jax.weights import table as tables
from save_jax.weights.files import recognise, torchscript
from save_jax.weights.files import safetensors as safetensors_file
from save_jax.weights.names import ast, clip, save
from tests.models.test_ast import original_names
from tests.models.test_clip import openai_names
from tests.support import hub_cache, reference, small, weight_files

CONFIG = small.config()
_, EXPECTED = small.abstract(CONFIG)


def as_ours(table: tables.Table, state: dict[str, np.ndarray], prefix: str) -> params.Parameters:
    """The parameters a state should become, by the table for the original's names."""
    shapes = {
        name.removeprefix(prefix): value.shape
        for name, value in EXPECTED.items()
        if name.startswith(prefix)
    }
    return {prefix + k: v for k, v in tables.from_torch(table, state, shapes).items()}


def write_sharded(directory: pathlib.Path, state: dict[str, np.ndarray]) -> None:
    directory.mkdir()
    names, where = sorted(state), {}
    for n, part in enumerate((names[::2], names[1::2])):
        file = f"model-0000{n + 1}-of-00002.safetensors"
        safetensors_file.write(directory / file, {name: state[name] for name in part})
        where |= dict.fromkeys(part, file)
    index = '{"weight_map": {' + ", ".join(f'"{k}": "{v}"' for k, v in where.items()) + "}}"
    (directory / "model.safetensors.index.json").write_text(index)


def make_clip(kind: str, path: pathlib.Path, seed: int = 3) -> params.Parameters:
    if kind == "archive":
        state = weight_files.numpy_state(weight_files.openai_archive(path))
        return as_ours(clip.TABLE, state, "clip.")
    model = weight_files.hugging_face_clip(seed)
    if kind == "Hugging Face":
        model.save_pretrained(path)
    elif kind == "Hugging Face, old":
        path.mkdir()
        state = model.state_dict() | {"text_model.embeddings.position_ids": torch.arange(16)[None]}
        torch.save(state, path / "pytorch_model.bin")
        (path / "config.json").write_text("{}")
    else:
        write_sharded(path, small.numpy_state(model))
    return as_ours(clip.TABLE, openai_names(model), "clip.")


def make_ast(kind: str, path: pathlib.Path) -> params.Parameters:
    if kind == "original":
        torch.save(state := weight_files.ast_state(), path)
        return as_ours(ast.TABLE, weight_files.numpy_state(state), "ast.")
    if kind == "Hugging Face":
        (model := weight_files.hugging_face_ast()).save_pretrained(path)
        model = model.audio_spectrogram_transformer
    elif kind == "Hugging Face, trunk":
        (model := weight_files.hugging_face_ast(transformers.ASTModel)).save_pretrained(path)
    else:  # modules' names of today, which the table knows as another spelling
        model = weight_files.hugging_face_ast(transformers.ASTModel)
        torch.save(model.state_dict(), path)
    return as_ours(ast.TABLE, original_names(model), "ast.")


def make_save(kind: str, path: pathlib.Path) -> params.Parameters:
    state = weight_files.save_state()
    expected = as_ours(save.TABLE, weight_files.numpy_state(state), "")
    if kind == "plain":
        torch.save(state | weight_files.spare(), path)
    elif kind == "wrapped":
        torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}, path)
    elif kind == "before PyTorch 1.6":
        torch.save(state, path, _use_new_zipfile_serialization=False)
    elif kind == "bfloat16":
        state = {name: value.bfloat16() for name, value in state.items()}
        torch.save(state, path)
        expected = as_ours(save.TABLE, weight_files.numpy_state(state), "")
    elif kind == "safetensors of ours":
        safetensors_file.write(path, {k: np.asarray(v) for k, v in expected.items()})
    elif kind == "checkpoint of ours":
        checkpoint.write_parameters(path, expected, step=7)
    return expected


def load(source, **options) -> weights.Loaded:
    return weights.load(source, CONFIG, EXPECTED, **options)


def assert_equal(ours: params.Parameters, expected: params.Parameters) -> None:
    assert set(expected) <= set(ours)
    for name, value in expected.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)
        assert type(ours[name]) is np.ndarray and ours[name].dtype == np.float32, name


# ------------------------------------------------------------------------------- what is read


@pytest.mark.parametrize(
    "kind", ["archive", "Hugging Face", "Hugging Face, old", "Hugging Face, in shards"]
)
def test_clip(kind, tmp_path):
    expected = make_clip(kind, tmp_path / "source")
    loaded = load(str(tmp_path / "source"), trust_archive=True)
    assert_equal(loaded.parameters, expected)
    assert not {name for name in loaded.absent if name.startswith("clip.")}


@pytest.mark.parametrize(
    "kind", ["original", "Hugging Face", "Hugging Face, trunk", "Hugging Face, modules' names"]
)
def test_ast(kind, tmp_path):
    expected = make_ast(kind, tmp_path / "source")
    loaded = load(str(tmp_path / "source"))
    assert_equal(loaded.parameters, expected)
    assert loaded.parameters.keys() == expected.keys()
    assert set(loaded.absent) == set(EXPECTED) - set(expected)


@pytest.mark.parametrize(
    "kind",
    [
        "plain",
        "wrapped",
        "before PyTorch 1.6",
        "bfloat16",
        "safetensors of ours",
        "checkpoint of ours",
    ],
)
def test_save(kind, tmp_path):
    expected = make_save(kind, tmp_path / "source")
    loaded = load(str(tmp_path / "source"))
    assert_equal(loaded.parameters, expected)
    assert loaded.absent == () and loaded.parameters.keys() == EXPECTED.keys()


def test_a_file_is_recognised_whatever_its_name(tmp_path):
    expected = make_save("safetensors of ours", tmp_path / "a")
    shutil.copy(tmp_path / "a", tmp_path / "pytorch_model.bin.4")
    assert_equal(load(str(tmp_path / "pytorch_model.bin.4")).parameters, expected)
    torch.save(weight_files.save_state(), tmp_path / "model.safetensors")
    assert_equal(load(str(tmp_path / "model.safetensors")).parameters, expected)


def test_a_workdir_with_optimiser_state_gives_its_latest_step(tmp_path):
    expected = make_save("none", tmp_path)
    manager = checkpoint.Checkpoints(tmp_path)
    for step in (3, 12):
        state = checkpoint.TrainState(
            step=np.int32(step),
            trained={k: v + (step == 3) for k, v in expected.items()},
            frozen={},
            opt_state={"m": np.ones(4)},
            hyperparameters=(),
            average={},
        )
        manager.save(state, step)
        manager.wait()
    manager.close()
    assert_equal(load(str(tmp_path)).parameters, expected)
    assert_equal(load(str(tmp_path / "checkpoints" / "12")).parameters, expected)
    other = load(str(tmp_path / "checkpoints" / "3")).parameters
    np.testing.assert_array_equal(other["frame_positions"], expected["frame_positions"] + 1)


def test_one_source_each_for_clip_and_ast(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    expected = make_clip("Hugging Face", a) | make_ast("original", b)
    for source in (
        f"clip={a},ast={b}",
        f"{a},{b}",
        [str(b), str(a)],
        {"clip": str(a), "ast": str(b)},
    ):
        loaded = load(source)
        assert_equal(loaded.parameters, expected)
        assert all(name.startswith(("audio_", "speech_")) for name in loaded.absent)


def test_a_part_of_a_whole_model(tmp_path):
    expected = make_save("plain", tmp_path / "save")
    make_ast("original", tmp_path / "ast")
    loaded = load(f"clip={tmp_path / 'save'},ast={tmp_path / 'save'}").parameters
    for name in loaded:
        if name.startswith(("clip.", "ast.")):
            np.testing.assert_array_equal(loaded[name], expected[name])
    np.testing.assert_array_equal(  # not the file's own, which was left out
        loaded["frame_positions"], expected["clip.text.positional_embedding"]
    )
    with pytest.raises(UserError, match=r"has AST's names, and nothing of clip\.\*"):
        load(f"clip={tmp_path / 'ast'}")


def test_the_new_parts_start_from_clip(tmp_path):
    make_clip("Hugging Face", tmp_path / "clip")
    loaded = load(str(tmp_path / "clip"))
    # The model does the same to itself.
    model = SAVE(CONFIG, nnx.Rngs(params=0))
    graphdef, started = params.split(model)
    model = params.merge(
        graphdef,
        {k: loaded.parameters[k] if k.startswith("clip.") else v for k, v in started.items()},
    )
    copy_clip_into_fusion(model)
    _, expected = params.split(model)
    assert {name.split(".")[0] for name in loaded.parameters} == {
        "clip", "frame_positions", "audio_resampler", "audio_fusion", "speech_fusion",
    }  # fmt: skip
    for name, value in loaded.parameters.items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)
    changed = {k for k, v in started.items() if not np.array_equal(v, expected[k])}
    assert changed <= set(loaded.parameters)
    assert set(loaded.absent) == set(EXPECTED) - set(loaded.parameters)
    assert any("start of audio_fusion" in note for note in loaded.notes)
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    placed = [sharding.global_array(np.asarray(v), where) for v in loaded.parameters.values()]
    buffers = {value.unsafe_buffer_pointer() for value in placed}
    assert len(buffers) == len(placed)  # each can be donated


@pytest.mark.parametrize(
    ("changes", "absent"),
    [(small.AVIGATE, {"speech_fusion"}),
     (weight_files.SOUNDLESS, {"ast", "audio_projection", "audio_resampler", "audio_fusion",
                        "speech_fusion"})],
    ids=["avigate", "clip4clip"],
)  # fmt: skip
def test_the_baselines_fill_what_they_have(changes, absent, tmp_path):
    torch.save(weight_files.save_state(**changes), tmp_path / "pytorch_model.bin.2")
    loaded = load(str(tmp_path / "pytorch_model.bin.2"))
    assert {name.split(".")[0] for name in loaded.absent} == absent
    assert any("as initialised" in note for note in loaded.notes)
    own = small.config(dataclasses.replace(small.SIZES, **changes))
    expected = small.abstract(own)[1]
    again = weights.load(str(tmp_path / "pytorch_model.bin.2"), own, expected)
    assert again.absent == () and again.parameters.keys() == expected.keys()
    for name, value in again.parameters.items():
        np.testing.assert_array_equal(loaded.parameters[name], value)


def test_positions_are_fitted_to_the_config(tmp_path):
    there = make_save("plain", tmp_path / "save")
    sizes = dataclasses.replace(small.SIZES, image_size=48, fbank_frames=96)
    config = small.config(sizes)
    expected = small.abstract(config)[1]
    loaded = weights.load(str(tmp_path / "save"), config, expected)
    for name, value in loaded.parameters.items():
        assert value.shape == expected[name].shape
        if there[name].shape == value.shape:
            np.testing.assert_array_equal(value, there[name])
    fitted = {n for n, v in loaded.parameters.items() if v.shape != there[n].shape}
    assert fitted == {"clip.visual.positional_embedding", "ast.pos_embed"}
    assert sum("fitted to" in note for note in loaded.notes) == 2


# ------------------------------------------------------------------------------- what is refused


def refused(source: pathlib.Path, match: str, **options) -> None:
    with pytest.raises(UserError, match=match) as error:
        load(str(source), **options)
    assert len(str(error.value)) < 900


def test_what_does_not_fit_is_counted_and_named(tmp_path):
    state = weight_files.save_state()
    del state["clip.visual.proj"], state["transformerClip_ASR.resblocks.1.ln_4.bias"]
    state |= {"query_tokens": torch.zeros(3, 3), "decoder.weight": torch.zeros(2)}
    torch.save(state, tmp_path / "partial")
    refused(
        tmp_path / "partial",
        r"2 missing: clip\.visual\.proj, transformerClip_ASR\S+bias; "
        r"1 not expected: decoder\.weight; 1 of the wrong shape: query_tokens is \[3, 3\]",
    )
    # Also without a model to fit: the parts that a file has must be whole.
    with pytest.raises(UserError, match=r"2 missing: .*; 1 not expected: decoder.weight"):
        loading.read(str(tmp_path / "partial"))


def test_parts_are_whole_or_absent(tmp_path):
    state = {
        k: v for k, v in weight_files.save_state().items() if not k.startswith("Audio_Resampler")
    }
    torch.save(state, tmp_path / "partial")
    refused(tmp_path / "partial", r"36 missing: Audio_Resampler")


def test_a_model_too_much_is_refused(tmp_path):
    torch.save(weight_files.save_state(), tmp_path / "save")
    config = small.config(dataclasses.replace(small.SIZES, **small.AVIGATE))
    with pytest.raises(UserError, match="not expected: transformerClip_ASR"):
        weights.load(str(tmp_path / "save"), config, small.abstract(config)[1])


def test_a_model_without_sound_takes_no_ast(tmp_path):
    make_ast("original", tmp_path / "ast")
    config = small.config(dataclasses.replace(small.SIZES, **small.CLIP4CLIP))
    with pytest.raises(UserError, match=r"holds ast .* the config's model does not have"):
        weights.load(str(tmp_path / "ast"), config, small.abstract(config)[1])


def test_another_size_is_refused(tmp_path):
    make_clip("Hugging Face", tmp_path / "clip")
    config = small.config(dataclasses.replace(small.SIZES, vision_width=48, vision_layers=1))
    with pytest.raises(UserError, match=r"16 not expected.*of the wrong shape"):
        weights.load(str(tmp_path / "clip"), config, small.abstract(config)[1])


def test_a_foreign_file_is_refused(tmp_path):
    torch.save({f"layer{n}.conv.weight": torch.zeros(2) for n in range(30)}, tmp_path / "resnet")
    refused(tmp_path / "resnet", r"of its 30 tensors at most 0 .* it has layer0\.conv\.weight")
    torch.save([torch.zeros(2)], tmp_path / "list")
    refused(tmp_path / "list", "no tensors by name but a list")


def test_the_same_part_twice_is_refused(tmp_path):
    make_clip("Hugging Face", tmp_path / "a")
    make_save("plain", tmp_path / "b")
    with pytest.raises(UserError, match="both hold 38 of the model's parameters"):
        load(f"{tmp_path / 'a'},{tmp_path / 'b'}")
    for source in ("", "clip=", "clip=a,clip=b", {}):
        with pytest.raises(UserError, match="cannot make sense"):
            load(source)


def test_quantised_weights_are_refused(tmp_path):
    state = weight_files.save_state() | {"clip.visual.proj": torch.zeros(96, 128, dtype=torch.int8)}
    torch.save(state, tmp_path / "a")
    refused(tmp_path / "a", r"clip\.visual\.proj as int8")


@pytest.mark.parametrize("kind", ["plain", "before PyTorch 1.6", "safetensors of ours", "archive"])
@pytest.mark.parametrize("share", [0.001, 0.4, 0.999])
def test_a_file_cut_short_is_refused(kind, share, tmp_path):
    path = tmp_path / "a"
    make_clip(kind, path) if kind == "archive" else make_save(kind, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    refused(path, "cut short|damaged|cannot be read", trust_archive=True)


@pytest.mark.parametrize("kind", ["plain", "archive"])
def test_changed_bytes_are_noticed(kind, tmp_path):
    path = tmp_path / "a"
    make_clip(kind, path) if kind == "archive" else make_save(kind, path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)
    refused(path, "damaged|cannot be read", trust_archive=True)


def test_a_damaged_header_of_safetensors_is_refused(tmp_path):
    path = tmp_path / "a"
    for header in (b'{"a": 3}', b'{"a"', b'{"a": {"dtype": "F9"}}',
                   b'{"a": {"dtype": "F32", "shape": [7], "data_offsets": [0, 4]}}'):  # fmt: skip
        path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
        refused(path, "header is damaged")


def test_a_damaged_checkpoint_is_refused(tmp_path):
    make_save("checkpoint of ours", tmp_path)
    for file in (tmp_path / "checkpoints/7/default").rglob("d/*"):
        file.write_bytes(b"")
    refused(tmp_path, "is not a complete checkpoint: its list of arrays is absent or damaged")


def test_a_checkpoint_with_damaged_arrays_is_refused(tmp_path):
    make_save("checkpoint of ours", tmp_path)
    largest = max((tmp_path / "checkpoints").rglob("d/*"), key=lambda file: file.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 3 :] = bytes(len(data) - len(data) // 3)
    largest.write_bytes(data)
    refused(tmp_path, "cannot be read: it is damaged|is not a complete checkpoint")


class Malicious:
    """Unpickled without care, this makes a directory."""

    def __init__(self, trace: pathlib.Path):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def test_a_pickle_with_code_is_refused_and_does_not_run(tmp_path):
    trace, path = tmp_path / "trace", tmp_path / "a"
    for new in (True, False):
        torch.save(
            {**weight_files.save_state(), "x": Malicious(trace)},
            path,
            _use_new_zipfile_serialization=new,
        )
        refused(path, r"is refused: besides tensors it asks for posix\.mkdir")
    path.write_bytes(pickle.dumps(Malicious(trace)))
    refused(path, "is refused|cannot be read")
    # An archive whose description was replaced; even for users that insist on it.
    weight_files.openai_archive(tmp_path / "archive")
    with zipfile.ZipFile(tmp_path / "archive") as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            bad = pickle.dumps(Malicious(trace), protocol=2)
            new.writestr(name, bad if name.endswith("/data.pkl") else old.read(name))
    refused(path, r"it asks for posix\.mkdir", trust_archive=True)
    assert not trace.exists()


def test_an_archive_that_is_not_openais_needs_insisting(tmp_path):
    make_clip("archive", tmp_path / "ViT-B-32.pt")
    refused(tmp_path / "ViT-B-32.pt", r"SHA-256 [0-9a-f]{64}, which is none .*--trust_archive")
    assert load(str(tmp_path / "ViT-B-32.pt"), trust_archive=True)


def test_an_archives_code_does_not_run(tmp_path):
    """The reader does not even look at it."""
    expected = make_clip("archive", tmp_path / "a")
    with zipfile.ZipFile(tmp_path / "a") as old, zipfile.ZipFile(tmp_path / "b", "w") as new:
        for name in old.namelist():
            new.writestr(name, b"raise SystemExit" if "/code/" in name else old.read(name))
    assert_equal(load(str(tmp_path / "b"), trust_archive=True).parameters, expected)


@pytest.mark.parametrize(
    "strides",
    [(3000, -3000), (-1, 1), (10**20, 1), (10**8, 1), (1, 2**61)],
    ids=str,
)
def test_an_archives_strides_stay_within_its_storage(strides, tmp_path, monkeypatch):
    state = weight_files.openai_archive(tmp_path / "whole")
    shape = tuple(state["text_projection"].shape)
    weight_files.crafted_archive(tmp_path / "same", state, {}, monkeypatch)
    expected = load(str(tmp_path / "whole"), trust_archive=True).parameters
    assert_equal(load(str(tmp_path / "same"), trust_archive=True).parameters, expected)
    crafted = {"text_projection": (0, shape, strides)}
    weight_files.crafted_archive(tmp_path / "crafted", state, crafted, monkeypatch)
    with pytest.raises(UserError, match="is damaged: text_projection cannot be read"):
        load(str(tmp_path / "crafted"), trust_archive=True)


def test_crafted_strides_do_not_crash_the_command(tmp_path, monkeypatch):
    state = weight_files.openai_archive(tmp_path / "whole")
    crafted = {"text_projection": (0, tuple(state["text_projection"].shape), (10**8, -(10**8)))}
    weight_files.crafted_archive(tmp_path / "crafted", state, crafted, monkeypatch)
    command = ["-m", "save_jax.weights", "import", tmp_path / "crafted", f"--out={tmp_path / 'o'}"]
    done = subprocess.run(
        [sys.executable, *command, "--trust_archive"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, (done.returncode, done.stderr)
    assert "is damaged: text_projection cannot be read" in done.stderr


@pytest.mark.parametrize(
    ("shape", "strides"), [((-1, -1), (1, 1)), ((2**20, 2**20), (0, 0))], ids=str
)
def test_an_archives_sizes_are_possible(shape, strides, tmp_path, monkeypatch):
    """Not negative, nor more than the storage holds."""
    crafted = {"x": (0, shape, strides)}
    state = {"y": torch.ones(4)}
    weight_files.crafted_archive(tmp_path / "a", state, crafted, monkeypatch)
    with pytest.raises(UserError, match="x cannot be read"):
        np.asarray(torchscript.read(tmp_path / "a")["x"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "pointer of Git LFS"),
        (b"<!DOCTYPE html><html>", "is a web page"),
        (b"\x89PNG\r\n and so on", "begins with"),
    ],
)
def test_other_files_are_named(content, message, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(content)
    refused(tmp_path / "model.safetensors", message)
    refused(tmp_path, message)


def test_directories_without_weights(tmp_path):
    (tmp_path / "notes.txt").touch()
    refused(tmp_path, r"expected a workdir .* found notes\.txt")
    refused(tmp_path / "absent" / "deep", "does not exist")
    write_sharded(tmp_path / "shards", small.numpy_state(weight_files.hugging_face_clip()))
    (tmp_path / "shards" / "model-00002-of-00002.safetensors").unlink()
    refused(tmp_path / "shards", "lacks 1 of the 2 files .*: model-00002-of")


# ------------------------------------------------------------------------------- hub and packages


def test_a_hub_id_offline_says_what_to_download(monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError) as error:
        load("openai/clip-vit-base-patch32")
    message = str(error.value)
    assert "/openai/clip-vit-base-patch32/resolve/main/model.safetensors" in message
    assert "put it into a directory here and give that directory" in message
    assert "\n" not in message
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(recognise.hub.socket, "getaddrinfo", _no_network)
    monkeypatch.setattr(recognise.hub.urllib.request, "getproxies", dict)
    with pytest.raises(UserError, match="cannot be reached: download "):
        load("MIT/ast-finetuned-audioset-10-10-0.4593")


def _no_network(*_):
    raise OSError("Name or service not known")


def test_a_hub_id_in_the_cache_needs_no_network(monkeypatch, tmp_path):
    import huggingface_hub

    expected = make_clip("Hugging Face", tmp_path / "cached")

    def cached(model, file, revision=None):
        assert model == "openai/clip-vit-base-patch32"
        return str(tmp_path / "cached" / file) if file == "model.safetensors" else None

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    assert_equal(load("openai/clip-vit-base-patch32").parameters, expected)


@pytest.mark.parametrize("pinned", ["", "@v1", "@refs/pr/1", f"@{hub_cache.commit(1)}"])
def test_a_hub_id_may_pin_a_revision(monkeypatch, tmp_path, pinned):
    """Of two revisions in the hub's own cache, the one that is asked for is read."""
    expected = {}
    for number, seed in enumerate((3, 4)):
        folder = hub_cache.revision(tmp_path, "someone/clip", number)
        expected[number] = make_clip("Hugging Face", folder, seed=seed)
    hub_cache.name(tmp_path, "someone/clip", main=0, **{"v1": 1, "refs/pr/1": 1})
    hub_cache.use(monkeypatch, tmp_path)
    assert_equal(load(f"someone/clip{pinned}").parameters, expected[1 if pinned else 0])


def test_a_revision_that_the_cache_lacks_is_not_taken_for_another(monkeypatch, tmp_path):
    make_clip("Hugging Face", hub_cache.revision(tmp_path, "someone/clip", 0))
    hub_cache.name(tmp_path, "someone/clip", main=0)
    hub_cache.use(monkeypatch, tmp_path)
    with pytest.raises(UserError, match=r"someone/clip@v2, and .*/resolve/v2/model\.safetensors"):
        load("someone/clip@v2")


def test_a_hub_id_online_is_downloaded(monkeypatch, tmp_path):
    import huggingface_hub
    from huggingface_hub.errors import (
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    write_sharded(tmp_path / "a", small.numpy_state(weight_files.hugging_face_clip()))
    fetched = []

    def hf_hub_download(model, file, revision=None):
        if revision == "none-such":
            raise RevisionNotFoundError("404", response=_Response())
        if model != "someone/clip":
            raise RepositoryNotFoundError("404", response=_Response())
        if not (tmp_path / "a" / file).exists():
            raise RemoteEntryNotFoundError("404", response=_Response())
        fetched.append(file)
        return str(tmp_path / "a" / file)

    monkeypatch.setattr(recognise.hub, "_reachable", lambda url: True)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    load("someone/clip")
    assert fetched == [
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    with pytest.raises(UserError, match="has no such model"):
        load("no/such")
    with pytest.raises(UserError, match=r"someone/clip on .* has no branch, tag or commit 'none-"):
        load("someone/clip@none-such")


class _Response:
    headers: dict = {}  # noqa: RUF012
    request = None


def test_openais_names_say_where_the_file_is():
    with pytest.raises(UserError, match=r"40d365715913c9da.*/ViT-B-32\.pt and give the path"):
        load("ViT-B/32")
    with pytest.raises(UserError, match=r"3035c92b350959924f.*/ViT-L-14-336px\.pt"):
        load("ViT-L/14@336px")


def test_safetensors_and_our_checkpoints_need_no_torch(tmp_path):
    make_save("safetensors of ours", tmp_path / "a")
    make_save("checkpoint of ours", tmp_path / "b")
    make_clip("archive", tmp_path / "c")
    torch.save({}, tmp_path / "d")
    program = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "sys.modules['huggingface_hub'] = None\n"
        "from save_jax.weights.loading import read\n"
        "from save_jax.errors import UserError\n"
        "for name in 'abc': print(len(read(name, trust_archive=True).parameters))\n"
        "try: read('d')\n"
        "except UserError as error: print(error)\n"
    )
    root = pathlib.Path(__file__).parents[3]
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    *counts, message = result.stdout.splitlines()
    assert counts == ["131", "131", "38"]
    assert "pip install -e '.[weights]'" in message


def test_our_safetensors_are_everyones(tmp_path):
    import safetensors.numpy
    import safetensors.torch

    rng = np.random.default_rng(0)
    arrays = {
        "b.c": rng.normal(size=(3, 4)).astype(np.float32),
        "a": np.full((), 2, np.float32),
        "transposed": np.arange(6, dtype=np.float32).reshape(2, 3).T,
    }
    safetensors_file.write(tmp_path / "ours", arrays)
    (tmp_path / "plain").touch()
    modes = {(tmp_path / name).stat().st_mode for name in ("ours", "plain")}
    assert len(modes) == 1, "the file is readable by others as any other file is"
    theirs = safetensors.numpy.load_file(tmp_path / "ours")
    assert theirs.keys() == arrays.keys()
    for name, value in arrays.items():
        np.testing.assert_array_equal(theirs[name], value)
    kinds = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.bool)
    state = {str(kind): torch.arange(6).reshape(2, 3).to(kind) for kind in kinds}
    state["empty"] = torch.zeros(0, 3)
    safetensors.torch.save_file(state, tmp_path / "theirs")
    ours = safetensors_file.read(tmp_path / "theirs")
    for name, value in state.items():
        np.testing.assert_array_equal(np.asarray(ours[name], np.float32), value.float().numpy())
        assert (ours[name].shape, ours[name].dtype) == (value.shape, np.asarray(ours[name]).dtype)


def test_floats_that_numpy_lacks_are_refused(tmp_path):
    import safetensors.torch

    safetensors.torch.save_file({"x": torch.ones(2).to(torch.float8_e4m3fn)}, tmp_path / "a")
    refused(tmp_path / "a", r"a holds x as F8_E4M3: expected one of F64, .*; convert it")


def test_what_was_read_of_a_large_file_does_not_stay_in_memory(tmp_path):
    def resident() -> int:  # bytes
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    arrays = {str(n): np.full(2**22, n, np.float32) for n in range(8)}
    size = sum(array.nbytes for array in arrays.values())
    safetensors_file.write(tmp_path / "a", arrays)
    del arrays
    tensors = safetensors_file.read(tmp_path / "a")
    before = resident()
    for name, tensor in tensors.items():
        assert np.asarray(tensor).sum() == int(name) * 2**22
    assert resident() - before < size / 2


def test_every_table_goes_both_ways():
    for candidate in recognise.FORMATS:
        shapes = {
            row.ours: EXPECTED[row.ours].shape for row in candidate.table.rows
        }  # fmt: skip
        rng = np.random.default_rng(0)
        ours = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
        state = tables.to_torch(candidate.table, ours)
        assert recognise.recognise(state, "state") is candidate
        assert tables.shapes(candidate.table, state) == shapes
        again = tables.from_torch(candidate.table, state, shapes)
        for name, value in again.items():
            np.testing.assert_array_equal(value, ours[name], err_msg=name)


def test_pickles_of_modules_are_refused(tmp_path):
    torch.save(reference.QuickGELU(), tmp_path / "a")
    refused(tmp_path / "a", r"besides tensors it asks for tests\.support\.reference\.QuickGELU")
    buffer = io.BytesIO()
    pickle.dump({"a": 1}, buffer)
    (tmp_path / "b").write_bytes(buffer.getvalue())
    refused(tmp_path / "b", "cannot be read|no tensors")
