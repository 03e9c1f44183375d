"""Pod slices, with a gcloud that is a script: what is called, in which order, until when."""

import os
import re
import shlex
import subprocess

import pytest

from tests.launch import conftest

SCRIPT = "launch/tpu_pod.sh"
SLICE = ["--name=save", "--zone=us-west4-a", "--accelerator=v5litepod-16"]
RUN = ["--", "--config=configs/msrvtt.py", "--workdir=gs://bucket/run", "--config.data.dir=/a b"]

# Its state is a file; each `ssh` of the run takes its exit code from the next line of `codes`, and
# what the slice is afterwards from the second word.
GCLOUD = r"""
cd {folder}
printf '%q ' "$@" | tr '\n' ' ' >> calls; echo >> calls
case "$3 $4" in
  "tpu-vm create") echo READY > state ;;
  "queued-resources create") echo READY > state; echo ACTIVE > queue ;;
  "tpu-vm delete") rm -f state ;;
  "queued-resources delete") rm -f state queue ;;
  "tpu-vm describe") cat state ;;
  "queued-resources describe") cat queue ;;
  "tpu-vm ssh")
    if [[ "$*" == *save_jax.main* ]]; then
      read -r code after < codes
      sed -i 1d codes
      echo "$after" > state
      exit "$code"
    fi ;;
esac
"""


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", SCRIPT, *arguments],
        check=False,
        capture_output=True,
        text=True,
        cwd=conftest.ROOT,
        timeout=60,
    )


@pytest.fixture
def gcloud(tmp_path, fake_program):
    """Starts the script with a list of (exit code of the run, state afterwards)."""
    fake_program("gcloud", GCLOUD.format(folder=tmp_path))

    def start(outcomes, *arguments):
        (tmp_path / "codes").write_text("".join(f"{code} {state}\n" for code, state in outcomes))
        done = run(*SLICE, "--poll=0", *arguments, "all", *RUN)
        calls = [
            words[3] + (" run" if any("save_jax.main" in word for word in words) else "")
            for words in [shlex.split(x) for x in (tmp_path / "calls").read_text().splitlines()]
            if words[3] != "describe"
        ]
        return done, calls, (tmp_path / "state").exists()

    return start


def test_the_script_is_well_formed():
    assert run("--help").stdout.startswith("Creates a TPU pod slice")
    assert subprocess.run(["bash", "-n", SCRIPT], cwd=conftest.ROOT).returncode == 0


def test_a_dry_run_prints_every_command_and_calls_none(tmp_path, fake_program):
    fake_program("gcloud", f"touch {tmp_path}/called")
    done = run(*SLICE, "--spot", "--queued", "--project=p", "--dry_run", "all", *RUN)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "called").exists()
    commands = [shlex.split(line.replace("$'", "'")) for line in done.stdout.splitlines()]
    assert [command[0] for command in commands] == ["gcloud", "gcloud", "tar"] + ["gcloud"] * 5
    where = {"--zone=us-west4-a", "--project=p"}
    assert all(where <= set(command) for command in commands if command[0] == "gcloud")
    create, delete = commands[0], commands[-1]
    assert create[3:5] == ["queued-resources", "create"] and "--spot" in create
    assert "--runtime-version=v2-alpha-tpuv5-lite" in create
    assert delete[3:5] == ["queued-resources", "delete"] and "--force" in delete
    runs = [line for line in done.stdout.splitlines() if "save_jax.main" in line]
    assert len(runs) == 1 and "--worker=all" in runs[0]
    assert r"--distributed --config=configs/msrvtt.py --workdir=gs://bucket/run" in runs[0]


def test_a_run_that_ends_well(gcloud):
    done, calls, left = gcloud([(0, "READY")])
    assert done.returncode == 0, done.stderr
    assert calls == ["create", "scp", "ssh", "ssh run", "delete"] and not left


def test_a_preempted_slice_is_made_again_and_runs_the_same(gcloud):
    done, calls, left = gcloud([(255, "PREEMPTED"), (75, "READY"), (0, "READY")], "--spot")
    assert done.returncode == 0, done.stderr
    made = ["create", "scp", "ssh", "ssh run"]
    # The second time the slice is sound, and only runs again.
    assert calls == [*made, "delete", *made, "ssh run", "delete"] and not left


def test_a_queued_slice_that_is_preempted(gcloud):
    done, calls, left = gcloud([(255, "PREEMPTED"), (0, "READY")], "--queued")
    assert done.returncode == 0, done.stderr
    assert calls.count("create") == calls.count("delete") == 2 and not left


@pytest.mark.parametrize(
    ("outcomes", "code", "runs"),
    [
        ([(2, "READY")], 2, 1),  # a mistake of the user
        ([(1, "READY"), (1, "READY")], 1, 2),  # broke down, and again
        ([(255, "PREEMPTED")] * 3, 1, 3),  # --max_restarts=2
    ],
)
def test_what_does_not_end_well_is_deleted_too(gcloud, outcomes, code, runs):
    done, calls, left = gcloud(outcomes, "--max_restarts=2")
    assert done.returncode == code
    assert calls.count("ssh run") == runs and calls[-1] == "delete" and not left


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*SLICE], "expected an action"),
        (["--zone=z", "--accelerator=v4-8", "create"], "--name is required"),
        ([*SLICE, "run"], "expected the flags of save_jax.main after --"),
        ([*SLICE, "run", "--", "--workdir=runs/a"], "would be lost with the slice"),
        ([*SLICE, "--max_restarts=x", "create"], "expected a whole number"),
        ([*SLICE, "--nope", "create"], "unknown argument --nope"),
        ([*SLICE, "create", "delete"], "two actions"),
        ([*SLICE[:2], "--accelerator=v9-8", "create"], "no known runtime"),
        ([*SLICE, "--data_disk=d", "create"], "--data_disk needs --project"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(arguments, message):
    done = run(*arguments)
    assert done.returncode == 2 and message in done.stderr
    assert re.match("error: ", done.stderr) and done.stderr.count("\n") == 1


def test_what_is_copied_to_the_hosts_exists():
    (sources,) = re.findall(r"^sources=\((.*)\)$", (conftest.ROOT / SCRIPT).read_text(), re.M)
    assert all(os.path.exists(conftest.ROOT / source) for source in sources.split())
