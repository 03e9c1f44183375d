"""The table and the plot of many runs."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree

import pytest

from launch.report import __main__ as report
from launch.report import runs
from save_jax import locks
from tests.support import object_store, stand_in


@pytest.fixture
def directory(tmp_path):
    """Three rates, two seeds each; SumR grows with both."""
    for rate in (1e-4, 1e-3, 1e-2):
        for seed in (0, 1):
            flags = [f"--config.optimizer.new={rate}", f"--config.seed={seed}"]
            stand_in.main([f"--workdir={tmp_path / f'runs/{rate}-{seed}'}", *flags])
    return tmp_path / "runs"


def rows(capsys) -> list[list[str]]:
    return [line.split() for line in capsys.readouterr().out.splitlines()]


def test_the_best_run_is_first_and_equal_keys_are_no_columns(directory, capsys):
    assert report.main([str(directory)]) == 0
    header, *body = rows(capsys)
    assert header[:5] == ["run", "seed", "optimizer.new", "step", "SumR"] and "steps" not in header
    assert [row[0] for row in body] == [
        "0.01-1",
        "0.01-0",
        "0.001-1",
        "0.001-0",
        "0.0001-1",
        "0.0001-0",
    ]
    assert body[0] == [
        "0.01-1",
        "1",
        "0.01",
        "5",
        "106.0",
        "101.0",
        "2.0",
        "3.0",
        "4.0",
        "5.0",
        "complete",
    ]


def test_ranks_sort_upwards(directory, capsys):
    path = directory / "0.001-0/evaluation/5/metrics.json"
    path.write_text(path.read_text().replace('"MdR": 4.0', '"MdR": 1.0'))
    assert report.main([str(directory), "--metric=v2t/MdR"]) == 0
    header, *body = rows(capsys)
    assert body[0][0] == "0.001-0" and "v2t/MdR" in header


def test_the_csv_has_all_digits_and_the_runs_without_results(directory, tmp_path, capsys):
    (directory / "sweep.json").write_text('{"points": {"late": {}}}')
    assert report.main([str(directory), f"--csv={tmp_path / 'runs.csv'}"]) == 0
    with open(tmp_path / "runs.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert float(table[0]["SumR"]) == 106.0 and table[0]["optimizer.new"] == "0.01"
    assert table[-1] == {
        **dict.fromkeys(table[0], ""),
        "run": "late",
        "step": "0",
        "state": "waiting",
    }
    assert "-" in rows(capsys)[-1]


def state(directory, capsys) -> tuple[str, str]:
    """The state of the last run in the table, and what stderr says."""
    assert report.main([str(directory)]) == 0
    captured = capsys.readouterr()
    return captured.out.split()[-1], captured.err


@pytest.fixture
def half_done(tmp_path):
    """A run that was not evaluated and did write a line a moment ago."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text('{"steps": 9}')
    (tmp_path / "run/metrics.jsonl").write_text('{"step": 3, "loss": 1.0}\n')
    return tmp_path / "run"


HOLD = """
from save_jax import files, locks

with locks.hold(files.path({!r})):
    print(flush=True)
    input()
"""


def test_a_run_is_running_while_its_process_lives(half_done, capsys):
    assert state(half_done, capsys) == ("stopped", "")  # nobody holds it
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD.format(str(half_done))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout and process.stdout.readline()
        (half_done / runs.EXIT_FILE).write_text('{"code": 1}')  # of the start before this one
        assert state(half_done, capsys) == ("running", "")
    finally:
        process.kill()
        process.communicate()
    assert (half_done / locks.LOCK).exists()
    assert state(half_done, capsys) == ("failed", "")
    (half_done / runs.EXIT_FILE).unlink()
    assert state(half_done, capsys) == ("stopped", "")


@pytest.mark.parametrize("buffered", [True, False])
def test_a_reader_that_has_gone_ends_the_report_quietly(half_done, buffered):
    """As in `python -m launch.report DIR | head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run(
        [sys.executable, "-m", "launch.report", str(half_done)],
        stdout=writer,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "" if buffered else "1"},
    )
    os.close(writer)
    assert (result.returncode, result.stderr) == (128 + signal.SIGPIPE, b"")


def test_another_pipe_that_breaks_is_not_hidden(half_done, monkeypatch):
    def fail(*_):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(runs, "find", fail)
    with pytest.raises(BrokenPipeError):
        report.main([str(half_done)])


def test_what_is_assumed_of_a_run_on_another_machine_is_said(half_done, capsys):
    (half_done / locks.LOCK).write_text("process 7 on elsewhere, since 2020-01-01 00:00:00")
    found, said = state(half_done, capsys)
    assert found == "running"
    assert said.startswith(
        "note: run is assumed to be running: process 7 on elsewhere, since 2020-01-01 00:00:00, "
        "cannot be checked from here, and the run's files last changed "
    )
    long_ago = time.time() - runs.QUIET_AFTER - 60
    for name in ("metrics.jsonl", "config.json", locks.LOCK):
        os.utime(half_done / name, (long_ago, long_ago))
    found, said = state(half_done, capsys)
    assert found == "stopped" and "is assumed to be stopped" in said
    assert "last changed 16m0" in said


def test_runs_in_a_bucket(half_done, capsys):
    store = object_store.register()
    store.put(str(half_done), "gs://bucket/runs/run", recursive=True)
    assert state("gs://bucket/runs", capsys) == ("stopped", "")
    lease = {"id": "x", "holder": "process 7 on pod-0, since 2020", "beat": 3}
    store.pipe(f"gs://bucket/runs/run/{locks.LOCK}", json.dumps(lease).encode())
    assert state("gs://bucket/runs", capsys) == (
        "running",
        "note: run is assumed to be running: process 7 on pod-0, since 2020, cannot be checked "
        "from here, and the store does not say when the run's files changed\n",
    )


def test_broken_files_are_named_and_not_fatal(directory, capsys):
    (directory / "0.01-1/evaluation/5/metrics.json").write_text("{")
    assert report.main([str(directory)]) == 0
    captured = capsys.readouterr()
    assert "0.01-1/evaluation/5/metrics.json cannot be read" in captured.err
    assert captured.out.splitlines()[-1].split()[0] == "0.01-1"


def test_answers_to_different_questions_are_told_apart(directory, capsys):
    for name, variant in (("0.01-1", "9k"), ("0.01-0", "7k")):
        path = directory / name / "evaluation/5/metrics.json"
        protocol = {"data": {"variant": variant}, "split": "test"}
        path.write_text(json.dumps(json.loads(path.read_text()) | {"protocol": protocol}))
    assert report.main([str(directory)]) == 0
    assert capsys.readouterr().err == (
        "warning: these evaluations differ in protocol: data.variant is '9k' in 0.01-1; "
        "'7k' in 0.01-0\n"
    )


def drawn(path) -> str:
    """What the plot says; matplotlib writes each text of an SVG as a comment, too."""
    parser = xml.etree.ElementTree.XMLParser(
        target=xml.etree.ElementTree.TreeBuilder(insert_comments=True)
    )
    root = xml.etree.ElementTree.parse(path, parser).getroot()
    return "|".join(
        element.text.strip()
        for element in root.iter()
        if element.tag is xml.etree.ElementTree.Comment
    )


def test_a_plot_of_rates_and_seeds(directory, tmp_path):
    path = tmp_path / "plot.svg"
    assert report.main([str(directory), f"--plot={path}"]) == 0
    assert {"0.0001", "0.001", "0.01", "optimizer.new", "SumR"} <= set(drawn(path).split("|"))
    png = tmp_path / "plot.png"
    assert report.main([str(directory), f"--plot={png}", "--x=seed"]) == 0
    assert png.read_bytes().startswith(b"\x89PNG")


def test_values_that_span_a_decade_want_a_log_axis():
    assert report.is_logarithmic({1e-4, 1e-3})
    assert not report.is_logarithmic({1.0, 2.0, 4.0})
    assert not report.is_logarithmic({0.0, 1.0, 10.0})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--metric=R7"], "--metric=R7: no run has it. Expected one of SumR, R1"),
        (["--metric=sumr"], "--metric=sumr: no run has it; did you mean SumR?"),
        (["--metric=v2t/r1"], "--metric=v2t/r1: no run has it; did you mean v2t/R1?"),
        (["--plot=x.svg", "--x=optimizer.nw"], "has no key 'optimizer.nw': did you mean 'optim"),
        (["--x=nokey"], "--x=nokey: the runs' config has no key 'nokey'"),
        (["--plot=x.nope"], "--plot=x.nope"),
        (["--csv=/nowhere/x.csv"], "/nowhere/x.csv"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(directory, capsys, arguments, message):
    assert report.main([str(directory), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error
