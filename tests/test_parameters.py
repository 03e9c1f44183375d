import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from save_jax import parameters as params
from save_jax.models import layers


class Tiny(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.scale = nnx.Param(jnp.float32(2))
        self.blocks = layers.Stack(
            lambda rngs: layers.MLP(
                4, activation=layers.quick_gelu, dtype=jnp.dtype("float32"), rngs=rngs
            ),
            3,
            rngs,
        )

    def __call__(self, x):
        return self.scale * self.blocks(x)


def test_split_and_merge_are_inverse():
    model = Tiny(nnx.Rngs(params=0))
    graphdef, parameters = params.split(model)
    assert list(parameters) == [
        "blocks.layer.c_fc.bias",
        "blocks.layer.c_fc.kernel",
        "blocks.layer.c_proj.bias",
        "blocks.layer.c_proj.kernel",
        "scale",
    ]
    assert parameters["blocks.layer.c_fc.kernel"].shape == (3, 4, 16)
    x = jnp.array(np.random.default_rng(0).normal(size=(2, 5, 4)), jnp.float32)
    np.testing.assert_array_equal(params.merge(graphdef, parameters)(x), model(x))
    # The dictionary is what counts, and its order does not.
    doubled = {name: 2 * parameters[name] for name in reversed(parameters)}
    again = params.split(params.merge(graphdef, doubled))[1]
    assert list(again) == list(parameters)
    for name in parameters:
        np.testing.assert_array_equal(again[name], 2 * parameters[name])


def test_an_abstract_model_has_the_same_names_and_shapes():
    graphdef, parameters = params.split(Tiny(nnx.Rngs(params=0)))
    abstract_graphdef, abstract = params.split(nnx.eval_shape(lambda: Tiny(nnx.Rngs(params=0))))
    assert abstract_graphdef == graphdef
    assert list(abstract) == list(parameters)
    for name, value in abstract.items():
        assert (value.shape, value.dtype) == (parameters[name].shape, parameters[name].dtype)


def test_gradients_have_the_parameters_names():
    graphdef, parameters = params.split(Tiny(nnx.Rngs(params=0)))
    x = jnp.ones((1, 2, 4))
    gradient = jax.grad(lambda p: params.merge(graphdef, p)(x).sum())(parameters)
    assert gradient.keys() == parameters.keys()
    assert all(np.abs(value).max() > 0 for value in gradient.values())
