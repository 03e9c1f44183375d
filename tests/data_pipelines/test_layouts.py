"""Every data set's layout goes through all of preparation, and trains and evaluates a tiny model.

The experiments' own configs are used, but for sizes; test_configs.py has what they are.
"""

import csv
import functools
import importlib
import json

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from data_pipelines import datasets
from data_pipelines.preparation import prepare, usual_recipe
from data_pipelines.prepare import main as prepare_main
from data_pipelines.recipe import version_directory
from save_jax import config as configuration
from save_jax import evaluate, sharding, train
from save_jax.data import Splits
from save_jax.errors import UserError
from tests.support import miniatures

BATCH = 4
SIZES = {"image_size": 32, "fbank_frames": 64, "max_frames": 32}
CLIP = {
    "embed_dim": 16,
    "image_size": 32,
    "patch_size": 16,
    "vision_width": 16,
    "vision_layers": 1,
    "vision_heads": 2,
    "text_width": 16,
    "text_layers": 1,
    "text_heads": 2,
}
AST = {"fbank_frames": 64, "stride": 16, "width": 16, "layers": 1, "heads": 2}

# Of the clips of each split, in the order of the miniatures' numbers: every fourth has no sound.
EXPECTED = {
    "charades": {"train": [0, 1, 2, 3], "test": [4, 5]},
    "folder": {"train": [1, 0, 2, 3], "test": [5, 4, 6]},
    "lsmdc": {"train": [0, 1, 2], "val": [3, 4], "test": [5, 6]},
    "msrvtt": {"train": [0, 1, 2, 3, 4, 5, 6], "test": [7, 8, 9, 10, 11]},
    "vatex": {"train": [0, 1, 2, 3], "val": [4, 5], "test": [6, 7]},
}


@pytest.fixture(scope="module")
def prepared(miniature_of, tmp_path_factory):
    """Prepares a data set's miniature, by name; returns the folder for what is prepared."""
    out = tmp_path_factory.mktemp("layouts")

    @functools.cache
    def prepare_it(name: str):
        root = miniature_of(name)
        recipe = usual_recipe(name, **SIZES)
        prepare(name, root=str(root), out=str(out), recipe=recipe, workers=1, strict=True)
        return out

    return prepare_it


def tiny(name: str, data_dir) -> ConfigDict:
    """The experiment of a data set, with a model that a test can afford."""
    config = importlib.import_module(f"configs.{name}").get_config()
    with config.ignore_type():
        config.model.clip, config.model.ast = ConfigDict(CLIP), ConfigDict(AST)
    config.model.fusion_layers, config.model.audio_queries = 1, 4
    config.batch_size = config.eval_batch_size = BATCH
    # Charades' sizes and one margin for all: one program serves, and most of the time is compiling.
    config.data.update(max_frames=32, max_words=64)
    config.loss.margin_delta = 0.1
    config.data.dir = str(data_dir)
    return config


@functools.cache
def program(model, rates, loss):
    """What the experiments compile to, which is the same for all of them."""
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1}, jax.devices()[:1])
    graphdef, state = train.create_state(model, rates, 0, mesh)
    step = jax.jit(train.make_train_step(graphdef, rates, loss, mesh))
    return mesh, state, step, evaluate.Evaluator(graphdef, mesh, BATCH, loss.local_weight, 1000)


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_what_is_prepared(name, prepared):
    directory = version_directory(str(prepared(name)), name, datasets.check_variant(name, ""), 1)
    for split, numbers in EXPECTED[name].items():
        entries = json.loads((directory / f"index-{split}.json").read_text())
        assert [entry["has_audio"] for entry in entries] == [n % 4 != 3 for n in numbers]
        assert [entry["has_teacher"] for entry in entries] == [n % 4 != 3 for n in numbers]
        assert [entry["transcript"] for entry in entries] == [
            "" if n % 4 == 3 or n % 3 == 2 else miniatures.caption(n, 0) for n in numbers
        ]
        # One frame a second of three; Charades has two.
        frames = {"charades": 6}.get(name, 3)
        assert {entry["num_frames"] for entry in entries} == {frames}
        for entry, n in zip(entries, numbers, strict=True):
            thing = miniatures.caption(n, 0).split(" is ")[0]
            assert all(thing in caption for caption in entry["captions"])
            assert bool(entry["captions"]) == (entry["video_id"] != "unlisted")
    assert (directory / "problems.csv").read_text().splitlines() == ["split,video_id,problem"]


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_it_trains_and_evaluates(name, prepared):
    config = tiny(name, prepared(name)).to_dict()
    configuration.check_run(config)
    model, loss = configuration.model_config(config), configuration.loss_config(config)
    rates = configuration.optimizer_config(config, total_steps=10)
    mesh, state, step, evaluator = program(model, rates, loss)
    data = Splits(config)

    before = {name: np.array(value) for name, value in state.trained.items()}
    for _, batch in sharding.prefetch(data.training().batches(0, 2), mesh):
        assert batch.frames.shape == (BATCH, 32, 32, 32, 3)
        assert batch.transcript_ids.shape == (BATCH, 64)
        state, scalars = step(state, batch)
        assert np.isfinite(scalars["loss"]) and scalars["contrastive"] > 0
    changed = [n for n, value in state.trained.items() if (np.array(value) != before[n]).any()]
    assert "audio_resampler.query_tokens" in changed and len(changed) > len(before) / 2

    evaluation = data.evaluation()
    ranks, result = evaluator.evaluate({**state.trained, **state.frozen}, evaluation)
    assert ranks["best_scores"].shape == (len(evaluation.captions), len(EXPECTED[name]["test"]))
    assert ranks["v2t_rank"].shape == (len(EXPECTED[name]["test"]),)
    assert np.isfinite(ranks["best_scores"]).all() and 0 <= result["t2v"]["SumR"] <= 300


def test_groups_reach_the_results(prepared):
    evaluation = Splits(tiny("folder", prepared("folder")).to_dict()).evaluation()
    assert list(evaluation.groups) == ["", "vision", "", "vision"]
    assert [evaluation.video_ids[row] for row in evaluation.video_of_caption] == [
        "a/deep/six", "a/deep/six", "five", "five",
    ]  # fmt: skip
    assert evaluation.video_ids[2] == "unlisted"


def test_a_folder_without_captions_is_prepared_but_not_ranked(miniature_of, tmp_path):
    root, out = tmp_path / "root", tmp_path / "out"
    root.mkdir()
    for name in ("a", "b c", "unlisted.webm", "asr.json"):
        (root / name).symlink_to(miniature_of("folder") / name)
    flags = [f"--{key}={value}" for key, value in SIZES.items()]
    assert prepare_main(["folder", f"--root={root}", f"--out={out}", "--workers=1", *flags]) == 0
    entries = json.loads((out / "folder/default/1.0.0/index-test.json").read_text())
    assert len(entries) == 6 and not any(entry["captions"] for entry in entries)
    data = Splits(tiny("folder", out).to_dict())
    with pytest.raises(UserError, match=r"captions in the split 'test', found 6 clips without any"):
        data.evaluation()


def test_problems_of_annotations_are_counted_and_named(miniature_of, tmp_path, capsys):
    root, out = tmp_path / "root", tmp_path / "out"
    root.mkdir()
    for name in ("a", "five.mov", "unlisted.webm", "asr.json"):
        (root / name).symlink_to(miniature_of("folder") / name)
    (root / "five.webm").symlink_to(root / "unlisted.webm")
    (root / "loop").symlink_to(root)
    (root / "empty.mp4").write_bytes(b"")
    (root / "captions.csv").write_bytes(
        "\ufeffvideo_id,caption\r\nfive,a car\r\na/one\r\ngone,a boat\r\n".encode()
    )
    flags = [f"--{key}={value}" for key, value in SIZES.items()]
    command = ["folder", f"--root={root}", f"--out={out}", "--workers=1", *flags]
    assert prepare_main([*command, "--strict"]) == 2
    assert "five.webm" in capsys.readouterr().err
    assert prepare_main(command) == 0
    with (out / "folder/default/1.0.0/problems.csv").open(newline="") as file:
        problems = {row["video_id"]: row["problem"] for row in csv.DictReader(file)}
    assert problems.keys() == {
        str(root / "five.webm"), str(root / "captions.csv"), "gone", "empty",
    }  # fmt: skip
    assert "line 3 left out: it has no caption and no split" in problems[str(root / "captions.csv")]
    entries = json.loads((out / "folder/default/1.0.0/index-test.json").read_text())
    assert {entry["video_id"]: entry["captions"] for entry in entries} == {
        "a/deep/six": [], "a/it's \"two\", 2": [], "a/one": [], "five": ["a car"], "unlisted": [],
    }  # fmt: skip
