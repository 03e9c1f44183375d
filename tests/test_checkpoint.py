"""Checkpoints: found, refused when foreign or incomplete, read back as they were."""

import dataclasses
import errno
import os
import shutil

import jax
import numpy as np
import pytest

from save_jax import checkpoint, train
from save_jax.errors import OutageError, UserError
from tests.support import object_store, synthetic
from tests.support.training import RATES, mesh_of, program


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A workdir with checkpoints 3 and 7 of the synthetic model, 7 with other parameters."""
    workdir = tmp_path_factory.mktemp("run")
    state = program(RATES, 1)[1]
    checkpoints = checkpoint.Checkpoints(workdir)
    checkpoints.save(state, 3, None)
    later = state._replace(
        step=state.step + 7, trained=jax.tree.map(lambda a: a + 1, state.trained)
    )
    checkpoints.save(later, 7, {"SumR": 1.0})
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
