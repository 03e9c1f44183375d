"""The command line: mistakes end in one message and exit code 2, before any work is lost."""

import contextlib
import io
import json
import subprocess
import sys

import pytest

from save_jax import cli, evaluate, main, resume
from save_jax.cache import __main__ as cache
from save_jax.errors import OutageError, UserError


def command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "save_jax.main", *arguments],
        check=False,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.nokey=3"], "unknown config key 'nokey'"),
        (["--config.optimizer.nokey=3"], "unknown config key 'nokey'"),
        (["--config.epochs=many"], "--config.epochs=many: invalid literal"),
        (["--config=configs/nope.py"], "configs/nope.py"),
        (["--config=configs/demo.py:nope"], "unknown model 'nope'"),
        (["--nope=1"], "Unknown command line flag 'nope'"),
        (["stray"], "unexpected arguments: stray"),
        (["--config.cache.dir=gs://bucket/cache"], "expected a directory on a disk"),
        (["--config.mode=dream"], "expected 'train' or 'evaluate'"),
        (["--config.log_every=0"], "config.log_every = 0: expected at least 1"),
        (["--config.dtype=float8"], "expected one of float32, bfloat16"),
        (["--config.model.attention=cudnn"], "needs an NVIDIA GPU and config.dtype = 'bfloat16'"),
        (["--config.mesh.data=3"], "does not fit the 8 devices"),
        (["--config.batch_size=12"], "multiple of 8, say 16"),
        (["--config.eval_batch_size=0"], "multiple of 8, say 8"),
        (["--config.data.max_words=78"], "expected 1 to 77"),
        (["--config.model.clip.patch_size=7"], "not a multiple of patch_size 7"),
        (["--config.model.speech_weight=0", "--config.model.sound_weight=0"], "needs sound"),
        (["--config.optimizer.new=-1"], "expected a number of at least 0"),
        (["--config=configs/msrvtt.py"], "python -m data_pipelines.prepare msrvtt"),
        (
            ["--config=configs/msrvtt.py", "--config.data.dir=/nowhere"],
            "did not find /nowhere/msrvtt/9k",
        ),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(tmp_path, arguments, message):
    if not any(argument.startswith("--config=") for argument in arguments):
        arguments = ["--config=configs/demo.py", *arguments]
    done = command(f"--workdir={tmp_path / 'run'}", *arguments)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("run", [main.main, cache.command])
def test_an_outage_is_one_message_and_exit_code_75(monkeypatch, capsys, run):
    def fail(*arguments):
        raise OutageError("gs://bucket/a: it does not answer")

    monkeypatch.setattr(cli, "parse", fail)
    assert run(["command"]) == 75
    assert capsys.readouterr().err == "interrupted: gs://bucket/a: it does not answer\n"


def test_the_workdir_is_required():
    assert "--workdir=DIR is required" in command().stderr


def test_another_config_in_a_workdir_is_refused_by_key(tmp_path):
    config = {"seed": 0, "mode": "train", "optimizer": {"new": 1e-4, "clip": 1e-7}}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    resume.check_same_config({**config, "mode": "evaluate"}, tmp_path)
    changed = {**config, "seed": 1, "optimizer": {"new": 1e-3, "clip": 1e-7}}
    with pytest.raises(UserError) as refusal:
        resume.check_same_config(changed, tmp_path)
    assert "seed: 0 there, 1 now" in str(refusal.value)
    assert "optimizer.new: 0.0001 there, 0.001 now" in str(refusal.value)
    assert "clip" not in str(refusal.value)


def test_a_config_file_cut_short_is_named(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"seed": ')
    with pytest.raises(UserError, match=r"config\.json is not valid JSON"):
        resume.check_same_config({"seed": 0}, tmp_path)


def test_summary_shows_the_last_and_the_best(tmp_path):
    def evaluation(step: int, total: float) -> None:
        scores = {"R1": 1.0, "R5": 2.0, "R10": 3.0, "MdR": 4.0, "MnR": 5.0, "SumR": total}
        folder = tmp_path / "evaluation" / str(step)
        folder.mkdir(parents=True)
        result = {"step": step, "t2v": scores, "v2t": scores, "groups": {}}
        (folder / "metrics.json").write_text(json.dumps(result))

    evaluation(5, 60.0)
    evaluation(10, 50.0)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        evaluate.summarise(tmp_path, "test")
    text = out.getvalue()
    assert text.index("last step (10)") < text.index("step 5; an optimistic protocol")
    assert text.index("50.0") < text.index("60.0")


def test_of_equal_evaluations_the_later_is_the_best(tmp_path, capsys):
    """It is the one whose checkpoint is kept."""
    for step in (5, 10, 15):
        scores = {"R1": 1.0, "R5": 2.0, "R10": 3.0, "MdR": 4.0, "MnR": 5.0}
        scores["SumR"] = 50.0 if step == 15 else 60.0
        folder = tmp_path / "evaluation" / str(step)
        folder.mkdir(parents=True)
        result = {"step": step, "t2v": scores, "v2t": scores, "groups": {}}
        (folder / "metrics.json").write_text(json.dumps(result))
    evaluate.summarise(tmp_path, "test")
    assert "step 10; an optimistic protocol" in capsys.readouterr().out
