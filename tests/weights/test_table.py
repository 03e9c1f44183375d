"""The tables of names: each direction proves the other, and what does not fit is named at once."""

import dataclasses

import numpy as np
import pytest

from save_jax.errors import UserError
from save_jax.models.save import SAVEConfig
from save_jax.weights import table
from save_jax.weights.names import ast, clip, save
from tests.support import reference, small

TABLES = {
    "clip": clip.TABLE,
    "clip, Hugging Face": clip.HUGGING_FACE,
    "ast": ast.TABLE,
    "ast, Hugging Face": ast.HUGGING_FACE,
    "save": save.TABLE,
}


@pytest.fixture(scope="module")
def expected():
    return small.shapes(small.abstract(small.config())[1])


@pytest.fixture(scope="module")
def state():
    """A state dictionary as PyTorch writes it."""
    return small.numpy_state(reference.SAVE(small.SIZES))


def test_pytorch_to_ours_and_back_is_exact(state, expected):
    ours = table.from_torch(save.TABLE, state, expected)
    assert {name: value.shape for name, value in ours.items()} == expected
    assert all(type(value) is np.ndarray for value in ours.values())
    back = table.to_torch(save.TABLE, ours)
    assert back.keys() == state.keys()
    for name, value in back.items():
        np.testing.assert_array_equal(value, state[name], err_msg=name)
        assert value.dtype == np.float32 and value.flags.c_contiguous, name
        assert value.shape == state[name].shape, name  # scalars too


def test_ours_to_pytorch_and_back_is_exact(expected):
    rng = np.random.default_rng(0)
    ours = {name: rng.normal(size=shape).astype(np.float32) for name, shape in expected.items()}
    again = table.from_torch(save.TABLE, table.to_torch(save.TABLE, ours), expected)
    assert again.keys() == ours.keys()
    for name, value in again.items():
        np.testing.assert_array_equal(value, ours[name], err_msg=name)


def test_the_full_size_model_has_the_references_names_and_shapes():
    _, parameters = small.abstract(SAVEConfig())
    with reference.torch.device("meta"):
        theirs = reference.SAVE(reference.Sizes()).state_dict()
    ours = {}
    for name, value in parameters.items():
        row = save.TABLE.row(name)
        shape = table._torch_shape(row, value.shape)
        names = table.torch_names(save.TABLE, name, value.shape)
        ours |= dict.fromkeys((only for (only,) in names), shape)
    assert ours == {name: tuple(value.shape) for name, value in theirs.items()}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_one_to_one(name):
    rows = TABLES[name].rows
    theirs = [name for row in rows for name in row.names]
    assert len(set(theirs)) == len(theirs)
    assert len({row.ours for row in rows}) == len(rows)
    for row in rows:
        for theirs in row.names:
            assert (".*." in theirs) == (".layer." in row.ours), row


def test_prefixes_and_unused_names_are_ignored(state, expected):
    plain = table.from_torch(save.TABLE, state, expected)
    extended = state | {
        name: np.zeros(3)
        for name in ("asr_query_tokens", "clip.audio.v.head.weight", "clip.audio.mlp_head.0.bias")
    }
    wrapped = {f"module.{name}": value for name, value in extended.items()}
    again = table.from_torch(save.TABLE, wrapped, expected)
    for name, value in plain.items():
        np.testing.assert_array_equal(again[name], value)


def test_avigates_names():
    sizes = dataclasses.replace(small.SIZES, **small.AVIGATE)
    state = small.numpy_state(reference.SAVE(sizes))
    old = {k.replace("Audio_Resampler.", "transformer_Fusion."): v for k, v in state.items()}
    assert old.keys() != state.keys()
    expected = small.shapes(small.abstract(small.config(sizes))[1])
    ours = table.from_torch(save.TABLE, old, expected)
    kernel = ours["audio_resampler.blocks.layer.mlp.c_fc.kernel"]
    weight = state["Audio_Resampler.resblocks.1.mlp.c_fc.weight"]
    np.testing.assert_array_equal(kernel[1], weight.T)


def test_float16_becomes_float32_exactly(state, expected):
    half = {name: value.astype(np.float16) for name, value in state.items()}
    ours = table.from_torch(save.TABLE, half, expected)
    assert {str(value.dtype) for value in ours.values()} == {"float32"}
    np.testing.assert_array_equal(ours["clip.visual.proj"], half["clip.visual.proj"])


def test_parameters_do_not_follow_later_changes_of_the_state(state, expected):
    own = {name: value.copy() for name, value in state.items()}
    ours = table.from_torch(save.TABLE, own, expected)
    for value in own.values():
        value[...] = 0
    np.testing.assert_array_equal(ours["clip.visual.proj"], state["clip.visual.proj"])


def test_everything_that_does_not_fit_is_named_at_once(state, expected):
    broken = dict(state)
    del broken["clip.visual.proj"], broken["transformerClip.resblocks.1.ln_4.bias"]
    broken["clip.visual.transformer.resblocks.2.ln_1.weight"] = np.zeros(96)
    broken["query_tokens"] = broken["query_tokens"].T
    with pytest.raises(UserError) as error:
        table.from_torch(save.TABLE, broken, expected, source="model.bin")
    message = str(error.value)
    assert message.startswith("model.bin does not hold")
    assert "2 missing: " in message
    assert "clip.visual.proj" in message and "transformerClip.resblocks.1.ln_4.bias" in message
    assert "1 not expected: clip.visual.transformer.resblocks.2.ln_1.weight" in message
    assert "1 of the wrong shape: query_tokens is [5, 128] and should be [128, 5]" in message


def test_long_lists_are_counted_and_cut(expected):
    with pytest.raises(UserError, match=r"\d{3} missing: ([^,;]+, ){5}…") as error:
        table.from_torch(save.TABLE, {}, expected)
    assert len(str(error.value)) < 800


def test_a_model_without_a_branch_refuses_its_parameters(state):
    sizes = dataclasses.replace(small.SIZES, **small.AVIGATE)
    expected = small.shapes(small.abstract(small.config(sizes))[1])
    with pytest.raises(UserError, match="not expected: transformerClip_ASR"):
        table.from_torch(save.TABLE, state, expected)


def test_a_parameter_without_a_row_is_our_mistake():
    with pytest.raises(KeyError, match=r"no row for our parameter 'new\.kernel'"):
        table.to_torch(save.TABLE, {"new.kernel": np.zeros(3)})
