"""Checkpoints: found, refused when foreign or incomplete, read back as they were."""

import dataclasses
import errno
import os
import shutil

import jax
import numpy as np
import pytest

from save_jax import checkpoint, frozen, sharding, train
from save_jax.errors import OutageError, UserError
from save_jax.train_state import to_tree
from tests.support import object_store, synthetic
from tests.support.training import RATES, mesh_of, program


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A workdir with checkpoints 3 and 7 of the synthetic model, 7 with other parameters."""
    workdir = tmp_path_factory.mktemp("run")
    state = program(RATES, 1)[1]
    checkpoints = checkpoint.Checkpoints(workdir)
    checkpoints.save(state, 3)
    later = state._replace(
        step=state.step + 7, trained=jax.tree.map(lambda a: a + 1, state.trained)
    )
    checkpoints.save(later, 7)
    checkpoints.wait()
    checkpoints.close()
    return workdir


def everything(state) -> dict:
    return {**state.trained, **state.frozen}


def test_a_workdir_means_its_latest_checkpoint(workdir):
    assert checkpoint.find(workdir).name == "7"
    assert checkpoint.find(workdir / "checkpoints" / "3").name == "3"
    assert checkpoint.is_ours(workdir) and checkpoint.is_ours(workdir / "checkpoints" / "3")


def test_parameters_come_back_as_they_were(workdir):
    state = program(RATES, 1)[1]
    step, loaded = checkpoint.load_parameters(workdir, everything(state))
    assert step == 7
    for name, value in state.trained.items():
        np.testing.assert_array_equal(loaded[name], value + 1)
    for name, value in state.frozen.items():
        np.testing.assert_array_equal(loaded[name], value)


def size(folder) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_frozen_parameters_are_written_once_a_run(workdir):
    state = program(RATES, 1)[1]
    assert state.frozen
    (held,) = (workdir / "frozen").iterdir()
    frozen_bytes = sum(value.nbytes for value in state.frozen.values())
    assert size(held) > frozen_bytes / 2
    for step in ("3", "7"):
        listed = checkpoint._metadata(workdir / "checkpoints" / step)
        assert set(listed["parameters"]) == set(state.trained)
        assert set(listed["frozen"]) == {held.name}


def test_a_checkpoint_without_its_frozen_part_is_refused(workdir, tmp_path):
    state = program(RATES, 1)[1]
    (held,) = (workdir / "frozen").iterdir()
    shutil.copytree(workdir / "checkpoints" / "3", tmp_path / "copies" / "3")
    wanted = rf"3 lacks its frozen parameters.*expected {tmp_path}/frozen/{held.name}, or"
    for read in (checkpoint.load_parameters, checkpoint.read_parameters):
        with pytest.raises(UserError, match=wanted):
            read(tmp_path / "copies" / "3", everything(state))
    with pytest.raises(UserError, match=wanted):
        checkpoint.parameter_shapes(tmp_path / "copies" / "3")
    shutil.copytree(held, tmp_path / "copies" / "frozen" / held.name)
    loaded = checkpoint.load_parameters(tmp_path / "copies" / "3", everything(state))[1]
    jax.tree.map(np.testing.assert_array_equal, loaded, everything(state))


def test_a_checkpoint_of_an_earlier_version_is_read_and_resumed(tmp_path):
    """It holds all parameters; the next one of the run does not."""
    state = program(RATES, 1)[1]
    old = checkpoint.Checkpoints(tmp_path)
    old._manager.save(2, args=checkpoint.ocp.args.StandardSave(to_tree(state, "")))
    old.wait()
    assert not (tmp_path / "frozen").exists()
    restored = old.restore(2, state)
    old.save(restored, 4)
    old.wait()
    again = old.restore(4, state)
    old.close()
    for found in (restored, again):
        jax.tree.map(np.testing.assert_array_equal, everything(found), everything(state))
        jax.tree.map(np.testing.assert_array_equal, found.opt_state, state.opt_state)
    loaded = checkpoint.load_parameters(tmp_path / "checkpoints" / "2", everything(state))[1]
    jax.tree.map(np.testing.assert_array_equal, loaded, everything(state))


def test_frozen_parameters_half_written_are_written_anew(workdir, tmp_path):
    state = program(RATES, 1)[1]
    name = frozen.digest(state.frozen)
    left = tmp_path / "frozen" / name / "default.orbax-checkpoint-tmp"
    left.mkdir(parents=True)
    (left / "d").write_bytes(b"half")
    checkpoints = checkpoint.Checkpoints(tmp_path)
    checkpoints.save(state, 1)
    checkpoints.wait()
    checkpoints.close()
    assert not left.exists()
    loaded = checkpoint.load_parameters(tmp_path, everything(state))[1]
    jax.tree.map(np.testing.assert_array_equal, loaded, everything(state))


def test_frozen_parameters_that_an_earlier_start_left_damaged_are_written_anew(tmp_path):
    state = program(RATES, 1)[1]
    name = frozen.write(tmp_path, state.frozen)
    for file in (tmp_path / "frozen" / name).rglob("*"):
        if file.is_file() and file.stat().st_size > 1000:
            file.write_bytes(b"0" * file.stat().st_size)
    checkpoints = checkpoint.Checkpoints(tmp_path)
    checkpoints.save(state, 1)
    checkpoints.wait()
    checkpoints.close()
    loaded = checkpoint.load_parameters(tmp_path, everything(state))[1]
    jax.tree.map(np.testing.assert_array_equal, loaded, everything(state))


def test_frozen_parameters_that_were_changed_are_refused(workdir, tmp_path):
    """All of them are sound arrays, of another run: no reader of files would notice."""
    state = program(RATES, 1)[1]
    shutil.copytree(workdir, tmp_path / "run")
    (held,) = (tmp_path / "run" / "frozen").iterdir()
    other = jax.tree.map(lambda x: x + 1, state.frozen)
    name = frozen.write(tmp_path / "other", other)
    shutil.rmtree(held)
    shutil.copytree(tmp_path / "other" / "frozen" / name, held)
    wanted = rf"{held} cannot be read.*another digest.*Put it back from a copy of the run"
    with pytest.raises(UserError, match=wanted):
        checkpoint.load_parameters(tmp_path / "run", everything(state))
    checkpoints = checkpoint.Checkpoints(tmp_path / "run")
    with pytest.raises(UserError, match=wanted):
        checkpoints.restore(7, state)
    checkpoints.close()


def test_the_digest_is_that_of_names_values_and_places_on_every_mesh():
    rng = np.random.default_rng(0)
    values = {"a": rng.normal(size=(256, 128)), "b": rng.normal(size=(8,))}
    values = {name: value.astype(np.float32) for name, value in values.items()}

    def digest(values, axes, devices):
        mesh = sharding.make_mesh(axes, jax.devices()[:devices])
        shapes = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in values.items()}
        places = sharding.tree_shardings(shapes, (), mesh)
        return frozen.digest(
            {name: sharding.global_array(value, places[name]) for name, value in values.items()}
        )

    one = digest(values, {"data": 1}, 1)
    assert digest(values, {"data": 2, "fsdp": 4}, 8) == one
    assert digest({"b": values["b"], "a": values["a"]}, {"data": 2}, 2) == one
    swapped = values["a"].copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    nudged = values["a"].copy()
    nudged[7, 7] = np.nextafter(nudged[7, 7], np.float32(9))
    for other in (
        {**values, "a": swapped},
        {**values, "a": nudged},
        {**values, "a": values["a"].reshape(128, 256)},
        {"a": values["a"], "c": values["b"]},
        {**values, "b": -values["b"]},
    ):
        assert digest(other, {"data": 1}, 1) != one


def test_no_checkpoint_is_said_with_what_was_looked_for(tmp_path):
    with pytest.raises(UserError, match=r"expected a workdir with checkpoints/STEP"):
        checkpoint.find(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        checkpoint.find(tmp_path / "nowhere")
    assert not checkpoint.is_ours(tmp_path)


def test_an_incomplete_write_is_not_a_checkpoint(workdir, tmp_path):
    (tmp_path / "checkpoints" / "9.orbax-checkpoint-tmp").mkdir(parents=True)
    with pytest.raises(UserError, match="no checkpoint"):
        checkpoint.find(tmp_path)


def test_an_incomplete_write_to_a_bucket_is_not_a_checkpoint(monkeypatch):
    """There it has its name from the beginning, and at the end a file that says it is complete."""
    store, run = object_store.register(), "gs://bucket/run"
    object_store.glob_without_protocol(monkeypatch)
    store.pipe(f"{run}/checkpoints/9/default/d", b"")
    assert not checkpoint.is_ours(run) and not checkpoint.is_ours(f"{run}/checkpoints/9")
    for path in (run, f"{run}/checkpoints", f"{run}/checkpoints/9"):
        with pytest.raises(UserError, match=r"no complete .*checkpoints/9 lacks commit_success"):
            checkpoint.find(path)
    for step in (3, 7):
        store.pipe(f"{run}/checkpoints/{step}/default/d", b"")
        store.pipe(f"{run}/checkpoints/{step}/commit_success.txt", b"")
    assert checkpoint.is_ours(run) and checkpoint.is_ours(f"{run}/checkpoints/3")
    assert str(checkpoint.find(run)) == f"{run}/checkpoints/7"
    assert str(checkpoint.find(f"{run}/checkpoints/3")) == f"{run}/checkpoints/3"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"audio_queries": 5}, r"2 misshapen: audio_resampler.query_positions is \(4, 16\)"),
        ({"speech_weight": 0.0}, r"unexpected: speech_fusion"),
    ],
)
def test_another_architecture_is_refused_by_name(workdir, change, message):
    model = dataclasses.replace(synthetic.MODEL, **change)
    _, other = train.create_state(model, RATES, 0, mesh_of(1))
    for read in (
        lambda: checkpoint.load_parameters(workdir, everything(other)),
        lambda: checkpoint.Checkpoints(workdir).restore(7, other),
    ):
        with pytest.raises(UserError, match="another architecture") as refusal:
            read()
        assert refusal.match(message)


@pytest.mark.parametrize(
    "read",
    [
        lambda where, state: checkpoint.load_parameters(where, everything(state)),
        lambda where, state: checkpoint.read_parameters(where, everything(state)),
        lambda where, state: checkpoint.Checkpoints(where).restore(7, state),
    ],
    ids=["load", "read", "restore"],
)
def test_damaged_arrays_are_named(workdir, tmp_path, read):
    shutil.copytree(workdir, tmp_path, dirs_exist_ok=True)
    arrays = [p for p in (tmp_path / "checkpoints" / "7" / "default").rglob("d/*") if p.is_file()]
    assert arrays
    for path in arrays:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=r"checkpoints/7 (cannot be read|is not a complete)"):
        read(tmp_path, program(RATES, 1)[1])


@pytest.mark.parametrize(
    "reader",
    [checkpoint.ocp.PyTreeCheckpointer, checkpoint.ocp.StandardCheckpointHandler],
    ids=["arrays", "list of arrays"],
)
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ESTALE, os.strerror(errno.ESTALE)), "Stale"),
        (ValueError("UNAVAILABLE: the store does not answer [spec='{}']"), "does not answer"),
    ],
)
def test_a_disk_or_store_that_fails_is_not_called_damage(workdir, monkeypatch, reader, error, said):
    """Its advice to remove the checkpoint would lose it."""

    def fail(*_, **__):
        raise error

    state = program(RATES, 1)[1]
    name = "restore" if reader is checkpoint.ocp.PyTreeCheckpointer else "metadata"
    monkeypatch.setattr(reader, name, fail)
    with pytest.raises(OutageError, match=rf"checkpoints/7 cannot be read now: .*{said}"):
        checkpoint.load_parameters(workdir, everything(state))
