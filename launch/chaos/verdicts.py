"""What must hold of a run that faults have hit: its exit codes, and its last checkpoint."""

import os
import pathlib
import signal
from collections.abc import Sequence

import numpy as np

from launch.chaos.jobs import START, Job
from save_jax import checkpoint


class Failure(Exception):
    """What should not have happened to a run."""


def arrays(workdir: pathlib.Path, step: int) -> dict[str, np.ndarray]:
    """Returns all parameters of a run's last checkpoint."""
    found = checkpoint.find(workdir)
    if int(found.name) != step:
        raise Failure(f"{workdir}: expected checkpoint {step} as the last, found {found.name}")
    return checkpoint.read_parameters(found, checkpoint.parameter_shapes(found))


def distance(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    """Returns the largest difference of two runs' parameters; infinite where names differ."""
    if one.keys() != other.keys():
        return float("inf")
    return max(float(np.abs(value - other[name]).max()) for name, value in one.items())


def check_ends(job: Job, found: str, number: signal.Signals, victims: Sequence[int]) -> None:
    """Checks the exit codes of a job that a fault hit, if it hit.

    Raises:
        Failure: a process ended with a code that a cluster's script would not start again.
    """
    for process, code in enumerate(job.codes()):
        # 134: JAX's own end where its heartbeat has noticed a lost process first.
        allowed = {0, os.EX_TEMPFAIL, -signal.SIGABRT} if found else {0}
        if found and process in victims:
            # A signal before Python could set a handler ends it too.
            allowed = {-number} if number == signal.SIGKILL else {0, os.EX_TEMPFAIL, -number}
        elif found == START:
            allowed.add(-signal.SIGKILL)  # it waited for a process that never came
        if code not in allowed:
            raise Failure(
                f"{job.logs / f'{process}.txt'}: exit code {code} after {number.name} in "
                f"{found or 'no stage'} to {', '.join(map(str, victims))}; expected one of "
                f"{sorted(allowed)}\n{job.said(process)[-2000:]}"
            )
