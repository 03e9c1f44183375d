"""The state a run starts from: what a source holds is not computed, and goes where it belongs."""

import jax
import numpy as np
import pytest

from save_jax import checkpoint, optimizer, resume, sharding, train, weights
from save_jax import config as configuration
from tests.support import synthetic
from tests.support.training import RATES, program


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run with a checkpoint after step 7, all of whose trained parameters have moved by one."""
    workdir = tmp_path_factory.mktemp("run")
    state = program(RATES, 1)[1]
    moved = state._replace(
        step=state.step + 7, trained={k: v + 1 for k, v in state.trained.items()}
    )
    checkpoints = checkpoint.Checkpoints(workdir)
    checkpoints.save(moved, 7)
    checkpoints.wait()
    checkpoints.close()
    return workdir


def everything(state) -> dict:
    return {**state.trained, **state.frozen}


@pytest.fixture
def nothing_at_random(monkeypatch):
    monkeypatch.setattr(train, "create_state", lambda *_: pytest.fail("a random model was made"))


def test_a_run_resumes_without_a_random_model(workdir, nothing_at_random):
    mesh, fresh, *_ = program(RATES, 1)
    checkpoints = checkpoint.Checkpoints(workdir)
    _, state, resumed = resume.initial_state({}, synthetic.MODEL, RATES, mesh, checkpoints)
    assert resumed == 7 and int(state.step) == 7
    for name, value in fresh.trained.items():
        np.testing.assert_array_equal(state.trained[name], value + 1)
    # All of it is there, and placed as a fresh one: the same program takes it.
    assert jax.tree.structure(state) == jax.tree.structure(fresh)
    for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(fresh), strict=True):
        assert one.sharding == other.sharding and one.dtype == other.dtype
    assert float(state.hyperparameters.peaks["new"]) == np.float32(RATES.new)


def test_a_run_is_evaluated_without_a_random_model(workdir, nothing_at_random, monkeypatch):
    mesh, fresh, *_ = program(RATES, 1)
    monkeypatch.setattr(configuration, "model_config", lambda _: synthetic.MODEL)
    _, models, step, _ = resume.evaluated_models({"init_from": str(workdir)}, workdir, mesh)
    assert step == 7 and list(models) == [""] and models[""].keys() == everything(fresh).keys()


@pytest.mark.parametrize("whole", [True, False])
def test_weights_go_to_their_shards_alone(workdir, monkeypatch, capsys, whole):
    """A model that needs fsdp fits no single device, and the host's arrays are all the same."""
    monkeypatch.setattr(sharding, "LEAST_SLICED", 100)
    if not whole:  # orbax puts shard by shard, with this
        refuse = lambda *_, **__: pytest.fail("put on a device as a whole")  # noqa: E731
        monkeypatch.setattr(jax, "device_put", refuse)
    mesh = sharding.make_mesh({"data": 1, "fsdp": 8})
    _, like = train.abstract_state(synthetic.MODEL, RATES, mesh)
    like = everything(like)
    source = str(workdir) if whole else f"clip={workdir},ast={workdir}"
    loaded = resume.load_weights({"init_from": source}, synthetic.MODEL, like)
    expected = everything(program(RATES, 1)[1])
    assert whole == (loaded.keys() == like.keys())
    name = "clip.text.blocks.layer.mlp.c_fc.kernel"
    assert {s.data.size for s in loaded[name].addressable_shards} == {like[name].size // 8}
    for name, value in loaded.items():
        assert value.sharding == like[name].sharding
        if name.startswith(("clip.", "ast.")):
            moved = RATES.rate(optimizer.group_of(name)) > 0
            np.testing.assert_array_equal(value, expected[name] + moved, err_msg=name)
    said = capsys.readouterr().out
    assert f"all {len(like)} arrays of a run, after its step 7" in said if whole else True


def test_weights_stay_in_host_memory_until_they_are_placed(workdir):
    like = everything(program(RATES, 1)[1])
    found = weights.load(f"clip={workdir}", synthetic.MODEL, like)
    assert {type(value) for value in found.parameters.values()} == {np.ndarray}
    assert "frame_positions" in found.parameters  # from CLIP's text tower


def test_what_no_source_holds_is_what_it_would_be_without_one():
    mesh, fresh, *_ = program(RATES, 1)
    expected = everything(fresh)
    given = {k: v + 1 for k, v in expected.items() if k.startswith("clip.")}
    _, state = train.create_state(synthetic.MODEL, RATES, 0, mesh, given)
    for name, value in everything(state).items():
        np.testing.assert_array_equal(value, given.get(name, expected[name]), err_msg=name)
    assert [*state.trained] == [*fresh.trained] and [*state.frozen] == [*fresh.frozen]
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(state.opt_state))


def test_a_seed_is_an_argument_of_the_program_and_decides_the_values():
    mesh, fresh, *_ = program(RATES, 1)
    only = {k: v for k, v in everything(fresh).items() if k != "audio_resampler.query_tokens"}
    made = [
        train.create_state(synthetic.MODEL, RATES, seed, mesh, only)[1].trained[
            "audio_resampler.query_tokens"
        ]
        for seed in (0, 1, 1 + 2**32)
    ]
    np.testing.assert_array_equal(made[0], fresh.trained["audio_resampler.query_tokens"])
    assert np.abs(made[1] - made[0]).max() > 0
    np.testing.assert_array_equal(made[1], made[2])  # as jax.random.key takes the low 32 bits
