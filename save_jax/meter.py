"""Measures a training run as it goes: throughput, time left, and the line that says so."""

import contextlib
import time
from collections.abc import Callable, Generator, Mapping
from typing import Any, NamedTuple

import jax

from save_jax import flops, optimizer, profiling
from save_jax.errors import UserError
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
        traced: steps of which a trace is written (`save_jax.profiling`).
    """

    total_steps: int
    steps_per_epoch: int
    batch_size: int
    eval_every: int
    checkpoint_every: int
    log_every: int
    traced: range = range(0)

    @classmethod
    def of(cls, config: Mapping[str, Any], steps_per_epoch: int) -> "Plan":
        """Returns the plan of a config: of `steps` updates or, where these are 0, of `epochs`.

        Raises:
            UserError: config.profile names steps that the run has not.
        """
        total = config["steps"] or config["epochs"] * steps_per_epoch
        traced = profiling.steps_of(config["profile"])
        if traced and traced[-1] > total:
            raise UserError(
                f"config.profile = {config['profile']!r}: expected steps of the run, 1 to {total}, "
                f"found {traced[-1]} as the last one"
            )
        return cls(
            total,
            steps_per_epoch,
            *(config[k] for k in ("batch_size", "eval_every", "checkpoint_every", "log_every")),
            traced,
        )

    def recorded(self) -> dict[str, int]:
        """Returns what config.json keeps of it, for a follower (`save_jax.recorded.plan`)."""
        every = {"steps_per_epoch": self.steps_per_epoch, "eval_every": self.eval_every}
        return {"steps": self.total_steps, **every}

    def again(self, recorded: Mapping[str, int]) -> "Plan":
        """Returns this plan with what `recorded` gave of another one."""
        return self._replace(
            total_steps=recorded["steps"],
            steps_per_epoch=recorded["steps_per_epoch"],
            eval_every=recorded["eval_every"],
        )

    def epoch(self, step: int) -> float:
        """Returns the epochs that `step` updates make."""
        return step / self.steps_per_epoch

    def evaluates(self, step: int) -> bool:
        """Says whether the split is evaluated after this step."""
        every = self.steps_per_epoch * self.eval_every
        return step == self.total_steps or step % every == 0

    def when(self, step: int) -> str:
        """Says in words at which point of the run an evaluated step is."""
        return f"after epoch {self.epoch(step):g}" + (
            " (the last step)" if step == self.total_steps else ""
        )

    def saves(self, step: int) -> bool:
        """Says whether a checkpoint is due after this step that no evaluation asks for."""
        return bool(self.checkpoint_every) and step % self.checkpoint_every == 0

    def logs(self, step: int) -> bool:
        """Says whether this step has a progress line and a line in metrics.jsonl."""
        every = 1 if self.total_steps <= LOG_EACH_UP_TO else self.log_every
        return step % every == 0 or step == self.total_steps


class Meter:
    """Writes a run's scalars and prints its progress, with clips/s and the time left.

    Time is that of the first process, which writes. `save_jax/README.md` defines the scalars.

    Args:
        plan: how long the run is.
        rates: learning rates, which are logged.
        writer: where the scalars go.
        first: updates done before this process began.
        began: when the run's first start was (`time.time`); None = unknown, and no goodput.
        peak: operations per second of all devices; None = unknown, and no utilisation.
    """

    def __init__(
        self,
        plan: Plan,
        rates: OptimizerConfig,
        writer: Writer,
        first: int,
        began: float | None = None,
        peak: float | None = None,
    ):
        self._plan, self._rates, self._writer = plan, rates, writer
        self._began, self._peak, self._flops = began, peak, 0.0
        self._step, self._clock, self._waited = first, time.monotonic(), 0.0
        # Up to this step, steps that were kept have taken so many seconds, in all starts.
        self._counted = int(writer.restored.get("step", 0))
        self._kept = writer.restored.get("kept_seconds", 0.0)

    @classmethod
    def of(
        cls,
        config: Mapping[str, Any],
        plan: Plan,
        rates: OptimizerConfig,
        writer: Writer,
        *,
        first: int,
        began: float | None,
    ) -> "Meter":
        """Returns the meter of a run on all devices, and says what it cannot measure."""
        devices = jax.devices()
        peak = flops.peak(devices, config["dtype"])
        if peak is None:
            kinds = ", ".join(sorted({device.device_kind for device in devices}))
            say(f"utilisation is not logged: no peak rate is known here of devices of kind {kinds}")
        return cls(plan, rates, writer, first, began, peak)

    def compiled(self, step: jax.stages.Wrapped) -> Callable[..., Any]:
        """Returns a jitted step that compiles when it is first called, which counts as no step's.

        Its operations are counted then.
        """
        program: Callable[..., Any] | None = None

        def run(*arguments: Any) -> Any:
            nonlocal program
            if program is None:
                say("compiling the training step")
                # Constants of the program may be copied, either way, while it is made.
                with self.paused(), jax.transfer_guard("allow"):
                    traced = step.trace(*arguments)
                    self._flops = flops.count_flops(traced.jaxpr)
                    program = traced.lower().compile()
            return program(*arguments)

        return run

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Logs a step's scalars if it is one of those that are logged."""
        plan = self._plan
        if not plan.logs(step):
            return
        now, steps = time.monotonic(), max(step - self._step, 1)
        seconds, waited = (now - self._clock) / steps, self._waited / steps
        # Steps between the last line that was kept and a checkpoint count as those after it.
        self._kept += seconds * (step - self._counted)
        self._clock, self._step, self._counted, self._waited = now, step, step, 0.0
        measured = {
            "clips_per_second": plan.batch_size / seconds,
            "step_seconds": seconds,
            "input_wait_seconds": waited,
            "kept_seconds": self._kept,
        }
        if self._peak and self._flops:
            measured["utilisation"] = self._flops / seconds / self._peak
        if self._began is not None:
            measured["goodput"] = self._kept / max(time.time() - self._began, self._kept)
        rates = optimizer.learning_rates(self._rates, step - 1)
        self._writer.write_scalars(
            step,
            {
                **scalars,
                "epoch": plan.epoch(step),
                **measured,
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
    def waiting(self) -> Generator[None, None, None]:
        """Counts what happens within it as waiting for the next batch."""
        began = time.monotonic()
        yield
        self._waited += time.monotonic() - began

    @contextlib.contextmanager
    def paused(self) -> Generator[None, None, None]:
        """Leaves out of the throughput what happens within it."""
        began = time.monotonic()
        yield
        self._clock += time.monotonic() - began

    def sync(self) -> None:
        """Copies what was written to the run's bucket, before a checkpoint vouches for it."""
        self._writer.sync()
