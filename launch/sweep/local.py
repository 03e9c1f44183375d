"""Runs a sweep on this machine: several points at a time, each on its own devices."""

import argparse
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time
from types import FrameType
from typing import NamedTuple

from launch.report import runs
from launch.sweep import points
from save_jax.errors import UserError
from save_jax.messages import counted
from save_jax.progress import duration

POLL = 0.2  # seconds
REPORT_EVERY = 30.0  # seconds between progress lines while no point ends
# A process that sees only some chips of a TPU host must also be told how they are arranged.
CHIP_BOUNDS = {1: "1,1,1", 2: "1,2,1", 4: "2,2,1", 8: "2,4,1"}


class Slot(NamedTuple):
    """The devices of one job, as indices; none for all that JAX finds."""

    devices: tuple[str, ...]

    def environment(self) -> dict[str, str]:
        """Returns the environment variables that show a process its own devices only."""
        if not self.devices:
            return {}
        listed = ",".join(self.devices)
        environment = {"CUDA_VISIBLE_DEVICES": listed, "TPU_VISIBLE_DEVICES": listed}
        if bounds := CHIP_BOUNDS.get(len(self.devices)):
            environment |= {
                "TPU_CHIPS_PER_PROCESS_BOUNDS": bounds,
                "TPU_PROCESS_BOUNDS": "1,1,1",
            }
        return environment


class Child(NamedTuple):
    """A running point."""

    process: subprocess.Popen
    slot: Slot
    started: float


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of --backend=local."""
    group = parser.add_argument_group("--backend=local")
    group.add_argument(
        "--jobs",
        type=int,
        default=0,
        metavar="N",
        help="points that run at the same time (default: one per device of --devices, else 1)",
    )
    group.add_argument(
        "--devices",
        default="",
        metavar="0,1,2,3",
        help="indices of GPUs or TPU chips, divided evenly among the jobs (default: every job sees "
        "all devices)",
    )


def slots(jobs: int, devices: str) -> list[Slot]:
    """Divides devices among jobs.

    Raises:
        UserError: they cannot be divided evenly.
    """
    listed = [device.strip() for device in devices.split(",") if device.strip()]
    if len(set(listed)) < len(listed) or not all(device.isdecimal() for device in listed):
        raise UserError(f"--devices={devices}: expected different indices, such as 0,1,2,3")
    jobs = jobs or len(listed) or 1
    if jobs < 1 or (listed and len(listed) % jobs):
        raise UserError(
            f"--jobs={jobs}: expected at least 1"
            if jobs < 1
            else f"--jobs={jobs} does not divide the {len(listed)} devices of --devices evenly"
        )
    each = len(listed) // jobs
    return [Slot(tuple(listed[i * each : (i + 1) * each])) for i in range(jobs)]


def command(sweep: points.Sweep, name: str) -> list[str]:
    """Returns the command that trains a point."""
    return [sys.executable, "-m", "save_jax.main", *sweep.arguments(name)]


def run(sweep: points.Sweep, options: argparse.Namespace) -> int:
    """Runs the points that are not complete; returns the exit code of `launch.sweep`.

    Raises:
        UserError: --devices or --jobs is wrong, or the workdir holds another sweep.
    """
    free = slots(options.jobs, options.devices)
    waiting = points.missing(sweep)
    if options.dry_run:
        print(points.headline(sweep, waiting, f"{len(free)} at a time"))
        for number, name in enumerate(waiting):
            # The devices of the first round; later points take the devices that become free.
            shown = [f"{k}={v}" for k, v in free[number % len(free)].environment().items()]
            print(shlex.join([*shown, *command(sweep, name)]))
        return 0
    points.record(sweep)
    print(points.headline(sweep, waiting, f"{len(free)} at a time"), flush=True)
    return Runner(sweep, free, waiting).run()


class Runner:
    """Runs points of a sweep on this machine and reports their progress."""

    def __init__(self, sweep: points.Sweep, free: list[Slot], waiting: list[str]):
        self._sweep, self._free, self._waiting = sweep, free, list(waiting)
        self._running: dict[str, Child] = {}
        self._complete = len(sweep.points) - len(waiting)
        self._failed: dict[str, int] = {}
        self._unfinished: list[str] = []  # interrupted, or run by another process
        self._signals: list[str] = []
        self._passed_on = 0
        self._started = self._shown = time.monotonic()
        self._directory = pathlib.Path(sweep.workdir)
        # Steps that were done before this session must not count as its speed.
        self._before = {name: self._fraction(name) for name in waiting}

    def run(self) -> int:
        """Runs all points; on a signal, passes it on and waits for the points to end."""
        previous = {
            number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            while self._running or (self._waiting and not self._signals):
                while self._free and self._waiting and not self._signals:
                    self._start(self._waiting.pop(0))
                self._pass_on()
                self._collect()
                if time.monotonic() - self._shown >= REPORT_EVERY:
                    self._say("")
                time.sleep(POLL)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        return self._summarise()

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        self._signals.append(signal.Signals(number).name)

    def _pass_on(self) -> None:
        """Passes received signals on to the points; not in the handler, which may not print."""
        while self._passed_on < min(len(self._signals), 2):
            self._passed_on += 1
            for child in self._running.values():
                if self._passed_on == 1:
                    child.process.terminate()
                else:
                    child.process.kill()
            what = (
                "asked to write a checkpoint and stop; a second signal kills them"
                if self._passed_on == 1
                else "killed"
            )
            running = counted(len(self._running), "running point")
            self._say(f"{self._signals[self._passed_on - 1]}: {running} {what}")

    def _start(self, name: str) -> None:
        workdir = self._directory / name
        workdir.mkdir(parents=True, exist_ok=True)
        lock = runs.lock(workdir)
        if lock is None:
            self._unfinished.append(name)
            self._say(f"{name}: left alone, because another process is running it")
            return
        (workdir / runs.EXIT_FILE).unlink(missing_ok=True)
        slot = self._free.pop(0)
        with open(workdir / "log.txt", "ab") as log:
            # In a new session, so that Ctrl-C in a terminal reaches it only once, through us.
            process = subprocess.Popen(
                command(self._sweep, name),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **slot.environment()},
                pass_fds=[lock],
                start_new_session=True,
            )
        os.close(lock)  # from here on the child holds it
        self._running[name] = Child(process, slot, time.monotonic())
        on = f" on {','.join(slot.devices)}" if slot.devices else ""
        self._say(f"{name}: started{on}, log in {workdir / 'log.txt'}")

    def _collect(self) -> None:
        for name, child in list(self._running.items()):
            code = child.process.poll()
            if code is None:
                continue
            del self._running[name]
            self._free.append(child.slot)
            if code == -signal.SIGTERM or (self._signals and code == -signal.SIGKILL):
                code = os.EX_TEMPFAIL  # before it could listen, or while it would not
            runs.write_json(self._directory / name / runs.EXIT_FILE, {"code": code})
            took = duration(time.monotonic() - child.started)
            if code == 0:
                self._complete += 1
                evaluation = runs.read(self._directory / name).evaluation
                result = f", SumR {evaluation['t2v']['SumR']:.1f}" if evaluation else ""
                self._say(f"{name}: complete in {took}{result}")
            elif code == os.EX_TEMPFAIL:
                self._unfinished.append(name)
                self._say(f"{name}: stopped after {took}; resumes when the sweep is run again")
            else:
                self._failed[name] = code
                self._say(f"{name}: FAILED with exit code {code} after {took}\n{self._why(name)}")

    def _why(self, name: str) -> str:
        """Returns the last lines of a point's log."""
        path = self._directory / name / "log.txt"
        lines = path.read_text(errors="replace").strip().splitlines()[-5:]
        return "".join(f"    {line}\n" for line in lines) + f"    ({path})"

    def _fraction(self, name: str) -> float:
        return runs.read(self._directory / name).fraction

    def _say(self, text: str) -> None:
        self._shown = time.monotonic()
        counts = [f"{self._complete}/{len(self._sweep.points)} complete"]
        if self._running:
            counts.append(f"{len(self._running)} running")
        if self._failed:
            counts.append(f"{len(self._failed)} failed")
        if left := self._time_left():
            counts.append(f"{left} left")
        print(f"[{', '.join(counts)}] {text}".rstrip(), flush=True)

    def _time_left(self) -> str:
        """Estimates the time left from the steps per second of all points in this session."""
        ended = {*self._failed, *self._unfinished}
        now = {name: self._fraction(name) for name in self._before if name not in ended}
        done = sum(now[name] - self._before[name] for name in now)
        left = sum(1 - fraction for fraction in now.values())
        if done <= 0 or left <= 0:
            return ""
        return duration((time.monotonic() - self._started) / done * left)

    def _summarise(self) -> int:
        left = len(self._waiting) + len(self._unfinished)
        took = duration(time.monotonic() - self._started)
        total = counted(len(self._sweep.points), "point")
        print(
            f"{self._complete} of {total} complete after {took}"
            + (f", {left} not finished: run the same command again" if left else "")
        )
        for name, code in self._failed.items():
            print(f"  failed with exit code {code}: {name}, see {self._directory / name}/log.txt")
        print(f"results: python -m launch.report {self._sweep.workdir}", flush=True)
        if self._failed:
            return 1
        return os.EX_TEMPFAIL if left else 0
