"""What a run's directory is taken for, whole, half done or broken."""

import json
import os
import shutil

import pytest

from configs import base
from launch.report import runs
from save_jax import locks, recorded
from save_jax.errors import UserError
from tests.support import object_store, stand_in


@pytest.fixture
def run(tmp_path):
    """A complete run of five steps."""
    stand_in.main([f"--workdir={tmp_path / 'run'}", "--config.steps=5"])
    return tmp_path / "run"


def state(workdir) -> str:
    return runs.read(workdir).state


def test_a_complete_run(run):
    found = runs.read(run)
    assert (found.state, found.step, found.fraction, found.problems) == ("complete", 5, 1.0, ())
    assert found.evaluation and found.evaluation["t2v"]["SumR"] == 5.0


def test_an_evaluation_without_its_checkpoint_is_not_complete(run):
    shutil.rmtree(run / "checkpoints/5")
    assert state(run) == "stopped"
    with locks.hold(run):
        assert state(run) == "running"
    shutil.rmtree(run / "checkpoints")  # all removed to save space
    assert state(run) == "complete"


def test_a_checkpoint_that_is_not_all_in_its_bucket_does_not_count(run):
    store = object_store.register()
    store.put(str(run), "gs://bucket/run", recursive=True)
    store.pipe("gs://bucket/run/checkpoints/5/default/d", b"")
    assert state("gs://bucket/run") != "complete"
    store.pipe("gs://bucket/run/checkpoints/5/commit_success.txt", b"")
    assert state("gs://bucket/run") == "complete"


def test_the_schedule_in_epochs(run):
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "steps": 0, "epochs": 1}))
    assert state(run) == "complete"
    (run / "config.json").write_text(json.dumps({**config, "steps": 0, "epochs": 2}))
    found = runs.read(run)
    assert (found.state, found.fraction) == ("stopped", 0.5)


def test_what_computed_a_run_is_no_part_of_its_config(run):
    """Else each machine and revision would be a column of the report."""
    config = json.loads((run / "config.json").read_text())
    recorded.write(base.get_config().to_dict(), run, {"digests": {}}, {"step": 0})
    assert recorded.PROVENANCE in json.loads((run / "config.json").read_text())
    assert runs.read(run).config == config


def test_states_of_a_run_that_is_not_complete(run, tmp_path):
    shutil.rmtree(run / "evaluation")
    lock = runs.lock(run)
    assert lock is not None
    assert state(run) == "running"
    os.close(lock)
    assert state(run) == "stopped"
    runs.write_json(run / runs.EXIT_FILE, {"code": 75})
    assert state(run) == "stopped"
    runs.write_json(run / runs.EXIT_FILE, {"code": 1})
    assert state(run) == "failed"
    assert state(tmp_path / "absent") == "waiting"


def test_an_exit_code_does_not_outlive_the_start_that_it_ended(run):
    """A failed point of a sweep is started again by hand, which nothing records, and killed."""
    shutil.rmtree(run / "evaluation")
    runs.write_json(run / runs.EXIT_FILE, {"code": 1})
    assert state(run) == "failed"
    recorded.write({}, run)  # as a run does once it has begun
    with locks.hold(run):
        content = json.loads((run / locks.LOCK).read_text())
    (run / locks.LOCK).write_text(json.dumps({**content, "started": 0}))  # it was killed
    assert state(run) == "stopped"


def test_broken_files_are_named_and_not_fatal(run):
    (run / "evaluation/5/metrics.json").write_text('{"t2v": ')
    (run / "config.json").write_text("[]")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')
    found = runs.read(run)
    assert found.evaluation is None and found.step == 5
    assert [problem.split()[0] for problem in found.problems] == [
        str(run / "config.json"),
        str(run / "evaluation/5/metrics.json"),
    ]


def test_runs_are_found_at_any_depth_with_the_points_that_wait(run, tmp_path):
    shutil.copytree(run, tmp_path / "deep/er/other")
    (tmp_path / "unrelated").mkdir()
    (tmp_path / "unrelated/config.json").write_text("{}")  # somebody's model, not a run
    runs.write_json(tmp_path / "sweep.json", {"points": {"run": {}, "seed-2": {}}})
    found = {str(r.workdir.relative_to(tmp_path)): r.state for r in runs.find(tmp_path)}
    assert found == {"run": "complete", "seed-2": "waiting", "deep/er/other": "complete"}


def test_a_directory_without_runs_is_refused(tmp_path):
    with pytest.raises(UserError, match="no run in or below"):
        runs.find(tmp_path)
    with pytest.raises(UserError, match="is not a directory"):
        runs.find(tmp_path / "nope")
