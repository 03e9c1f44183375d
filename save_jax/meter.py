"""Measures a training run as it goes: throughput, time left, and the line that says so."""

import contextlib
import time
from collections.abc import Generator, Mapping
from typing import Any, NamedTuple

from save_jax import optimizer
from save_jax.optimizer import OptimizerConfig
from save_jax.progress import Writer, duration, say

LOG_EACH_UP_TO = 100  # steps; shorter runs log every step


class Plan(NamedTuple):
    """How long a run is, and what happens how often.

    Attributes:
        total_steps: updates in all.
        steps_per_epoch: full batches in a pass over the training split.
        batch_size: clips of the global batch.
        eval_every: epochs between evaluations; the last step is always evaluated.
        checkpoint_every: steps between checkpoints that are not evaluated; 0 = none.
        log_every: steps between progress lines; runs of up to LOG_EACH_UP_TO steps log each.
    """

    total_steps: int
    steps_per_epoch: int
    batch_size: int
    eval_every: int
    checkpoint_every: int
    log_every: int

    @classmethod
    def of(cls, config: Mapping[str, Any], steps_per_epoch: int) -> "Plan":
        """Returns the plan of a config: of `steps` updates or, where these are 0, of `epochs`."""
        return cls(
            config["steps"] or config["epochs"] * steps_per_epoch,
            steps_per_epoch,
            *(config[k] for k in ("batch_size", "eval_every", "checkpoint_every", "log_every")),
        )

    def epoch(self, step: int) -> float:
        """Returns the epochs that `step` updates make."""
        return step / self.steps_per_epoch

    def evaluates(self, step: int) -> bool:
        """Says whether the split is evaluated after this step."""
        every = self.steps_per_epoch * self.eval_every
        return step == self.total_steps or step % every == 0

    def saves(self, step: int) -> bool:
        """Says whether a checkpoint is due after this step that no evaluation asks for."""
        return bool(self.checkpoint_every) and step % self.checkpoint_every == 0

    def logs(self, step: int) -> bool:
        """Says whether this step has a progress line and a line in metrics.jsonl."""
        every = 1 if self.total_steps <= LOG_EACH_UP_TO else self.log_every
        return step % every == 0 or step == self.total_steps


class Meter:
    """Writes a run's scalars and prints its progress, with clips/s and the time left.

    Args:
        plan: how long the run is.
        rates: learning rates, which are logged.
        writer: where the scalars go.
        first: updates done before this process began.
    """

    def __init__(self, plan: Plan, rates: OptimizerConfig, writer: Writer, first: int):
        self._plan, self._rates, self._writer = plan, rates, writer
        self._step, self._clock = first, time.monotonic()

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Logs a step's scalars if it is one of those that are logged."""
        plan = self._plan
        if not plan.logs(step):
            return
        now = time.monotonic()
        seconds = (now - self._clock) / max(step - self._step, 1)
        self._clock, self._step = now, step
        rates = optimizer.learning_rates(self._rates, step - 1)
        self._writer.write_scalars(
            step,
            {
                **scalars,
                "epoch": plan.epoch(step),
                "clips_per_second": plan.batch_size / seconds,
                **{f"learning_rate/{name}": rate for name, rate in rates.items()},
            },
        )
        total = plan.total_steps
        say(
            f"step {step:>{len(str(total))}}/{total}  epoch {plan.epoch(step):.1f}  "
            f"loss {scalars['loss']:.4f} (contrastive {scalars['contrastive']:.4f}, "
            f"soft-ALBEF {scalars['soft_albef']:.4f})  lr "
            + " ".join(f"{name} {rate:.1e}" for name, rate in rates.items())
            + f"  {plan.batch_size / seconds:.1f} clips/s  "
            f"{duration(seconds * (total - step))} left"
        )

    @contextlib.contextmanager
    def paused(self) -> Generator[None, None, None]:
        """Leaves out of the throughput what happens within it."""
        began = time.monotonic()
        yield
        self._clock += time.monotonic() - began

    def sync(self) -> None:
        """Copies what was written to the run's bucket, before a checkpoint vouches for it."""
        self._writer.sync()
