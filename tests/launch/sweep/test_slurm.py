"""Sweeps and runs on SLURM, as far as that goes without one; test_slurm.sh does the rest."""

import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import threading
import time

import pytest
import submitit  # noqa: F401, here because it closes log handlers, also of what pytest captures

from launch.report import runs
from launch.sweep import __main__ as sweep
from launch.sweep import slurm
from tests.launch import conftest

EXAMPLE = "--config=configs/demo_sweep.py"
BATCH_FILE = "launch/slurm.sbatch"


def test_a_dry_run_shows_the_batch_script_and_the_commands(tmp_path, capsys):
    arguments = ["--gpus_per_node=2", "--nodes=2", "--time_hours=1.5", "--partition=a100"]
    arguments += ["--slurm", "qos=high", "--slurm", "exclusive", "--config.steps=5", "--dry_run"]
    workdir = tmp_path / "sweep"
    assert sweep.main([EXAMPLE, f"--workdir={workdir}", "--backend=slurm", *arguments]) == 0
    out = capsys.readouterr().out
    script, *tasks = re.split(r"# array task \d: ", out)
    options = set(re.findall(r"^#SBATCH --(.+)$", script, re.MULTILINE))
    assert options >= {
        "array=0-5%6",
        "gpus-per-node=2",
        "nodes=2",
        "ntasks-per-node=2",  # a process a GPU
        "time=90",
        "partition=a100",
        "qos=high",
        "exclusive",
        "requeue",
        "signal=USR2@120",
    }
    assert len(tasks) == 6 and tasks[1].strip() == (
        f"{sys.executable} -m save_jax.main {EXAMPLE} "
        f"--workdir={workdir}/optimizer.new-0.0003__seed-1 --config.steps=5 "
        "--config.optimizer.new=0.0003 --config.seed=1 --distributed"
    )
    assert not workdir.exists()


def test_submission(tmp_path, fake_program, capsys):
    fake_program("sbatch", f'cp "$1" {tmp_path}/submitted; echo Submitted batch job 7')
    fake_program("srun", "exit 1")
    workdir = tmp_path / "sweep"
    assert sweep.main([EXAMPLE, f"--workdir={workdir}", "--backend=slurm"]) == 0
    assert "#SBATCH --array=0-5%6" in (tmp_path / "submitted").read_text()
    assert "7_5: optimizer.new-0.003__seed-1, log in" in capsys.readouterr().out
    assert len(json.loads((workdir / "sweep.json").read_text())["points"]) == 6

    fake_program("squeue", "printf '7_0\\n7_4\\n7_5\\n9\\n'")  # 7_1 to 7_3 have ended
    assert sweep.main([EXAMPLE, f"--workdir={workdir}", "--backend=slurm"]) == 0
    assert "#SBATCH --array=0-2%3" in (tmp_path / "submitted").read_text()
    out = capsys.readouterr().out
    assert "not again, it is job 7_4: optimizer.new-0.003__seed-0" in out
    assert out.count("not again") == 3 and "7_2: optimizer.new-0.001__seed-1, log in" in out
    fake_program("squeue", "exit 1")
    assert sweep.main([EXAMPLE, f"--workdir={workdir}", "--backend=slurm"]) == 2
    assert "squeue does not say" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--slurm", "=1"], "--slurm =1: expected KEY=VALUE"),
        (["--nodes=0"], "--nodes=0: expected at least 1"),
        (["--time_hours=0"], "--time_hours=0.0: expected at least a minute"),
        ([], "needs sbatch"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(
    tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.setenv("PATH", str(tmp_path))
    workdir = f"--workdir={tmp_path / 'sweep'}"
    assert sweep.main([EXAMPLE, workdir, "--backend=slurm", *arguments]) == 2
    assert message in capsys.readouterr().err


def stand_in(workdir: pathlib.Path, *arguments: str) -> slurm.Point:
    program = [sys.executable, str(conftest.ROOT / "tests/support/stand_in.py")]
    return slurm.Point([*program, f"--workdir={workdir}", *arguments], str(workdir))


def test_a_task_runs_its_point_and_says_how_it_ended(tmp_path):
    assert stand_in(tmp_path / "a")() == 0
    assert runs.read(tmp_path / "a").state == "complete"
    with pytest.raises(RuntimeError, match="exit code 1"):
        stand_in(tmp_path / "b", "--config.seed=13")()
    assert runs.read(tmp_path / "b").state == "failed"


def test_a_point_that_sigterm_ends_before_it_listens_is_resumed(tmp_path, monkeypatch):
    monkeypatch.setattr(slurm, "WARNING", 0)
    assert slurm.Point(["bash", "-c", "kill -TERM $$"], str(tmp_path))() == os.EX_TEMPFAIL
    assert json.loads((tmp_path / runs.EXIT_FILE).read_text()) == {"code": os.EX_TEMPFAIL}


def test_a_task_that_is_warned_stops_with_a_checkpoint_and_goes_on_from_it(tmp_path, monkeypatch):
    monkeypatch.setenv("STAND_IN_PAUSE", "0.1")
    point = stand_in(tmp_path, "--config.steps=50")
    resumed = []

    def warned(*_):
        resumed.append(point.checkpoint())
        raise SystemExit  # as submitit does

    def warn():
        while not (tmp_path / "checkpoints/2").exists():
            time.sleep(0.02)
        assert point._process is not None
        os.kill(point._process.pid, signal.SIGUSR2)  # SLURM warns the point too: no effect
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGUSR2)

    before = signal.signal(signal.SIGUSR2, warned)
    thread = threading.Thread(target=warn)
    thread.start()
    try:
        with pytest.raises(SystemExit):
            point()
    finally:
        signal.signal(signal.SIGUSR2, before)
        thread.join()
    stopped = runs.read(tmp_path)
    assert stopped.state == "stopped" and 3 <= stopped.step < 50
    monkeypatch.setenv("STAND_IN_PAUSE", "0")
    assert resumed[0].result() == 0
    assert runs.read(tmp_path).state == "complete"
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").open()]
    assert steps == list(range(1, 51))


def bash(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", *arguments],
        check=False,
        capture_output=True,
        text=True,
        cwd=conftest.ROOT,
        env={**os.environ, **environment},
    )


def test_the_batch_file_dry_run():
    assert bash("-n", BATCH_FILE).returncode == 0
    done = bash(BATCH_FILE, "--dry_run", "--config=configs/msrvtt.py", "--workdir=/a b")
    assert done.returncode == 0, done.stderr
    options = re.findall(r"^#SBATCH --(\S+)$", done.stdout, re.MULTILINE)
    assert {"gpus-per-node=8", "ntasks-per-node=8", "requeue", "signal=TERM@120"} <= set(options)
    assert done.stdout.splitlines()[-1].strip() == (
        "srun --kill-on-bad-exit=1 --unbuffered bash -c "
        r"trap\ :\ TERM\;\ \"\$@\"\;\ code=\$\?\;\ exit\ \$\(\(code\ ==\ 1\ \|\|\ code\ ==\ 2\ "
        r"\?\ 240\ +\ code\ :\ code\)\) task python -m save_jax.main "
        r"--config=configs/msrvtt.py --workdir=/a\ b --distributed"
    )
    one = bash(BATCH_FILE, "--dry_run", "--config=x", SLURM_NTASKS="1").stdout.splitlines()[-1]
    assert "--distributed" not in one
    assert bash(BATCH_FILE).returncode == 2
    said = bash(BATCH_FILE, "--help")
    assert said.returncode == 0 and "Exit codes are those of save_jax.main" in said.stdout


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"),
    [
        (0, 0, ""),
        (1, 0, ""),
        (2, 0, ""),
        (75, 500, "requeue 42\n"),
        (143, 0, "requeue 42\n"),
        (134, 9, "requeue 42\n"),
        (134, 10, ""),
        (137, 0, ""),
    ],
)
def test_the_batch_file_requeues_what_was_interrupted(
    fake_program, tmp_path, code, restarts, requeued
):
    fake_program("srun", f"exit {code}")
    fake_program("scontrol", f'echo "$@" >> {tmp_path}/calls')
    (tmp_path / "calls").touch()
    job = {"SLURM_JOB_ID": "42", "SLURM_NTASKS": "1", "SLURM_RESTART_COUNT": str(restarts)}
    assert bash(BATCH_FILE, "--config=x", **job).returncode == code
    assert (tmp_path / "calls").read_text() == requeued


@pytest.mark.parametrize(
    ("codes", "code", "requeued"),
    [
        ("0 0", 0, ""),
        ("75 75", 75, "requeue 42\n"),
        ("75 1", 1, ""),  # the second failed, and the first lost it
        ("2 75", 2, ""),
        ("75 137", 137, ""),  # killed, for its memory perhaps
    ],
)
def test_a_process_that_fails_by_itself_outranks_those_that_lose_it(
    fake_program, tmp_path, codes, code, requeued
):
    """As srun does, its stand-in runs the command for each task, and ends with the highest code."""
    fake_program(
        "srun",
        "shift 2; highest=0\n"
        'for number in $CODES; do\n  code=0; CODE=$number "$@" || code=$?\n'
        "  ((code <= highest)) || highest=$code\ndone\nexit $highest",
    )
    fake_program("scontrol", f'echo "$@" >> {tmp_path}/calls')
    main = tmp_path / "main"
    main.write_text("#!/bin/bash\nexit $CODE\n")
    main.chmod(0o755)
    (tmp_path / "calls").touch()
    job = {"SLURM_JOB_ID": "42", "SLURM_NTASKS": "2", "PYTHON": str(main), "CODES": codes}
    assert bash(BATCH_FILE, "--config=x", **job).returncode == code
    assert (tmp_path / "calls").read_text() == requeued


def test_a_task_outlives_the_signal_that_warns_it(fake_program, tmp_path):
    """SLURM sends it to every process of the task: the shell must wait for the run's checkpoint."""
    fake_program("srun", 'shift 2; exec setsid --wait "$@"')
    fake_program("scontrol", f'echo "$@" >> {tmp_path}/calls')
    main = tmp_path / "main"
    main.write_text("#!/bin/bash\ntrap 'sleep 0.5; exit 75' TERM\nkill -TERM 0\nsleep 1\nexit 1\n")
    main.chmod(0o755)
    job = {"SLURM_JOB_ID": "42", "SLURM_NTASKS": "2", "PYTHON": str(main)}
    assert bash(BATCH_FILE, "--config=x", **job).returncode == 75
    assert (tmp_path / "calls").read_text() == "requeue 42\n"


def test_the_commands_of_the_real_test_are_understood(capsys, monkeypatch):
    """tests/launch/test_slurm.sh, run by hand: each command that it would run, up to the queue."""
    script = "tests/launch/test_slurm.sh"
    assert bash("-n", script).returncode == 0
    done = bash(script, "--dry_run", PYTHON=sys.executable)
    assert done.returncode == 0, done.stderr
    monkeypatch.chdir(conftest.ROOT)
    sweeps = batches = 0
    for words in [shlex.split(line) for line in done.stdout.splitlines()]:
        if "launch.sweep" in words:
            config = next(word for word in words if word.startswith("--config="))
            arguments = words[words.index("launch.sweep") + 1 :]
            # The script writes a config of its own, and removes it at the end.
            arguments[arguments.index(config)] = "--config=configs/demo_sweep.py"
            assert sweep.main([*arguments, "--dry_run"]) == 0
            assert "-m save_jax.main" in capsys.readouterr().out
            sweeps += 1
        elif words[:1] == ["sbatch"]:
            at = words.index(BATCH_FILE)
            options = {word.partition("=")[0] for word in words[1:at]}
            assert options <= {"--gpus-per-node", "--ntasks-per-node", "--output"}
            assert bash(*words[at : at + 1], "--dry_run", *words[at + 1 :]).returncode == 0
            batches += 1
    assert (sweeps, batches) == (2, 1)


def test_the_real_test_looks_for_what_a_resumed_run_prints():
    script = (conftest.ROOT / "tests/launch/test_slurm.sh").read_text()
    (words,) = re.findall(r'grep -q "(\w+ \w+ from checkpoint|\w+ from checkpoint)"', script)
    assert f'say(f"{words} {{' in (conftest.ROOT / "save_jax/resume.py").read_text()
