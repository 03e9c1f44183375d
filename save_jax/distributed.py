"""Joining the processes of one run, on one host or many.

A run of several processes is one program with one global batch: every process starts the same
command, computes on its own devices and reads its own share of the data.
"""

import contextlib
import os
import sys
from collections.abc import Generator

import jax
import numpy as np
from jax.experimental import multihost_utils

from save_jax import files, locks
from save_jax.errors import UserError

# Seconds without a sign of life after which a process counts as dead, and all the others stop.
HEARTBEAT = 30
SHUTDOWN = 60  # seconds that finished processes wait for those that still write


def cluster() -> str:
    """Returns the cluster manager that JAX finds in this environment; "" = none."""
    environment = os.environ
    if int(environment.get("SLURM_NTASKS", 1)) > 1 and "SLURM_STEP_NODELIST" in environment:
        return "SLURM"
    if int(environment.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return "Open MPI"
    if "," in environment.get("TPU_WORKER_HOSTNAMES", ""):
        return "Cloud TPU"
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        return "Kubernetes"
    return ""


def join(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    detect: bool = False,
) -> None:
    """Joins the other processes of this run; alone, it does nothing. Call it before using JAX.

    Args:
        coordinator: HOST:PORT of process 0, where no cluster tells it.
        num_processes: how many processes there are, with `coordinator`.
        process_id: which one this is, from 0, with `coordinator`.
        detect: ask JAX to find all three even if this looks like no cluster (a Cloud TPU pod
            whose hosts only their metadata server knows).

    Raises:
        UserError: only some of the three are given, or the others cannot be reached.
    """
    given = [x is not None for x in (coordinator, num_processes, process_id)]
    if any(given) and not all(given):
        raise UserError(
            "expected --coordinator=HOST:PORT, --num_processes and --process_id together: they "
            "describe the run where no cluster does"
        )
    if not any(given) and not detect and not cluster():
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=SHUTDOWN,
        )
    except (RuntimeError, ValueError, ImportError) as error:
        where = coordinator or cluster() or "an environment that JAX detects"
        raise UserError(
            f"could not join the other processes by {where}: {_first_line(error)}\nStart the same "
            "command once per process, with the same --coordinator and --num_processes and a "
            "--process_id of its own, or without them under SLURM, Open MPI, Cloud TPU, Kubernetes."
        ) from error


@contextlib.contextmanager
def hold(workdir: files.Path) -> Generator[None, None, None]:
    """Holds a workdir for this run (`locks.hold`); all processes of the run call it together.

    Raises:
        UserError: another run holds it; on every process.
    """
    with contextlib.ExitStack() as stack:
        refusal: Exception | None = None
        if jax.process_index() == 0:
            try:
                stack.enter_context(locks.hold(workdir))
            except Exception as error:  # whatever it is, the others must not wait for this process
                refusal = error
        if jax.process_count() > 1 and multihost_utils.broadcast_one_to_all(
            np.bool_(refusal is not None)
        ):
            refusal = refusal or UserError(f"{workdir} cannot be used; process 0 says why")
        if refusal is not None:
            raise refusal
        yield


@contextlib.contextmanager
def exit_if_peer_lost() -> Generator[None, None, None]:
    """Exits with code 1 and one message when a collective fails because another process died.

    The others' results will never come; waiting for them at exit would only hang.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        # An error of this process alone is not for us; ValueError is how gloo's reach us at times.
        if jax.process_count() == 1 or not _is_communication(error):
            raise
        print(
            f"error: process {jax.process_index()} of {jax.process_count()} lost contact with "
            f"another, which has probably died (see its own output): {_first_line(error)}\n"
            "Stopped. The same command, for all processes, resumes from the last checkpoint.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)


def _is_communication(error: Exception) -> bool:
    text = str(error).lower()
    signs = ("gloo", "connection", "nccl", "unavailable", "deadline", "heartbeat", "peer", "coord")
    return any(sign in text for sign in signs)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:300]
