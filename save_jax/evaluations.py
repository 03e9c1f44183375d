"""Which checkpoints of a run are evaluated, and on what: while it trains, and what is left after.

The trainer and its follower share this. Of the run's own evaluation split each checkpoint that is
due is evaluated; of the test split, once training is over, the last and the one chosen.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import numpy as np

from save_jax import checkpoint, distributed, evaluate, files, results
from save_jax.evaluate import EvaluationSet, Evaluator
from save_jax.meter import Plan
from save_jax.parameters import Parameters
from save_jax.progress import Writer, say
from save_jax.stopping import Stopped, StopRequest

Load = Callable[[int], Mapping[str, Parameters]]  # step -> `averaging.models`


class Job(NamedTuple):
    """A checkpoint to evaluate.

    Attributes:
        step: updates that made it.
        subset: "", the run's own evaluation split, or `results.TEST`.
    """

    step: int
    subset: str = ""


class Evaluations:
    """The evaluations of one run.

    Args:
        workdir: the run's directory.
        plan: says which steps are due, and which is the last.
        evaluator: compiled functions.
        data: the run's own evaluation split.
        test: the split that reports what `data` chose, if any.
        writer: takes scalars.
        stop: heeded between batches.
    """

    def __init__(
        self,
        workdir: files.Path,
        plan: Plan,
        evaluator: Evaluator,
        data: EvaluationSet,
        test: EvaluationSet | None,
        writer: Writer,
        stop: StopRequest,
    ):
        self.workdir, self.plan, self.data = workdir, plan, data
        self._evaluator, self._test, self._writer, self._stop = evaluator, test, writer, stop

    def is_complete(self, job: Job) -> bool:
        """Says whether a checkpoint's results are there; ask on process 0."""
        data = self._test if job.subset and self._test else self.data
        return results.own(self.workdir, job.step, data.split, job.subset) is not None

    def waiting(self) -> list[int]:
        """Returns the checkpoints that are still to be evaluated, in order; ask on process 0."""
        steps = checkpoint.complete_steps(self.workdir)
        return [s for s in steps if self.plan.evaluates(s) and not self.is_complete(Job(s))]

    def next(self) -> Job | None:
        """Returns what to evaluate now, the same on all processes; None: nothing yet, or no more.

        The latest checkpoint comes first: its result is the one that is waited for, and it is the
        last to be dropped while others are added.
        """
        found = self._next() if jax.process_index() == 0 else None
        numbers = np.asarray([found.step, bool(found.subset)] if found else [-1, 0], np.int32)
        step, of_test = map(int, distributed.of_first(numbers))
        return Job(step, results.TEST if of_test else "") if step >= 0 else None

    def _next(self) -> Job | None:
        if waiting := self.waiting():
            return Job(waiting[-1])
        if self._test is None or not self.is_complete(Job(self.plan.total_steps)):
            return None
        steps = checkpoint.complete_steps(self.workdir)
        found = results.best(self.workdir, steps, self.data.split)
        chosen = [found[1]] if found else []
        jobs = [Job(s, results.TEST) for s in (*chosen, self.plan.total_steps) if s in steps]
        return next((job for job in jobs if not self.is_complete(job)), None)

    def is_over(self) -> bool:
        """Says whether the run's last step is evaluated; on all processes the same."""
        over = jax.process_index() == 0 and self.is_complete(Job(self.plan.total_steps))
        return bool(distributed.of_first(np.asarray(over)))

    def evaluate(self, models: Mapping[str, Parameters], job: Job, *, saved: bool = True) -> None:
        """Evaluates the parameters of the job's checkpoint, and their average if it has one.

        While another job evaluates it, this waits, and then does not evaluate it again.

        Args:
            models: of `averaging.models`.
            job: which checkpoint, on what.
            saved: as in `evaluate.run_evaluation`.

        Raises:
            Stopped: a signal came before it was done; on all processes.
        """
        data, when = self.data, self.plan.when(job.step)
        if job.subset and self._test:
            data, when = self._test, f"{when}, chosen on {self.data.split}"
            if job.step == self.plan.total_steps:
                when = self.plan.when(job.step)
        where, heed = results.results_at(self.workdir, job.step), self._stop.heed_alone
        with distributed.hold(where, wait=True, heed=heed):
            done = jax.process_index() == 0 and self.is_complete(job)
            if distributed.of_first(np.asarray(done)):
                return
            evaluate.run_evaluations(
                models,
                job.step,
                when,
                data=data,
                evaluator=self._evaluator,
                writer=self._writer,
                workdir=self.workdir,
                subset=job.subset,
                heed=self._stop.heed,
                saved=saved,
            )

    def catch_up(self, load: Load) -> None:
        """Evaluates all that can be evaluated now.

        Args:
            load: reads what a step's checkpoint has to evaluate; one at a time is kept.

        Raises:
            Stopped: as `evaluate`.
        """
        while (job := self.next()) is not None:
            self._stop.heed()
            self.evaluate(load(job.step), job)

    def finish(self, load: Load) -> bool:
        """Evaluates what training has left, and prints the summary; False when it was stopped."""
        try:
            self.catch_up(load)
        except Stopped:
            say("stopped while evaluating; the same command goes on there")
            return False
        if jax.process_index() == 0:
            steps = checkpoint.complete_steps(self.workdir)
            results.write_best(self.workdir, steps, self.data.split)
            test = self._test.split if self._test else ""
            results.summarise(self.workdir, self.data.split, test)
        return True
