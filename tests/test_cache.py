"""A cache of frozen encoders: the same losses, and no other run's features."""

import contextlib
import dataclasses
import io
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest

from save_jax import cache, checkpoint, main, metrics, optimizer, sharding, train
from save_jax import config as configuration
from save_jax.cache import __main__ as command
from save_jax.data import Splits
from save_jax.errors import UserError
from tests.support import caching, miniatures, object_store, programs

TRAINING = {
    "frame_embeddings",
    "frame_mask",
    "caption_embeddings",
    "ast_states",
    "speech_states",
    "teacher_video",
    "teacher_audio",
}
WITHIN = 300  # seconds for a job on a busy machine
EVALUATION = TRAINING - {"caption_embeddings", "teacher_video", "teacher_audio"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The miniature, prepared: 5 clips with 100 captions to train on."""
    from data_pipelines.preparation import prepare
    from data_pipelines.recipe import Recipe

    root, out = tmp_path_factory.mktemp("miniature"), tmp_path_factory.mktemp("prepared")
    miniatures.msrvtt(root, n_train=5, n_test=3)
    recipe = Recipe(image_size=32, fbank_frames=64, max_frames=4)
    prepare("msrvtt", root=str(root), out=str(out), recipe=recipe, workers=1)
    return out


def start(*arguments: str, devices: int = 1) -> subprocess.Popen:
    """Runs a module in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"XLA_FLAGS": programs.flags(devices)},
    )


def alone(*arguments: str) -> tuple[int, str]:
    """Runs a module to its end on one device; its exit code, and what it said."""
    process = start(*arguments)
    said, _ = process.communicate()
    return process.returncode, said


def together(*arguments: str, count: int = 2) -> list[tuple[int, str]]:
    """The same with several processes over loopback, of two devices each."""
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"--coordinator=127.0.0.1:{free.getsockname()[1]}"
    arguments += (coordinator, f"--num_processes={count}")
    job = [start(*arguments, f"--process_id={number}", devices=2) for number in range(count)]
    try:
        said = [process.communicate(timeout=WITHIN)[0] for process in job]
    finally:
        for process in job:
            process.kill()
    return [(process.returncode, text) for process, text in zip(job, said, strict=True)]


def overrides(data, **changes) -> list[str]:
    """The experiment, with changes, for a command line."""
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    changes = caching.CHANGES | {"data.dir": data} | changes
    return ["--config=configs/demo.py", *(f"--config.{k}={v}" for k, v in changes.items())]


@pytest.fixture(scope="module")
def cached(data, tmp_path_factory):
    """A float32 cache of the experiment, made on one device by the command line."""
    out = tmp_path_factory.mktemp("cache") / "float32"
    arguments = overrides(data, eval_batch_size=2)
    code, said = alone("save_jax.cache", *arguments, "--dtype=float32", f"--out={out}")
    assert code == 0, said
    assert "are free there" in said and "complete" in said
    return out


@pytest.fixture(scope="module")
def open_data(data):
    """Opens the experiment's splits with a cache, for weights that are made once."""
    mesh = sharding.make_mesh({"data": -1})
    values = caching.config(data)
    _, state = train.create_state(
        configuration.model_config(values), optimizer.ALL_FROZEN, values["seed"], mesh
    )

    def opened(directory, params=None, **changes):
        values = caching.config(data, cache__dir=str(directory), **changes)
        found = Splits(values)
        found.training()
        rates = configuration.optimizer_config(values, total_steps=5)
        found.use_cache(state.frozen | (params or {}), rates, mesh)
        return found

    opened.params = state.frozen
    return opened


def losses(workdir, name: str = "loss") -> np.ndarray:
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return np.array([line[name] for line in lines if name in line])


@pytest.fixture(scope="module")
def computed(data, tmp_path_factory):
    """A run in which all is computed; its workdir."""
    workdir = tmp_path_factory.mktemp("computed")
    assert main.run(caching.config(data), workdir)
    return workdir


def test_what_a_cache_holds(cached):
    train_arrays, test_arrays = caching.arrays(cached / "train"), caching.arrays(cached / "test")
    assert set(train_arrays) == TRAINING and set(test_arrays) == EVALUATION
    assert train_arrays["frame_embeddings"].shape == (5, 4, 16)
    assert train_arrays["caption_embeddings"].shape == (100, 16)
    assert train_arrays["speech_states"].shape == (5, 12, 16)
    assert train_arrays["frame_mask"].tolist() == [[True, True, True, False]] * 5
    for name in TRAINING - {"frame_mask"}:  # all rows were written
        assert train_arrays[name].any(axis=tuple(range(1, train_arrays[name].ndim))).all() or (
            name.startswith("teacher")
        )


@pytest.mark.parametrize(
    "parts",
    [
        None,
        pytest.param(["ast"], marks=pytest.mark.soak),
        pytest.param(["frames", "captions"], marks=pytest.mark.soak),
    ],
)
def test_losses_are_those_of_a_run_that_computes_all(data, cached, computed, tmp_path, parts):
    directory = cached
    if parts:  # the rest is computed, from frames and sound that are read
        directory = tmp_path / "part"
        shutil.copytree(cached, directory)
        for meta in directory.glob("*/meta.json"):
            content = json.loads(meta.read_text())
            content["arrays"] = {
                name: entry
                for name, entry in content["arrays"].items()
                if cache.ARRAYS[name] in parts
            }
            meta.write_text(json.dumps(content))
    workdir = tmp_path / "run"
    assert main.run(caching.config(data, cache__dir=str(directory)), workdir)
    expected = losses(computed)
    assert len(expected) == 5 and len(set(expected)) == 5
    np.testing.assert_allclose(losses(workdir), expected, rtol=1e-6)  # eight of the last bits
    one, other = (np.load(w / "evaluation" / "5" / "similarity.npy") for w in (computed, workdir))
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "on_disk", "soft_albef"),
    [
        pytest.param("bfloat16", "uint16", 1e-2, marks=pytest.mark.soak),
        ("float16", "float16", 1e-3),
    ],
)
def test_states_kept_in_half_the_room_change_little(
    data, computed, tmp_path, dtype, on_disk, soft_albef
):
    """The cache is in a bucket, as one of any dtype may be."""
    store, directory = object_store.register(), "gs://bucket/cache"
    command.run(caching.config(data), directory, splits=["train"], dtype=dtype)
    states = store.cat_file(f"{directory}/train/ast_states/00000-of-00001.npy")
    assert np.load(io.BytesIO(states)).dtype == on_disk
    assert main.run(caching.config(data, cache__dir=directory), tmp_path / "run")
    found, expected = (losses(w, "contrastive") for w in (tmp_path / "run", computed))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    assert (found != expected).any()  # or that was not what was read
    # Pearson's distance divides by how much the clips differ in sound. These, of one tone each and
    # heard by a random AST, hardly do, and the rounding shows; the demo's total is within 1e-4.
    found, expected = (losses(w, "soft_albef") for w in (tmp_path / "run", computed))
    np.testing.assert_allclose(found, expected, rtol=0, atol=soft_albef)


def test_bfloat16_computation(data, tmp_path):
    """Stored in bfloat16, its states are what they were: a run from a cache sees the same."""
    directory, config = tmp_path / "cache", caching.config(data, dtype="bfloat16")
    command.run(config, str(directory), splits=["train"], dtype="bfloat16")
    for name in ("frame_embeddings", "ast_states"):
        assert caching.arrays(directory / "train")[name].dtype == "uint16"
    assert main.run(config, tmp_path / "computed")
    assert main.run({**config, "cache": {"dir": str(directory)}}, tmp_path / "run")
    found, expected = losses(tmp_path / "run"), losses(tmp_path / "computed")
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_evaluate_mode_reads_the_cache(data, cached, computed, tmp_path, capsys):
    config = caching.config(data, mode="evaluate", init_from=str(computed), cache__dir=str(cached))
    assert main.run(config, tmp_path)
    assert "test: ast, frames, speech from the cache" in capsys.readouterr().out
    one, other = (np.load(w / "evaluation" / "5" / "similarity.npy") for w in (computed, tmp_path))
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)


def test_two_processes_write_the_same_and_train_from_it(data, cached, computed, tmp_path):
    """On a pod, the rows of a global array are not in the order of the processes.

    Of these sizes only the table of tokens is large enough to be sliced, over both processes.
    """
    out, workdir = tmp_path / "cache", tmp_path / "run"
    arguments = [*overrides(data, mesh__fsdp=2), "--dtype=float32", f"--out={out}"]
    job = together("tests.support.device_orders", "random", "save_jax.cache", *arguments)
    assert [code for code, _ in job] == [0, 0], job
    assert len(list((out / "train" / "ast_states").iterdir())) == 3  # more than one for a process
    assert_same_cache(cached, out)
    arguments = overrides(data, mesh__fsdp=4, micro_batch=4, cache__dir=out)
    arguments = ["save_jax.main", *arguments, f"--workdir={workdir}"]
    job = together("tests.support.device_orders", "interleaved", *arguments)
    assert [code for code, _ in job] == [0, 0], job
    assert_same_run(data, computed, workdir, tmp_path / "again")


def assert_same_cache(one, other):
    for split in ("train", "test"):
        expected, found = caching.arrays(one / split), caching.arrays(other / split)
        assert set(found) == set(expected)
        for name, array in expected.items():
            np.testing.assert_allclose(found[name], array, rtol=0, atol=1e-5, err_msg=name)


def assert_same_run(data, computed, workdir, again):
    """Asserts that a run of several processes is that of one, evaluation and all."""
    np.testing.assert_allclose(losses(workdir), losses(computed), rtol=0, atol=1e-5)
    shapes = checkpoint.parameter_shapes(computed)
    found = checkpoint.read_parameters(workdir, shapes)
    for name, value in checkpoint.read_parameters(computed, shapes).items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-5, err_msg=name)
    # The same checkpoint, evaluated by one process.
    assert main.run(caching.config(data, mode="evaluate", init_from=str(workdir)), again)
    found, expected = (
        np.load(where / "evaluation" / "5" / "similarity.npy") for where in (workdir, again)
    )
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    # Ranks are those of the processes' own scores.
    ranks = np.load(workdir / "evaluation" / "5" / "ranks.npz")
    own = Splits(caching.config(data)).evaluation().video_of_caption
    np.testing.assert_array_equal(ranks["t2v_rank"], metrics.text_to_video(found, own))
    np.testing.assert_array_equal(ranks["v2t_rank"], metrics.video_to_text(found, own))
    np.testing.assert_array_equal(ranks["own_score"], found[np.arange(len(own)), own])


# Of two processes and of four; `make test` has one order of writing, and one of training, above.
EVERY_ORDER = pytest.mark.parametrize(
    ("order", "count"), [*itertools.product(("interleaved", "reversed", "random"), (2, 4))]
)


@pytest.mark.soak
@EVERY_ORDER
def test_the_order_of_devices_does_not_change_a_cache(data, cached, tmp_path, order, count):
    arguments = ["save_jax.cache", *overrides(data), "--dtype=float32", f"--out={tmp_path}"]
    job = together("tests.support.device_orders", order, *arguments, count=count)
    assert [code for code, _ in job] == [0] * count, job
    assert_same_cache(cached, tmp_path)


@pytest.mark.soak
@EVERY_ORDER
def test_the_order_of_devices_does_not_change_a_run(data, computed, tmp_path, order, count):
    workdir = tmp_path / "run"
    arguments = ["save_jax.main", *overrides(data), f"--workdir={workdir}"]
    job = together("tests.support.device_orders", order, *arguments, count=count)
    assert [code for code, _ in job] == [0] * count, job
    assert_same_run(data, computed, workdir, tmp_path / "again")


def test_what_is_cached_is_not_read(cached, open_data, monkeypatch):
    found = open_data(cached)
    read = found._pipeline.array_record_data_source.ArrayRecordDataSource
    monkeypatch.setattr(read, "__init__", lambda *_: pytest.fail("records are read"))
    (batch,) = found.training().batches(3, 4)
    assert batch.frames is batch.fbank is batch.caption_ids is batch.transcript_ids is None
    assert batch.frame_embeddings.shape == (8, 4, 16)
    np.testing.assert_array_equal(
        batch.frame_embeddings, caching.arrays(cached / "train")["frame_embeddings"][batch.index]
    )


def test_the_order_is_that_of_a_run_that_computes_all(data, cached, open_data):
    plain = Splits(caching.config(data)).training().batches(0, 12)
    for one, other in zip(plain, open_data(cached).training().batches(0, 12), strict=True):
        np.testing.assert_array_equal(one.index, other.index)
        np.testing.assert_array_equal(one.has_audio, other.has_audio)
        np.testing.assert_array_equal(one.teacher_audio, other.teacher_audio)


@pytest.mark.parametrize(
    ("parameter", "arrays"),
    [
        ("clip.visual.proj", ["frame_embeddings"]),
        ("clip.text.ln_final.bias", ["caption_embeddings", "speech_states"]),
        ("ast.blocks.layer.ln_1.scale", ["ast_states"]),
        ("clip.logit_scale", []),
        ("ast.norm.scale", []),
        ("audio_projection.kernel", []),
    ],
)
def test_other_weights_are_refused_by_name(cached, open_data, parameter, arrays):
    changed = {parameter: open_data.params[parameter] + 1e-3}
    if not arrays:  # these do not make what is cached
        open_data(cached, params=changed)
        return
    with pytest.raises(UserError, match="does not belong to this run") as error:
        open_data(cached, params=changed)
    lines = str(error.value).splitlines()[1:-1]
    assert [line.split(":")[0].strip() for line in lines] == arrays
    assert all("weights of" in line for line in lines)


def test_other_sizes_are_refused_by_name(cached, open_data):
    with pytest.raises(UserError, match="sizes: max_words = 12 there, 8 here") as error:
        open_data(cached, data__max_words=8)
    assert "ast_states" not in str(error.value)
    with pytest.raises(UserError, match="sizes: dtype = 'float32' there, 'bfloat16' here"):
        open_data(cached, dtype="bfloat16")


def test_other_data_are_refused_by_name(data, cached, open_data, tmp_path):
    prepared = tmp_path / "prepared"
    shutil.copytree(data, prepared)
    (index,) = prepared.glob("**/index-train.json")
    clips = json.loads(index.read_text())
    clips[1]["transcript"] = "something else is said"
    index.write_text(json.dumps(clips))
    with pytest.raises(UserError) as error:
        open_data(cached, data__dir=str(prepared))
    assert "speech_states: data" in str(error.value)
    assert "weights" not in str(error.value) and "frame_embeddings" not in str(error.value)
    clips[1]["video_id"] = "another"
    index.write_text(json.dumps(clips))
    with pytest.raises(UserError, match="frame_embeddings: data"):
        open_data(cached, data__dir=str(prepared))


def test_data_prepared_anew_are_other_data(data, cached, open_data, tmp_path, monkeypatch):
    from data_pipelines import splits

    prepared = tmp_path / "prepared"
    shutil.copytree(data, prepared)
    (path,) = prepared.glob("**/metadata.json")
    metadata = json.loads(path.read_text())
    open_data(cached, data__dir=str(prepared))
    metadata["content"]["train"] = "0" * 64  # as of other records
    path.write_text(json.dumps(metadata))
    with pytest.raises(UserError, match="ast_states: data"):
        open_data(cached, data__dir=str(prepared))

    # Prepared by a version that took no digest of all records: by a sample, and by who has sound.
    del metadata["content"]
    path.write_text(json.dumps(metadata))
    split = splits.open_split(str(prepared), "msrvtt", "9k", "train", {})
    own = Splits(caching.config(data, data__dir=str(prepared)))
    as_it_is = own._content(split)
    silent = dataclasses.replace(split, has_audio=np.zeros_like(split.has_audio))
    assert own._content(silent) != as_it_is
    stored = splits.records_sample
    monkeypatch.setattr(
        splits, "records_sample", lambda *of: [record[:-1] + b"!" for record in stored(*of)]
    )
    assert own._content(split) != as_it_is


def test_only_what_is_frozen_is_used(cached, open_data):
    found = open_data(cached, optimizer__clip=1e-7)
    (batch,) = found.training().batches(0, 1)
    assert batch.ast_states is not None and batch.fbank is None
    assert batch.frame_embeddings is None and batch.frames is not None
    with pytest.raises(UserError, match="nothing to be used"):
        open_data(cached, optimizer__clip=1e-7, optimizer__ast=1e-7)


def test_what_trains_cannot_be_cached(data, tmp_path):
    values = caching.config(data, optimizer__clip=1e-7)
    with pytest.raises(UserError, match="frames would change while this config trains"):
        command.run(values, str(tmp_path), parts=["frames"])
    with pytest.raises(UserError, match="expected some of frames, captions"):
        command.run(values, str(tmp_path), parts=["sounds"])
    values = caching.config(data, optimizer__clip=1e-7, optimizer__ast=1e-7)
    with pytest.raises(UserError, match="no encoder is frozen"):
        command.run(values, str(tmp_path))


def test_what_reads_ahead_ends_with_its_splits(cached, open_data):
    before, found = set(threading.enumerate()), open_data(cached)
    with pytest.raises(KeyError), found:
        batches = found.training().batches(0, 12)
        next(batches)
        (thread,) = (x for x in set(threading.enumerate()) - before if "read-ahead" in x.name)
        raise KeyError("the loop fails")
    assert not thread.is_alive()


def test_frozen_parts_are_those_of_the_branches_and_rates():
    def parts(model="save", **rates):
        from configs import demo

        values = demo.get_config(model).to_dict()
        values["optimizer"] |= {"clip": 0.0, "clip_stem": 0.0, "ast": 0.0} | rates
        model = configuration.model_config(values)
        mesh = sharding.make_mesh({"data": -1})
        _, state = train.abstract_state(model, optimizer.ALL_FROZEN, mesh)
        return cache.frozen_parts(model, configuration.optimizer_config(values, 1), state.frozen)

    assert parts() == ("frames", "captions", "ast", "speech", "teacher")
    assert parts(clip=1e-7) == parts(clip_stem=1e-7) == ("ast", "teacher")
    assert parts(ast=1e-7) == ("frames", "captions", "speech", "teacher")
    assert parts("avigate") == ("frames", "captions", "ast", "teacher")
    assert parts("clip4clip") == ("frames", "captions", "teacher")


def test_a_killed_writer_goes_on_and_the_result_is_the_same(data, cached, tmp_path):
    out = tmp_path / "cache"
    program = ["tests.support.caching", str(data), str(out)]
    # In the clips, of 3 shards for each of 6 arrays, and in the captions.
    code, said = alone(*program, "4", "SIGKILL")
    assert code == -signal.SIGKILL, said
    assert len(set(out.glob("*/*/*.npy"))) == 4
    assert list((out / "train").glob("*/.*.tmp"))  # half a shard
    code, said = alone(*program, "17", "SIGTERM")
    assert code == os.EX_TEMPFAIL and "what was done is kept, and the same command" in said, said
    assert 4 + 17 < len(set(out.glob("*/*/*.npy"))) < 18 + 7  # it ends when that one is written
    assert len(list((out / "train").glob("*/.*.tmp"))) == 1
    meta = json.loads((out / "train" / "meta.json").read_text())["arrays"]
    assert {entry["checksums"] for entry in meta.values()} == {None}
    kept = {path: path.stat().st_mtime_ns for path in out.glob("*/*/*.npy")}
    half = next(path for path in kept if path.parent.name == "ast_states")
    half.write_bytes(half.read_bytes()[:-1])  # as another file system may leave it
    del kept[half]
    code, said = alone(*program, "-2")
    assert code == 0, said
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    for split in ("train", "test"):
        expected, found = caching.arrays(cached / split), caching.arrays(out / split)
        assert expected.keys() == found.keys()
        for name in expected:
            np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


def test_a_cache_that_is_not_complete_or_damaged_is_refused(cached, open_data, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(cached, broken)
    meta = broken / "train" / "meta.json"
    content = json.loads(meta.read_text())
    sums = content["arrays"]["ast_states"]["checksums"]
    content["arrays"]["ast_states"]["checksums"] = None
    meta.write_text(json.dumps(content))
    with pytest.raises(UserError, match="ast_states is not complete, it has 1 of 1 shards"):
        open_data(broken)
    content["arrays"]["ast_states"]["checksums"] = sums
    meta.write_text(json.dumps(content))
    open_data(broken)
    file = broken / "train" / "ast_states" / "00000-of-00001.npy"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    words = f"{file}: expected {len(whole)} bytes, found {len(whole) - 100}. Remove it, and run"
    with pytest.raises(UserError, match=words):
        open_data(broken)
    file.unlink()
    with pytest.raises(UserError, match=f"{file}: expected {len(whole)} bytes, found no file"):
        open_data(broken)
    meta.write_text(json.dumps({**content, "format": 1}))
    with pytest.raises(UserError, match=r"format 2, found 1.*Remove the directory, and write"):
        open_data(broken)
    meta.write_text("{")
    with pytest.raises(UserError, match=r"meta\.json cannot be read"):
        open_data(broken)
    with pytest.raises(UserError, match="expected a cache of the split 'train'"):
        open_data(tmp_path / "nowhere")


def test_a_cache_of_something_else_is_not_overwritten(data, cached, tmp_path):
    with pytest.raises(UserError, match="stored as float32 there, float16 here"):
        command.run(caching.config(data), str(cached), splits=["train"])
    with pytest.raises(UserError, match=r"holds a cache of something else(.|\n)*weights of"):
        command.run(caching.config(data, seed=1), str(cached), dtype="float32", splits=["train"])


def test_a_full_disk_shows_before_the_work(data, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"of free space, found 0\.0 MB"):
        command.run(caching.config(data), str(tmp_path / "cache"), splits=["train"])
    assert not list((tmp_path / "cache").rglob("*.npy"))


def test_the_trained_layer_norm_still_trains(data, cached, tmp_path):
    values = caching.config(data, cache__dir=str(cached), optimizer__ast_norm=1e-2)
    assert main.run(values, tmp_path)
    from save_jax.checkpoint import parameter_shapes, read_parameters

    like = {"ast.norm.scale": parameter_shapes(tmp_path)["ast.norm.scale"]}
    assert np.abs(read_parameters(tmp_path, like)["ast.norm.scale"] - 1).max() > 1e-4
    assert jax.device_count() == 8  # what is above holds on several devices
