"""A run is evaluated as the model that it was trained as, whatever config evaluates it."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest

from configs import base
from save_jax import evaluate, main, resume, train
from save_jax import recorded as run_config
from save_jax.data import Splits
from save_jax.errors import UserError
from save_jax.weights import __main__ as weights
from save_jax.weights.files import recognise
from tests.support import caching, miniatures, object_store, programs

ROOT = pathlib.Path(__file__).parents[1]
STEP = 2  # the run's last
CONFIG = """
from configs import demo


def get_config(model="save"):
    config = demo.get_config(model)
    config.update_from_flattened_dict({changes!r})
    return config
"""
# In what the run differs from the config, which no parameter's shape shows.
TRAINED = {
    "model.vision_weight": 0.8,
    "model.sound_weight": 0.25,
    "loss.local_weight": 0.2,
    "data.max_words": 10,
}


def command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "save_jax.main", *arguments],
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": programs.flags()},
    )


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A config file of a tiny SAVE on the miniature MSR-VTT."""
    from data_pipelines.preparation import prepare
    from data_pipelines.recipe import Recipe

    folder = tmp_path_factory.mktemp("data")
    miniatures.msrvtt(folder / "root", n_train=5, n_test=3)
    recipe = Recipe(image_size=32, fbank_frames=64, max_frames=4)
    out = str(folder / "prepared")
    prepare("msrvtt", root=str(folder / "root"), out=out, recipe=recipe, workers=1)
    changes = caching.CHANGES | {"data.dir": out, "steps": STEP}
    (folder / "tiny.py").write_text(CONFIG.format(changes=changes))
    return folder / "tiny.py"


def values(config: pathlib.Path, **changes: Any) -> dict[str, Any]:
    """The same config, for runs in this process."""
    return caching.config(config.parent / "prepared", steps=STEP, **changes)


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    """A run that was trained, and evaluated at its end, with other weights than the config's."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    overrides = [f"--config.{key}={value}" for key, value in TRAINED.items()]
    done = command(f"--config={config}", f"--workdir={workdir}", *overrides)
    assert done.returncode == 0, done.stderr
    return workdir


def evaluation(workdir: pathlib.Path, step: int = STEP) -> tuple[np.ndarray, dict[str, Any]]:
    folder = workdir / "evaluation" / str(step)
    return np.load(folder / "similarity.npy"), json.loads((folder / "metrics.json").read_text())


def test_a_run_is_evaluated_as_it_was_trained(config, run, tmp_path):
    done = command(
        f"--config={config}",
        f"--workdir={tmp_path}",
        "--config.mode=evaluate",
        f"--config.init_from={run}",
        "--config.optimizer.new=0.5",  # of no concern to an evaluation
    )
    assert done.returncode == 0, done.stderr
    (scores, metrics), (expected, at_its_end) = evaluation(tmp_path), evaluation(run)
    np.testing.assert_array_equal(scores, expected)
    said = {line for line in done.stdout.splitlines() if " in the config, " in line}
    assert said == {
        f"{key}: {here} in the config, {TRAINED[key]} in {run}/config.json: the run's is used"
        for key, here in (
            ("model.vision_weight", 1.0),
            ("model.sound_weight", 0.5),
            ("loss.local_weight", 0.5),
            ("data.max_words", 12),
        )
    }
    # The table can be traced to its model.
    protocol = metrics["protocol"]
    assert protocol["model"]["sound_weight"] == 0.25 and protocol["model"]["audio_queries"] == 4
    assert protocol["loss"] == {"local_weight": 0.2} and protocol["dtype"] == "float32"
    facts = protocol["data"]
    assert {key: facts[key] for key in ("dataset", "variant", *run_config.INPUTS)} == {
        "dataset": "msrvtt",
        "variant": "9k",
        "max_words": 10,
        "max_frames": 4,
        "tokenizer": "",
    }
    assert facts["clips_with"] == {"sound": 66.7, "transcript": 33.3, "teacher": 66.7}
    assert protocol["versions"]["jax"] == jax.__version__ and protocol["warnings"] == []
    # And to its data and code, which the run has recorded.
    recorded = json.loads((run / "config.json").read_text())["provenance"]
    assert recorded["data"]["digests"]["test"] == facts["digest"]
    for key in ("recipe", "transcripts", "vocabulary"):
        assert recorded["data"][key] == facts[key]
    assert facts["recipe"]["frames"]["size"] == 32 and facts["recipe"]["frames"]["quality"] == 95
    (start,) = recorded["starts"]
    assert (start["step"], start["steps"], start["changed"]) == (0, STEP, {})
    assert start["attention"] == protocol["model"]["attention"] == "xla"
    assert start["mesh"] == {"data": 1, "fsdp": 1}
    assert {key: start[key] for key in ("git", "versions", "devices")} == {
        key: protocol[key] for key in ("git", "versions", "devices")
    }
    assert protocol.pop("checkpoint") == f"{run}/checkpoints/{STEP}"
    assert at_its_end["protocol"].pop("checkpoint") == f"checkpoints/{STEP}"
    del protocol["selection"], at_its_end["protocol"]["selection"]
    assert protocol == at_its_end["protocol"]


def test_a_home_directory_is_that_of_the_user(config, run, tmp_path, monkeypatch):
    """A shell leaves --config.init_from=~/run as it is."""
    monkeypatch.setenv("HOME", str(run.parent))
    asked = values(config, mode="evaluate", init_from="~/run", model__sound_weight=0.1)
    assert main.run(asked, tmp_path)
    assert evaluation(tmp_path)[1]["protocol"]["model"]["sound_weight"] == 0.25
    with pytest.raises(UserError, match="Leave these flags out"):
        main.run(asked, tmp_path / "out", explicit=["model.sound_weight"])


def test_another_split_does_not_take_the_place_of_the_runs_own(config, run, capsys):
    before, own = evaluation(run)
    assert main.run(values(config, mode="evaluate", data__eval_split="train"), run)
    after, metrics = evaluation(run)
    np.testing.assert_array_equal(after, before)
    assert metrics == own
    there = run / "evaluation" / str(STEP) / "train"
    other = json.loads((there / "metrics.json").read_text())
    assert other["protocol"]["split"] == "train"
    lines = map(json.loads, (there / "metrics.jsonl").read_text().splitlines())
    assert "eval/train/t2v/R1" in list(lines)[-1]


def test_in_its_own_workdir_with_the_options_of_another_model(config, run, capsys):
    before, _ = evaluation(run)
    assert main.run(values(config, mode="evaluate", **base.MODELS["clip4clip"]), run)
    scores, metrics = evaluation(run)
    np.testing.assert_allclose(scores, before, atol=1e-4)
    said = capsys.readouterr().out
    assert f"model.sound_weight: 0.0 in the config, 0.25 in {run}/config.json" in said
    assert "model.frame_positions: False in the config, True in" in said
    assert metrics["protocol"]["checkpoint"] == f"checkpoints/{STEP}"


def test_a_flag_that_contradicts_the_run_is_refused(config, run, tmp_path):
    done = command(
        f"--config={config}:clip4clip",
        f"--workdir={tmp_path / 'out'}",
        "--config.mode=evaluate",
        f"--config.init_from={run}/checkpoints/{STEP}",
        "--config.model.sound_weight=0.5",
        "--config.model.vision_weight=0.8",  # as the run's
        "--noconfig.model.frame_positions",
    )
    assert done.returncode == 2, done.stdout
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    assert f"--config.model.sound_weight=0.5, but 0.25 in {run}/config.json" in done.stderr
    assert "--config.model.frame_positions=False, but True in" in done.stderr
    assert "vision_weight" not in done.stderr and "local_weight" not in done.stderr
    assert "Leave these flags out" in done.stderr
    assert not (tmp_path / "out").exists()


def test_weights_taken_out_of_a_run_are_evaluated_as_the_config_says(config, run, tmp_path, capsys):
    """The way to another model on purpose; the run itself is left alone."""
    pure = tmp_path / "pure"
    assert weights.main(["import", str(run), f"--out={pure}"]) == 0
    changed = values(config, mode="evaluate", init_from=str(pure))
    assert main.run(changed, tmp_path / "out", explicit=["model.sound_weight"])
    assert f"there is no {pure}/config.json: {pure} is evaluated as the config" in (
        capsys.readouterr().out
    )
    scores, metrics = evaluation(tmp_path / "out", 0)
    assert metrics["protocol"]["model"]["sound_weight"] == 0.5
    assert np.abs(scores - evaluation(run)[0]).max() > 0.1


def test_safetensors_of_a_run_say_what_it_was_trained_as(config, run, tmp_path, capsys):
    file = tmp_path / "model.safetensors"
    assert weights.main(["export", str(run), "--format=safetensors", f"--out={file}"]) == 0
    began = json.loads((run / "config.json").read_text())["provenance"]
    assert recognise.recorded_config(str(file))[1]["provenance"] == began
    assert main.run(values(config, mode="evaluate", init_from=str(tmp_path)), tmp_path / "out")
    said = capsys.readouterr().out
    assert f"model.sound_weight: 0.5 in the config, 0.25 in {file}: the run's is used" in said
    scores, metrics = evaluation(tmp_path / "out", 0)
    np.testing.assert_allclose(scores, evaluation(run)[0], atol=1e-4)
    assert metrics["protocol"]["checkpoint"] == str(tmp_path)
    with pytest.raises(
        UserError, match=r"config\.model\.sound_weight=0\.5, but 0\.25 in .*tensors"
    ):
        changed = values(config, mode="evaluate", init_from=str(file))
        main.run(changed, tmp_path / "out", explicit=["model.sound_weight"])


def test_a_pytorch_file_cannot_say_so_and_the_export_does(run, tmp_path, capsys):
    arguments = ["export", str(run), "--format=save-pytorch", f"--out={tmp_path / 'a.bin'}"]
    assert weights.main(arguments) == 0
    said = capsys.readouterr().out
    assert "model.sound_weight = 0.25" in said and "data.max_words = 10" in said
    assert "speech_weight" not in said


def test_a_run_that_starts_from_another_model_says_so(config, run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "train", lambda *_, **__: False)
    for source, keys in (
        (str(run), {"model.vision_weight", "model.sound_weight", "loss.local_weight"}),
        (f"clip={run}/checkpoints", set()),
    ):
        assert not main.run(values(config, init_from=source), tmp_path / str(len(keys)))
        said = {
            line.split(":")[0]
            for line in capsys.readouterr().out.splitlines()
            if line.endswith(f" in {run}/config.json, where the weights are from")
        }
        assert said == (keys | {"data.max_words"} if keys else set())


def test_data_that_are_not_as_the_runs_are_told(config, run, tmp_path, capsys):
    """In another place they may be the same, made in another way, or of a size that cannot be."""
    from data_pipelines.preparation import prepare
    from data_pipelines.recipe import Recipe

    def evaluated(out) -> list[str]:
        asked = values(config, mode="evaluate", data__dir=str(out))
        evaluation = Splits(resume.as_trained(asked, run, ())).evaluation()
        warnings = evaluate.protocol(evaluation, "x")["warnings"]
        assert capsys.readouterr().err == "".join(f"warning: {line}\n" for line in warnings)
        return warnings

    shutil.copytree(config.parent / "prepared", tmp_path / "same")
    capsys.readouterr()
    assert evaluated(tmp_path / "same") == []

    sizes = {"fbank_frames": 64, "max_frames": 4}
    for out, recipe in (
        ("denser", Recipe(image_size=32, **sizes, frames_per_second=2, encoding="raw")),
        ("larger", Recipe(image_size=64, **sizes)),
    ):
        root = str(config.parent / "root")
        prepare("msrvtt", root=root, out=str(tmp_path / out), recipe=recipe, workers=1)
    capsys.readouterr()
    made = "these data are not made as those that the run was trained on: recipe.frames."
    assert evaluated(tmp_path / "denser") == [
        "the split 'test' is not the one that the run had: it has other clips, captions or "
        "transcripts, or was prepared in another way",
        f"{made}encoding is 'raw' here, 'jpeg' there",
        f"{made}per_second is 2 here, 1 there",
        f"{made}quality is None here, 95 there",
    ]
    with pytest.raises(UserError, match="image_size: wanted 32, prepared with 64"):
        evaluated(tmp_path / "larger")


def test_another_vocabulary_is_refused():
    here = {"vocabulary": "1" * 64, "dataset": "a", "variant": "b", "digest": "2" * 64}
    assert run_config.differences_of_data("test", here, {}) == []
    with pytest.raises(UserError, match=r"config\.data\.tokenizer: expected the vocabulary that"):
        run_config.differences_of_data("test", here, {**here, "vocabulary": "3" * 64})


class Reached(Exception):
    """The run has come to where it would read the data."""


def test_an_evaluation_does_not_take_the_place_of_another_runs(config, run, tmp_path, monkeypatch):
    """The command of a run that started from another, with --config.mode=evaluate added."""

    def data(*arguments):
        raise Reached

    monkeypatch.setattr(main, "open_splits", data)
    (tmp_path / "config.json").write_text(json.dumps(values(config)))
    with pytest.raises(UserError, match=r"Leave config\.init_from empty"):
        main.run(values(config, mode="evaluate", init_from=str(run)), tmp_path)
    (tmp_path / "link").symlink_to(run)  # the same run by another name
    with pytest.raises(Reached):
        main.run(values(config, mode="evaluate", init_from=str(tmp_path / "link")), run)


#### What is compared, without a model.


def recorded(**changes: Any) -> dict[str, Any]:
    """A run's config, as its config.json has it."""
    found = base.get_config()
    with found.ignore_type():
        found.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return json.loads(json.dumps(found.to_dict()))


def as_trained(run: dict[str, Any], *explicit: str, **changes: Any):
    return run_config.as_trained(recorded(**changes), run, "R/config.json", explicit)


def test_what_is_an_evaluations_own_stays_so():
    run = recorded(model__remat="blocks", data__dir="a", seed=3, batch_size=8, dtype="bfloat16")
    config, lines = as_trained(run, "dtype", "data.dir", data__dir="b", data__eval_split="val")
    assert config == recorded(data__dir="b", data__eval_split="val")
    assert lines == [
        "dtype: 'float32' in the config, 'bfloat16' in R/config.json: the config's is used",
        "data.eval_split: 'val' in the config, 'test' in R/config.json: the config's is used",
    ]


def test_frames_and_words_are_the_runs():
    run = recorded(data__max_frames=32, data__max_words=64, data__tokenizer="mine")
    config, lines = as_trained(run)
    assert config == run and len(lines) == 3
    assert "data.max_frames: 12 in the config, 32 in R/config.json: the run's is used" in lines
    with pytest.raises(UserError, match=r"--config.data.max_frames=12, but 32 in R/config.json"):
        as_trained(run, "data.max_frames")


def test_encoders_by_name_and_by_sizes():
    named, small = recorded(model__clip="ViT-B/16"), {"patch_size": 16}
    config, lines = as_trained(named)
    assert config == named
    assert lines == [
        "model.clip: 'ViT-B/32' in the config, 'ViT-B/16' in R/config.json: the run's is used"
    ]
    with pytest.raises(UserError, match=r"--config.model.clip=ViT-B/32, but ViT-B/16 in"):
        as_trained(named, "model.clip")
    # Sizes that are left out are those of ViT-B/32.
    config, lines = as_trained(recorded(model__clip=small))
    assert config["model"]["clip"] == small
    assert lines == [
        "model.clip.patch_size: 32 in the config, 16 in R/config.json: the run's is used"
    ]
    assert as_trained(named, "model.clip", model__clip=small)[1] == []
    with pytest.raises(UserError, match=r"--config.model.clip.patch_size=32, but 16 in"):
        as_trained(recorded(model__clip=small), "model.clip.patch_size", model__clip={})


def test_an_older_run_has_the_defaults_of_keys_that_it_lacks():
    run = recorded(model__sound_weight=0.25)
    del run["model"]["frame_positions"], run["data"]["tokenizer"], run["model"]["remat"]
    config, lines = as_trained(run, model__frame_positions=False)
    assert config == recorded(model__sound_weight=0.25)
    assert set(lines) == {
        "model.sound_weight: 0.5 in the config, 0.25 in R/config.json: the run's is used",
        "model.frame_positions: not in R/config.json, which is older than this key: its default "
        "is used, True",
        "data.tokenizer: not in R/config.json, which is older than this key: its default is used, "
        "''",
    }
    with pytest.raises(UserError, match=r"frame_positions=False, but True in .*\(by default"):
        as_trained(run, "model.frame_positions", model__frame_positions=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: run["model"].update(heads=3), "has model.heads, which this version does not"),
        (lambda run: run["model"]["clip"].update(depth=3), "R/config.json: config.model.clip has"),
        (
            lambda run: run.pop("loss"),
            "R/config.json: expected the config of a run, found no 'loss'",
        ),
        (lambda run: run.update(model=3), "R/config.json: expected the config of a run, found no"),
    ],
)
def test_what_is_no_runs_config_is_refused(change, message):
    run = recorded(model__clip={"patch_size": 16})
    change(run)
    with pytest.raises(UserError) as refusal:
        as_trained(run)
    assert message in str(refusal.value)


@pytest.mark.parametrize("text", ['{"seed": ', "[1]", "\xff"])
def test_a_damaged_config_is_named(text, tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"config\.json.*restore it"):
        run_config.read(path)


@pytest.mark.parametrize("root", ["disk", "gs://bucket"])
@pytest.mark.parametrize("named", ["run", "run/checkpoints", "run/checkpoints/20"])
def test_the_run_that_a_checkpoint_belongs_to(root, named, tmp_path, monkeypatch):
    if root == "disk":
        root = str(tmp_path)
        (tmp_path / "run/checkpoints/20/default").mkdir(parents=True)
        (tmp_path / "run/config.json").write_text('{"seed": 1}')
    else:
        store = object_store.register()
        object_store.glob_without_protocol(monkeypatch)
        store.pipe("gs://bucket/run/checkpoints/20/default/d", b"")
        store.pipe("gs://bucket/run/checkpoints/20/commit_success.txt", b"")
        store.pipe("gs://bucket/run/config.json", b'{"seed": 1}')
    found = recognise.recorded_config(f"{root}/{named}")
    assert found == (f"{root}/run/config.json", {"seed": 1})


def test_a_checkpoint_that_was_moved_out_of_its_run_has_no_config(tmp_path):
    (tmp_path / "best/20/default").mkdir(parents=True)
    expected = (f"{tmp_path}/best/config.json", None)
    for named in ("best", "best/20"):
        assert recognise.recorded_config(str(tmp_path / named)) == expected
    shutil.rmtree(tmp_path / "best")
    assert recognise.recorded_config(str(tmp_path / "best")) is None
