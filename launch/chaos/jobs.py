"""Jobs of one to several processes on this machine, and what they are at."""

import contextlib
import os
import pathlib
import re
import socket
import subprocess
import time
from collections.abc import Sequence
from typing import NamedTuple

from save_jax import checkpoint

START, STEP, CHECKPOINT, EVALUATION = STAGES = ("start-up", "step", "checkpoint", "evaluation")
STEP_LINE = re.compile(r"^step +(\d+)/", re.MULTILINE)
WRITING = ".orbax-checkpoint-tmp"  # in the name of a checkpoint that is not complete


class Shape(NamedTuple):
    """Processes of a job, and devices of each."""

    processes: int
    devices: int

    def __str__(self) -> str:
        return f"{self.processes}×{self.devices}"


class Job:
    """One start of a run: its processes, what they do at the moment, and how they ended.

    Args:
        command: of each process, but for the flags by which they find each other.
        workdir: the run's.
        shape: processes and devices.
        logs: a new directory for what the processes say.
    """

    def __init__(
        self, command: Sequence[str], workdir: pathlib.Path, shape: Shape, logs: pathlib.Path
    ):
        self.workdir, self.logs = workdir, logs
        logs.mkdir(parents=True)
        flags = os.environ.get("XLA_FLAGS", "")
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={shape.devices}".strip(),
        }
        joining = [f"--coordinator=127.0.0.1:{_free_port()}", f"--num_processes={shape.processes}"]
        self.processes = []
        for number in range(shape.processes):
            several = [*joining, f"--process_id={number}"] if shape.processes > 1 else []
            with open(logs / f"{number}.txt", "wb") as said:
                self.processes.append(
                    subprocess.Popen(
                        [*command, *several],
                        stdout=said,
                        stderr=subprocess.STDOUT,
                        env=environment,
                        start_new_session=True,
                    )
                )
        self.began = time.monotonic()

    def said(self, number: int = 0) -> str:
        """Returns what a process has printed so far."""
        return (self.logs / f"{number}.txt").read_text(errors="replace")

    def stage(self) -> str:
        """Returns what the job is at, as its files and its output show it."""
        if not STEP_LINE.search(self.said()):
            return START
        with contextlib.suppress(FileNotFoundError):
            if any(WRITING in name for name in os.listdir(self.workdir / checkpoint.DIRECTORY)):
                return CHECKPOINT
            for step in os.listdir(self.workdir / "evaluation"):
                if not (self.workdir / "evaluation" / step / "metrics.json").exists():
                    return EVALUATION
        return STEP

    def is_running(self) -> bool:
        """Says whether a process has not ended."""
        return any(process.poll() is None for process in self.processes)

    def wait(self, seconds: float) -> None:
        """Waits for all processes to end, and kills those that have not."""
        until = time.monotonic() + seconds
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(until - time.monotonic(), 0))
        self.kill()

    def kill(self) -> None:
        """Kills what still runs."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()

    def codes(self) -> list[int | None]:
        """Returns the exit codes; negative: a signal."""
        return [process.poll() for process in self.processes]


def _free_port() -> int:
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
