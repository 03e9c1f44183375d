"""Every experiment's config: what differs from the base, and that the model takes it."""

import dataclasses
import pathlib
import re

import pytest
from ml_collections import ConfigDict

from configs import base, charades, demo, folder, lsmdc, msrvtt, vatex
from data_pipelines import datasets
from data_pipelines.recipe import Recipe
from save_jax import config as configuration
from save_jax.errors import UserError
from save_jax.models.save import SAVEConfig
from save_jax.objectives import LossConfig

CONFIGS = {
    "charades": charades,
    "demo": demo,
    "folder": folder,
    "lsmdc": lsmdc,
    "msrvtt": msrvtt,
    "vatex": vatex,
}


def flat(config: ConfigDict) -> dict:
    return dict(_items("", config.to_dict()))


def _items(prefix, config):
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _items(f"{prefix}{key}.", value)
        else:
            yield prefix + key, value


def difference(config: ConfigDict) -> dict:
    """The keys in which a config differs from the base, without those that name the data."""
    shared = flat(base.get_config())
    found = flat(config)
    assert found.keys() == shared.keys()
    return {k: v for k, v in found.items() if v != shared[k] and k != "data.dataset"}


def test_there_is_a_config_for_every_data_set():
    assert sorted(CONFIGS) == sorted(datasets.DATASETS)


@pytest.mark.parametrize("name", sorted(CONFIGS))
@pytest.mark.parametrize("model", ["save", "avigate", "clip4clip"])
def test_every_config_and_model_can_run(name, model):
    config = CONFIGS[name].get_config(model)
    assert config.data.dataset == name
    assert config.data.variant == datasets.check_variant(name, "")
    plain = config.to_dict()
    configuration.check_run(plain)
    its_model = configuration.model_config(plain)
    configuration.loss_config(plain)
    configuration.optimizer_config(plain, total_steps=100)
    assert bool(its_model.speech_weight) == (model == "save")
    assert bool(its_model.sound_weight) == (model != "clip4clip")
    assert bool(config.loss.margin_delta) == (model != "clip4clip")
    if name == "demo":  # its sizes are the config's; the others are prepared as they are by default
        return
    recipe = Recipe(**datasets.load_dataset(name).RECIPE)
    recipe.check(configuration.expected_recipe(its_model, config.data.max_frames), name)


def test_the_makefile_prepares_the_demo_in_the_sizes_of_its_config():
    makefile = (pathlib.Path(__file__).parents[1] / "Makefile").read_text()
    (recipe,) = re.findall(r"^transcribe:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    given = {key: int(value) for key, value in re.findall(r"--(\w+)=(\d+)", recipe)}
    config = demo.get_config()
    model = configuration.model_config(config.to_dict(), [])
    expected = configuration.expected_recipe(model, config.data.max_frames)
    assert {**dataclasses.asdict(Recipe()), **given} == {**dataclasses.asdict(Recipe()), **expected}


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_an_unknown_model(name):
    with pytest.raises(UserError, match="unknown model 'nosuch'"):
        CONFIGS[name].get_config("nosuch")


def test_an_encoder_is_a_variant_or_sizes_and_either_can_become_the_other():
    config = base.get_config()
    config.model.clip = {"image_size": 64, "vision_layers": 2}
    config.model.update({"ast": {"layers": 2}})
    assert isinstance(config.model, ConfigDict) and config.model.clip.image_size == 64
    model = configuration.model_config(config.to_dict(), [])
    assert (model.clip.image_size, model.clip.vision_layers, model.ast.layers) == (64, 2, 2)
    assert model.clip.text_layers == SAVEConfig().clip.text_layers
    config.model.clip = "ViT-B/16"
    assert configuration.model_config(config.to_dict(), []).clip.patch_size == 16
    config.model.clip = {"imagesize": 64}
    with pytest.raises(UserError, match=r"config\.model\.clip has no field imagesize; it has"):
        configuration.model_config(config.to_dict(), [])
    with pytest.raises(TypeError):
        config.model.clip = 3
    with pytest.raises(TypeError):
        config.model.frame_positions = {"image_size": 64}


def test_the_base_has_the_defaults_of_the_code():
    """So that a key which a run's config.json lacks means one thing."""
    plain = base.get_config().to_dict()
    model = configuration.model_config(plain, [])
    assert dataclasses.replace(model, attention=SAVEConfig.attention) == SAVEConfig()
    assert configuration.loss_config(plain) == LossConfig()


def test_what_differs_from_msrvtt():
    """Spec section 10, and section 6 for the margin."""
    assert difference(msrvtt.get_config()) == {"data.variant": "9k"}
    assert difference(msrvtt.get_config("7k")) == {"data.variant": "7k"}
    assert difference(vatex.get_config()) == {"data.variant": "default", "loss.margin_delta": 0.05}
    assert difference(charades.get_config()) == {
        "data.variant": "default",
        "data.max_frames": 32,
        "data.max_words": 64,
        "batch_size": 64,
    }
    assert difference(lsmdc.get_config()) == {"data.variant": "default"}
    assert difference(folder.get_config()) == {"data.variant": "default"}


def test_msrvtt_takes_a_split_and_a_model():
    config = msrvtt.get_config("7k-1ka,avigate")
    assert (config.data.variant, config.model.vision_weight) == ("7k-1ka", 0.95)
