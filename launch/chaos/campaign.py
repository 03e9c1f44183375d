"""A campaign of runs that faults hit, each compared with runs that nothing happened to."""

import argparse
import collections
import json
import pathlib
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from configs import base
from launch.chaos import verdicts
from launch.chaos.jobs import CHECKPOINT, EVALUATION, STAGES, START, STEP, Job, Shape
from launch.chaos.verdicts import Failure
from save_jax import files
from save_jax.errors import UserError
from save_jax.progress import duration

SHORT, LONG = 10, 40  # steps
TOLERANCE = 1e-5
MOST_FAULTS = 8  # of a case; then it is left in peace
ENDS_WITHIN = 90.0  # seconds after which a cluster would end what a lost process has left
HANGS_AFTER = 900.0  # seconds of a job that nothing happens to
POLL = 0.002
# How long a fault waits, within its stage, at most.
WITHIN = {STEP: 0.3, CHECKPOINT: 0.1, EVALUATION: 0.5}
SHAPES = (Shape(1, 1), Shape(1, 2), Shape(2, 1), Shape(2, 2), Shape(4, 1))


class Case(NamedTuple):
    """One run that faults hit.

    Attributes:
        number: of the campaign.
        kind: see the module's docstring.
        model: variant of the demo's config.
        shapes: of its starts, in turn.
        steps: of the run.
    """

    number: int
    kind: str
    model: str
    shapes: tuple[Shape, ...]
    steps: int


def cases(seed: int, models: Sequence[str]) -> Iterator[Case]:
    """Yields the cases of a seed, without end."""
    for number in range(sys.maxsize):
        moments = random.Random(f"{seed}-{number}")
        kind = ("same", "same", "other", "same", "long", "same", "other", "stopped")[number % 8]
        model = moments.choice(models)
        if kind == "stopped":
            shapes = (Shape(1, 1),)
        elif kind == "same":
            shapes = (SHAPES[number // 2 % len(SHAPES)],)
        else:
            shapes = tuple(moments.sample(SHAPES, len(SHAPES)))
        yield Case(number, kind, model, shapes, LONG if kind == "long" else SHORT)


class Campaign:
    """The cases of one --workdir, and what has hit them so far."""

    def __init__(self, options: argparse.Namespace):
        self._directory = pathlib.Path(options.workdir).absolute()
        self._data = pathlib.Path(options.data).absolute()
        self._wanted, self._least, self._seed = options.faults, options.least, options.seed
        self._models, self._overrides = options.models.split(","), options.overrides
        self._done: list[dict] = []
        self.hit: collections.Counter[str] = collections.Counter()
        self._start_up = 10.0  # seconds, as the last job without a fault in it took
        self._journal = self._directory / "chaos.jsonl"
        if self._wanted < 1 or self._least < 0:
            raise UserError("expected --faults of at least 1, and --least of at least 0")
        if unknown := set(self._models) - set(base.MODELS):
            raise UserError(
                f"--models: {unknown} unknown, expected some of {', '.join(base.MODELS)}"
            )
        if not any(self._data.glob("*/*/*/metadata.json")):
            raise UserError(f"--data={self._data}: expected prepared data (see --help), found none")
        self._directory.mkdir(parents=True, exist_ok=True)
        if self._journal.exists():
            lines = self._journal.read_text().splitlines(keepends=True)
            if lines and not lines[-1].endswith("\n"):  # a kill has cut it off
                files.write(self._journal, "".join(lines[:-1]))
                lines.pop()
            self._done = [json.loads(line) for line in lines]
            if any(case["seed"] != self._seed for case in self._done):
                raise UserError(
                    f"{self._directory} holds a campaign of --seed={self._done[0]['seed']}: "
                    "use that seed, or another --workdir"
                )
        elif any(self._directory.iterdir()):
            raise UserError(
                f"--workdir={self._directory}: expected an empty directory, or a new one"
            )
        self._journal.touch()
        for case in self._done:
            self.hit.update(case["faults"])

    def is_complete(self) -> bool:
        """Says whether enough faults have hit, and enough in each stage."""
        return self.hit.total() >= self._wanted and all(
            self.hit[stage] >= self._least for stage in STAGES
        )

    def run(self) -> None:
        """Runs the cases that are missing.

        Raises:
            Failure: a case ended as it should not; its directory is kept.
        """
        began, before = time.monotonic(), self.hit.total()
        for case in cases(self._seed, self._models):
            if self.is_complete():
                return
            if case.number < len(self._done):
                continue
            directory = self._directory / f"case{case.number}"
            shutil.rmtree(directory, ignore_errors=True)
            start = time.monotonic()
            handle = self._stopped if case.kind == "stopped" else self._struck
            found = handle(case, directory)
            line = {
                "case": case.number,
                "seed": self._seed,
                "kind": case.kind,
                "model": case.model,
                "shapes": [*map(str, case.shapes)],
                **found,
                "seconds": round(time.monotonic() - start, 1),
            }
            with open(self._journal, "a", encoding="utf-8") as journal:
                journal.write(json.dumps(line) + "\n")
            self._done.append(line)
            self.hit.update(found["faults"])
            shutil.rmtree(directory)
            hits = self.hit.total()
            each = (time.monotonic() - began) / max(hits - before, 1)
            left = duration(each * max(self._wanted - hits, 0))
            print(
                f"case {case.number}, {case.kind}, {case.model}: {sum(found['faults'].values())} "
                f"faults in {found['starts']} starts, {found['verdict']}; {hits} of "
                f"{self._wanted} faults ({self.counts()}), {left} left",
                flush=True,
            )

    def counts(self) -> str:
        """Says how many faults have hit each stage."""
        return ", ".join(f"{stage} {self.hit[stage]}" for stage in STAGES)

    def _command(self, case: Case, workdir: pathlib.Path) -> list[str]:
        settings = {
            "data.dir": self._data,
            # Of its test split, an epoch is a few steps, and an evaluation takes a second.
            "data.train_split": "test",
            "steps": case.steps,
            "checkpoint_every": 2,
            "compilation_cache": self._directory / "compiled",
            "optimizer.ast": 0.0,
        }
        return [
            *(sys.executable, "-m", "save_jax.main"),
            *(f"--config=configs/demo.py:{case.model}", f"--workdir={workdir}"),
            *(f"--config.{key}={value}" for key, value in settings.items()),
            *self._overrides,
        ]

    def _undisturbed(self, case: Case, shape: Shape) -> pathlib.Path:
        """Returns the workdir of a run like a case's that nothing happened to."""
        workdir = self._directory / f"undisturbed-{case.model}-{case.steps}-{shape}"
        if not (workdir / "complete").exists():
            shutil.rmtree(workdir, ignore_errors=True)
            job = Job(self._command(case, workdir), workdir, shape, workdir.with_suffix(".logs"))
            self._finish(job)
            (workdir / "complete").touch()
            shutil.rmtree(job.logs)
        return workdir

    def _finish(self, job: Job) -> None:
        """Waits for a job that nothing happens to."""
        try:
            while job.stage() == START and job.is_running():
                time.sleep(0.05)
            self._start_up = time.monotonic() - job.began
            job.wait(HANGS_AFTER)
        finally:
            job.kill()
        if any(job.codes()):
            raise Failure(f"{job.logs}: expected exit codes of 0 of all, found {job.codes()}")

    def _struck(self, case: Case, directory: pathlib.Path) -> dict:
        """Runs a case whose starts faults hit; returns what it had, for the journal."""
        moments = random.Random(f"{self._seed}-{case.number}-moments")
        workdir, command = directory / "run", self._command(case, directory / "run")
        faults: collections.Counter[str] = collections.Counter()
        signals: collections.Counter[str] = collections.Counter()
        for start in range(sys.maxsize):
            shape = case.shapes[start % len(case.shapes)]
            job = Job(command, workdir, shape, directory / f"start{start}")
            try:
                if faults.total() >= MOST_FAULTS:
                    self._finish(job)
                    break
                stage = self._next_stage(moments, faults)
                number = moments.choice((signal.SIGKILL, signal.SIGTERM))
                victims = [moments.randrange(shape.processes)]
                if moments.random() < 0.2:
                    victims = [*range(shape.processes)]
                found = self._strike(job, stage, number, victims, moments)
                job.wait(ENDS_WITHIN if found else HANGS_AFTER)
            finally:
                job.kill()
            if found and not all(code == 0 for code in job.codes()):
                faults[found] += 1
                signals[number.name] += 1
            verdicts.check_ends(job, found, number, victims)
            if not any(job.codes()):
                break
        return {
            "faults": dict(faults),
            "signals": dict(signals),
            "starts": start + 1,
            **self._compare(case, workdir),
        }

    def _next_stage(self, moments: random.Random, faults: collections.Counter[str]) -> str:
        """Chooses where the next fault hits: a stage that lacks most is likelier."""
        lacking = [max(self._least - self.hit[stage] - faults[stage], 0) for stage in STAGES]
        return moments.choices(STAGES, [1 + 2 * lack for lack in lacking])[0]

    def _strike(
        self,
        job: Job,
        stage: str,
        number: signal.Signals,
        victims: Sequence[int],
        moments: random.Random,
    ) -> str:
        """Waits for a moment in a stage, and sends the signal; returns the stage that it hit.

        "" where the job ended before.
        """
        skipped = moments.randrange(3)  # occurrences of the stage
        delay = moments.uniform(0, WITHIN.get(stage, self._start_up))
        while job.is_running():
            if job.stage() != stage:
                time.sleep(POLL)
                continue
            if skipped and stage != START:
                skipped -= 1
                while job.is_running() and job.stage() == stage:
                    time.sleep(POLL)
                continue
            time.sleep(delay)
            alive = all(process.poll() is None for process in job.processes)
            if alive and job.stage() == stage:
                for victim in victims:
                    job.processes[victim].send_signal(number)
                return stage
            if stage == START:
                return ""
        return ""

    def _stopped(self, case: Case, directory: pathlib.Path) -> dict:
        """Stops a run until another has taken its place; returns what it had, for the journal."""
        moments = random.Random(f"{self._seed}-{case.number}-moments")
        workdir, command = directory / "run", self._command(case, directory / "run")
        old = Job(command, workdir, case.shapes[0], directory / "old")
        stage = moments.choice((STEP, CHECKPOINT, EVALUATION))
        new = None
        try:
            if not self._strike(old, stage, signal.SIGSTOP, [0], moments):
                raise Failure(f"{old.logs}: the run ended before its {stage} was seen")
            new = Job(command, workdir, case.shapes[0], directory / "new")
            while new.stage() == START and new.is_running():
                time.sleep(0.05)
            time.sleep(moments.uniform(0, 2))
            old.processes[0].send_signal(signal.SIGCONT)
            old.wait(ENDS_WITHIN)
            new.wait(HANGS_AFTER)
        finally:
            for job in filter(None, (old, new)):
                job.kill()
        if old.codes() != [1] or new.codes() != [0]:
            raise Failure(
                f"{directory}: expected exit code 1 of the process that stood still and 0 of its "
                f"successor, found {old.codes()} and {new.codes()}"
            )
        return {
            "faults": {stage: 1},
            "signals": {"SIGSTOP": 1},
            "starts": 2,
            **self._compare(case, workdir),
        }

    def _compare(self, case: Case, workdir: pathlib.Path) -> dict:
        """Compares a case's last checkpoint with undisturbed ones; returns distance and verdict."""
        found = verdicts.arrays(workdir, case.steps)
        expected = {
            s: verdicts.arrays(self._undisturbed(case, s), case.steps) for s in set(case.shapes)
        }
        apart = {shape: verdicts.distance(found, arrays) for shape, arrays in expected.items()}
        nearest = min(apart.values())
        if case.kind in ("same", "stopped"):
            limit, verdict = 0.0, "bit-equal"
        elif case.kind == "other":
            limit, nearest, verdict = TOLERANCE, max(apart.values()), "equal to {:.1e}"
        else:
            every = list(expected.values())
            limit = max(verdicts.distance(a, b) for i, a in enumerate(every) for b in every[:i])
            verdict = f"{{:.1e}} apart, undisturbed ones up to {limit:.1e}"
        if not nearest <= limit:
            raise Failure(
                f"{workdir}: after its faults, the last checkpoint is {nearest:.3g} from that of a "
                f"run without; expected at most {limit:.3g}"
            )
        return {"distance": nearest, "limit": limit, "verdict": verdict.format(nearest)}
