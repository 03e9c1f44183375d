"""Runs a sweep on a SLURM cluster, as one array job made by submitit.

Before its time limit, or when it is preempted, a point writes a checkpoint and is requeued. A point
that is cancelled by `scancel` stays so.
"""

import argparse
import json
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

from launch.report import runs
from launch.sweep import points
from save_jax.errors import UserError

WARNING = 120  # seconds between SLURM's warning and the end: enough for a step and a checkpoint
JOBS_FILE = "jobs.json"  # name of a point -> its job
MOST_TIMEOUTS = 1000  # times that a point may be requeued


def _exit_code(process: subprocess.Popen) -> int:
    """Returns a point's exit code: 75, too, where SIGTERM came before it could handle that."""
    return os.EX_TEMPFAIL if process.returncode == -signal.SIGTERM else process.returncode


class Point:
    """Runs one point as a task of the array; submitit calls `checkpoint` on it before its end."""

    def __init__(self, command: list[str], workdir: str):
        self.command, self._workdir = command, pathlib.Path(workdir)
        self._process: subprocess.Popen | None = None

    def __call__(self) -> int:
        """Trains the point and returns its exit code, 0 or 75.

        Raises:
            RuntimeError: training ended with another exit code.
        """
        first = os.environ.get("SLURM_PROCID", "0") == "0"
        if not first:
            # submitit handles the warning on the first task only.
            signal.signal(signal.SIGUSR2, lambda *_: self._process and self._process.terminate())
        self._workdir.mkdir(parents=True, exist_ok=True)
        if first:
            (self._workdir / runs.EXIT_FILE).unlink(missing_ok=True)
        print(shlex.join(self.command), flush=True)
        # SLURM warns every process of the task. The point inherits the block; we terminate it.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
        self._process = subprocess.Popen(self.command)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR2])
        while self._process.poll() is None:  # wait() would not let the handler wait too
            time.sleep(0.5)
        code = _exit_code(self._process)
        if first:
            runs.write_json(self._workdir / runs.EXIT_FILE, {"code": code})
        if code == os.EX_TEMPFAIL:
            # SLURM requeues a preempted job only while it runs; `scancel` ends this sleep too.
            time.sleep(WARNING)
        if code not in (0, os.EX_TEMPFAIL):
            raise RuntimeError(f"save_jax.main ended with exit code {code}: see its message above")
        return code

    def checkpoint(self) -> Any:
        """Stops the point on SLURM's warning; returns the job that resumes it once requeued."""
        import submitit

        if self._process is not None:
            self._process.terminate()
            while self._process.poll() is None:
                time.sleep(0.5)
            runs.write_json(self._workdir / runs.EXIT_FILE, {"code": _exit_code(self._process)})
        return submitit.helpers.DelayedSubmission(Point(self.command, str(self._workdir)))


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of --backend=slurm."""
    group = parser.add_argument_group("--backend=slurm")
    group.add_argument("--partition", default="", metavar="NAME", help="sbatch's --partition")
    group.add_argument("--account", default="", metavar="NAME", help="sbatch's --account")
    group.add_argument(
        "--nodes", type=int, default=1, metavar="N", help="nodes per point (default: %(default)s)"
    )
    group.add_argument(
        "--gpus_per_node",
        type=int,
        default=0,
        metavar="N",
        help="GPUs per node, with one process each (default: 0, one process on the CPU)",
    )
    group.add_argument(
        "--cpus_per_task",
        type=int,
        default=0,
        metavar="N",
        help="CPU cores per process (default: the cluster's)",
    )
    group.add_argument(
        "--time_hours",
        type=float,
        default=24.0,
        metavar="HOURS",
        help="time limit of a job; a point that needs longer is requeued (default: %(default)s)",
    )
    group.add_argument(
        "--at_once",
        type=int,
        default=256,
        metavar="N",
        help="points that may run at the same time (default: %(default)s)",
    )
    group.add_argument(
        "--slurm",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any other option of sbatch, such as --slurm qos=high; may be repeated",
    )


def parameters(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the resources of a point as parameters of submitit.

    Raises:
        UserError: a value is out of its range, or not KEY=VALUE.
    """
    additional: dict[str, Any] = {"requeue": True}
    for item in options.slurm:
        key, equals, value = item.partition("=")
        if not key.strip("-"):
            raise UserError(f"--slurm {item}: expected KEY=VALUE, such as qos=high")
        additional[key.lstrip("-")] = value if equals else True
    for name, least in (("nodes", 1), ("gpus_per_node", 0), ("cpus_per_task", 0), ("at_once", 1)):
        if getattr(options, name) < least:
            raise UserError(f"--{name}={getattr(options, name)}: expected at least {least}")
    minutes = round(options.time_hours * 60)
    if minutes < 1:
        raise UserError(f"--time_hours={options.time_hours}: expected at least a minute (0.02)")
    given = {
        "partition": options.partition,
        "account": options.account,
        "gpus_per_node": options.gpus_per_node,
        "cpus_per_task": options.cpus_per_task,
    }
    return {
        "job_name": "save_jax",
        "time": minutes,
        "nodes": options.nodes,
        # JAX gives each SLURM task one GPU, the one of its local index.
        "ntasks_per_node": options.gpus_per_node or 1,
        "array_parallelism": options.at_once,
        "stderr_to_stdout": True,
        # When one process dies, SLURM ends the others, so that the run does not hang.
        "srun_args": ["--kill-on-bad-exit=1"],
        "signal_delay_s": WARNING,
        "additional_parameters": additional,
        **{key: value for key, value in given.items() if value},
    }


def in_queue(folder: pathlib.Path) -> dict[str, str]:
    """Returns points of earlier submissions whose jobs are queued or running -> their job ids.

    Raises:
        UserError: squeue fails.
    """
    path = folder / JOBS_FILE
    if not path.exists():
        return {}
    try:
        listed = subprocess.run(
            ["squeue", "--me", "--array", "--noheader", "--format=%i"],
            check=True,
            capture_output=True,
            text=True,
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(
            f"squeue does not say whether points of {folder.parent} are in the queue: {error}. "
            "Run this where squeue works, such as a login node of the cluster"
        ) from error
    alive = set(listed.stdout.split())
    return {name: job for name, job in json.loads(path.read_text()).items() if job in alive}


def run(sweep: points.Sweep, options: argparse.Namespace) -> int:
    """Submits the points that are not complete; returns the exit code of `launch.sweep`.

    Raises:
        UserError: submitit or SLURM is not installed, or SLURM refuses the job.
    """
    try:
        import submitit
        from submitit.core.utils import FailedJobError
        from submitit.slurm import slurm as submitit_slurm
    except ImportError as error:
        raise UserError(
            "--backend=slurm needs submitit. In a clone of the repository: pip install -e "
            "'.[slurm]'"
        ) from error
    resources = parameters(options)
    folder = pathlib.Path(sweep.workdir).absolute() / "slurm"
    sweep = sweep._replace(workdir=str(folder.parent))
    names = points.missing(sweep)
    queued = in_queue(folder)
    print(points.headline(sweep, names, "as one array job"), flush=True)
    for name in names:
        if name in queued:
            print(f"  not again, it is job {queued[name]}: {name}")
    names = [name for name in names if name not in queued]
    if not names:
        return 0
    distributed = ["--distributed"] if options.nodes * resources["ntasks_per_node"] > 1 else []
    jobs = [
        Point(
            [sys.executable, "-m", "save_jax.main", *sweep.arguments(name), *distributed],
            str(folder.parent / name),
        )
        for name in names
    ]
    if options.dry_run:
        print(
            submitit_slurm._make_sbatch_string(
                command=f"{sys.executable} -u -m submitit.core._submit {folder}",
                folder=folder,
                map_count=len(jobs) if len(jobs) > 1 else None,
                **resources,
            )
        )
        for number, job in enumerate(jobs):
            print(f"# array task {number}: {shlex.join(job.command)}")
        return 0
    if not shutil.which("sbatch"):
        raise UserError("--backend=slurm needs sbatch: run this on a login node of the cluster")
    points.record(sweep)
    executor = submitit.SlurmExecutor(folder=folder, max_num_timeout=MOST_TIMEOUTS)
    executor.update_parameters(**resources)
    try:
        submitted = executor.submit_array(jobs)
    except FailedJobError as error:
        raise UserError(f"SLURM refused the array job: {error}") from error
    submissions = {name: job.job_id for job, name in zip(submitted, names, strict=True)}
    runs.write_json(folder / JOBS_FILE, {**queued, **submissions})
    for job, name in zip(submitted, names, strict=True):
        print(f"{job.job_id}: {name}, log in {job.paths.stdout}")
    return 0
