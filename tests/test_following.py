"""Evaluating beside training: what a trainer leaves to a follower, and what both leave behind."""

import contextlib
import csv
import json
import os
import signal
import subprocess
import sys
import time

import jax
import pytest

from data_pipelines.preparation import prepare
from data_pipelines.recipe import Recipe
from save_jax import evaluate, following, main, results
from save_jax.evaluate import Evaluator
from save_jax.following import Watch, beating
from tests.support import caching, miniatures, programs

WITHIN = 300  # seconds for a job on a busy machine


@pytest.fixture
def fast(monkeypatch):
    """A heart that beats twenty times a second."""
    monkeypatch.setattr(following, "BEAT", 0.05)
    monkeypatch.setattr(following, "TIMEOUT", 0.5)


def until(condition, what: str, within: float = 10) -> None:
    end = time.monotonic() + within
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.02)


# ---------------------------------------------------------------------------------- the heartbeat


def test_a_follower_lives_while_its_number_moves(tmp_path, fast, capsys):
    with Watch(tmp_path) as watch:
        assert not watch.is_alive()
        with beating(tmp_path):
            until(watch.is_alive, "the heartbeat is not seen")
            time.sleep(2 * following.TIMEOUT)
            assert watch.is_alive(), "it still moves"
            assert capsys.readouterr().out == ""
        assert not (tmp_path / following.HEARTBEAT).exists()
        until(lambda: not watch.is_alive(), "a follower that has ended is no longer alive")
        assert "evaluating here again" in capsys.readouterr().out


def test_a_number_that_stands_still_is_a_dead_followers(tmp_path, fast, capsys):
    path = tmp_path / following.HEARTBEAT
    with Watch(tmp_path) as watch:
        with beating(tmp_path):
            until(watch.is_alive, "the heartbeat is not seen")
            left = path.read_text()
        path.write_text(left)  # as one that is killed leaves it
        until(lambda: not watch.is_alive(), "it has stood still for longer than the time-out")
        assert "stands still: evaluating here again" in capsys.readouterr().out
    with Watch(tmp_path) as watch:  # a trainer that starts later does not take it for alive
        assert not watch.is_alive()


def test_a_follower_that_lives_before_the_trainer_is_seen_at_the_first_look(tmp_path, fast):
    with beating(tmp_path):
        until((tmp_path / following.HEARTBEAT).exists, "no heartbeat")
        with Watch(tmp_path) as watch:
            assert watch.is_alive()


def test_a_second_follower_is_not_taken_for_the_first_ones_end(tmp_path, fast):
    """The one that ends removes only a file of its own."""
    with beating(tmp_path), contextlib.ExitStack() as second:
        with beating(tmp_path):
            pass
        second.enter_context(Watch(tmp_path))
        until((tmp_path / following.HEARTBEAT).exists, "the first one's is written again")


def test_where_no_heartbeat_can_be_written_a_follower_does_not_begin(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError), beating(tmp_path / "file"):
        pass
    (tmp_path / following.HEARTBEAT).mkdir()
    with pytest.raises(OSError, match=following.HEARTBEAT), beating(tmp_path):
        pass


# ------------------------------------------------------------------------- by the public commands


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Someone's own videos: two to train on, two that choose, and three that report."""
    root, out = tmp_path_factory.mktemp("videos"), tmp_path_factory.mktemp("prepared")
    miniatures.folder(root)
    with open(root / "captions.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    names = sorted({row["video_id"] for row in rows})
    splits = dict(zip(names, ("train", "train", "val", "val", "test", "test"), strict=True))
    with open(root / "captions.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["video_id", "caption", "split"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows({**row, "split": splits[row["video_id"]]} for row in rows)
    recipe = Recipe(image_size=32, fbank_frames=64, max_frames=4)
    prepare("folder", root=str(root), out=str(out), recipe=recipe, workers=1)
    return out


OWN = caching.CHANGES | {
    "data.dataset": "folder",
    "data.variant": "default",
    "data.eval_split": "val",
    "data.test_split": "test",
    "model.sound_weight": 0,
    "model.speech_weight": 0,
    "loss.soft_albef_weight": 0,
    "batch_size": 2,
    "eval_batch_size": 2,
    "eval_every": 1,
    "ema": 0.9,
    "steps": 8,
}


def flags(data, workdir, **changes) -> list[str]:
    changes = OWN | {"data.dir": data} | changes
    found = [f"--config.{key}={value}" for key, value in changes.items()]
    return ["main", "--config=configs/demo.py", *found, f"--workdir={workdir}"]


@pytest.fixture
def one_device(monkeypatch):
    """Two clips are too few for the tests' eight."""
    one = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: one)


def metrics(workdir, step: int, subset: str = "") -> dict:
    return json.loads((results.results_at(workdir, step, subset) / "metrics.json").read_text())


def test_one_split_chooses_what_another_reports(data, tmp_path, one_device, monkeypatch, capsys):
    """Also after a signal within an evaluation: what is left is evaluated by the same command."""
    command = flags(data, tmp_path, **{"optimizer.new": 1e-2})
    embed, seen = Evaluator.embed_videos, []

    def stopped(self, *arguments):
        seen.append(len(seen) + 1)
        if len(seen) == 3:  # the second step that is due; of each, the average comes first
            os.kill(os.getpid(), signal.SIGTERM)
        return embed(self, *arguments)

    monkeypatch.setattr(Evaluator, "embed_videos", stopped)
    assert main.main(command) == os.EX_TEMPFAIL
    said = capsys.readouterr().out
    assert "SIGTERM: stopped after step 4 of 8, checkpoint written" in said
    assert "and evaluates it" in said
    assert (tmp_path / "evaluation/2/metrics.json").exists()
    assert not (tmp_path / "evaluation/4/metrics.json").exists()
    assert (tmp_path / "checkpoints/4").is_dir()

    monkeypatch.setattr(Evaluator, "embed_videos", embed)
    assert main.main(command) == 0
    said = capsys.readouterr().out
    assert "resuming from checkpoint 4 of 8" in said
    totals = {step: metrics(tmp_path, step)["t2v"]["SumR"] for step in (2, 4, 6, 8)}
    chosen = json.loads((tmp_path / results.BEST).read_text())
    assert (chosen["value"], chosen["step"]) == max((t, s) for s, t in totals.items())
    assert chosen["split"] == "val"
    kept = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert kept == {"6", "8", str(chosen["step"])}
    for step in {8, chosen["step"]}:
        reported = metrics(tmp_path, step, results.TEST)
        assert reported["protocol"]["split"] == "test" and reported["protocol"]["videos"] == 3
        assert reported["protocol"]["checkpoint"] == f"checkpoints/{step}"
        for subset in ("ema", "test/ema"):  # beside them, the average of the parameters
            assert metrics(tmp_path, step, subset)["protocol"]["selection"].endswith(", ema")
    tested = {path.parent.parent.name for path in tmp_path.glob("evaluation/*/test/metrics.json")}
    assert tested == {"8", str(chosen["step"])}
    assert f"test split, step {chosen['step']} (" in said

    # The run is complete: the same command evaluates nothing again.
    monkeypatch.setattr(evaluate, "run_evaluation", lambda *_, **__: pytest.fail("evaluated again"))
    assert main.main(command) == 0
    assert f"test split, step {chosen['step']} (" in capsys.readouterr().out


def test_a_test_split_is_another_than_the_one_that_chooses(data, tmp_path, capsys):
    assert main.main(flags(data, tmp_path, **{"data.test_split": "val"})) == 2
    assert "config.data.test_split = 'val': expected another split" in capsys.readouterr().err


def start(command: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-u", "-m", "save_jax.main", *command[1:]],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"XLA_FLAGS": programs.flags()},
    )


def test_a_follower_evaluates_what_the_trainer_leaves_it(data, tmp_path, one_device):
    """And ends with the summary of them all."""
    steps, every = 400, 100
    changes = {"steps": steps, "eval_every": every // 2, "follow_keep": 9}
    command = flags(data, tmp_path / "run", **changes)
    follower = start([*command, "--config.mode=follow"])
    trainer = None
    try:
        until((tmp_path / "run" / following.HEARTBEAT).exists, "no heartbeat", WITHIN)
        trainer = start(command)
        said, _ = trainer.communicate(timeout=WITHIN)
        assert trainer.returncode == 0, said
        followed, _ = follower.communicate(timeout=WITHIN)
        assert follower.returncode == 0, followed
    finally:
        for job in (trainer, follower):
            if job is not None:
                job.kill()
    assert "left to the follower to evaluate" in said, said
    assert "waiting for a run with a checkpoint" in followed
    due = set(range(every, steps + 1, every))
    assert {s for s in due if (tmp_path / f"run/evaluation/{s}/metrics.json").exists()} == due
    assert "test split, step 400 (" in followed
    assert not (tmp_path / "run" / following.HEARTBEAT).exists()

    # What it has read is what the trainer has written: evaluated anew, it is the same.
    best = json.loads((tmp_path / "run" / results.BEST).read_text())
    source = {"init_from": tmp_path / f"run/checkpoints/{best['step']}", "mode": "evaluate"}
    assert main.main(flags(data, tmp_path / "again", **changes, **source)) == 0
    own, other = (metrics(tmp_path / name, best["step"]) for name in ("again", "run"))
    assert own["t2v"] == other["t2v"] and other["t2v"]["SumR"] == best["value"]
    assert {s for s in due if (tmp_path / f"run/evaluation/{s}/ema/metrics.json").exists()} == due
