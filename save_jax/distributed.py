"""Joining the processes of one run, on one host or many.

A run of several processes is one program with one global batch: every process starts the same
command, computes on its own devices and reads its own share of the data.
"""

import contextlib
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Generator
from typing import NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from save_jax import files, locks
from save_jax.errors import UserError, report
from save_jax.stopping import Stopped

# Seconds without a sign of life after which a process counts as dead, and all the others stop.
HEARTBEAT = 30
SHUTDOWN = 60  # seconds that finished processes wait for those that still write
# Seconds that process 0, which coordinates, lets the others end by themselves when the run breaks
# down: JAX aborts them as soon as it is gone, and their own code and message would be lost.
LAST = 5
# How XLA says that another process does not answer: its statuses, and what transports report.
_UNREACHABLE = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED")
_TRANSPORT = re.compile(
    r"gloo.*(connection|connect timeout|timed out|read error|write error)|"
    r"nccl.*(remote process exited|remote error|network error|connection)",
    re.IGNORECASE | re.DOTALL,
)


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
def hold(
    directory: files.Path, *, wait: bool = False, heed: Callable[[], None] = lambda: None
) -> Generator[None, None, None]:
    """Holds a directory for this run (`locks.hold`); all processes of the run call it together.

    Process 0 holds it, and alone writes what others read: it commits each checkpoint once all
    processes have written their shards. So when its host stands still and another run takes the
    directory over, nothing more appears there, and process 0 ends with code 1 when it goes on. JAX
    ends the others after HEARTBEAT, before a lock can be taken over; should they stand still too,
    what they write afterwards are shards of a checkpoint that is never committed. On a disk these
    are in a folder of their own. In gs:// there is none, and one that the other run commits at the
    same step may hold unused files of theirs.

    Args:
        directory: a workdir, or what an evaluation writes in one.
        wait: wait for another run that holds it.
        heed: called by process 0 while it waits. It may raise Stopped, which then all raise.

    Raises:
        UserError: another run holds it, without `wait`; on every process.
    """
    with contextlib.ExitStack() as stack:
        refusal: Exception | None = None
        if jax.process_index() == 0:
            try:
                stack.enter_context(locks.hold(directory, wait=wait, heed=heed))
            except Exception as error:  # whatever it is, the others must not wait for this process
                refusal = error
        refused = np.asarray([refusal is not None, isinstance(refusal, Stopped)])
        refused, stopped = of_first(refused).tolist()
        if refused and refusal is None:
            other = UserError(f"{directory} cannot be used; process 0 says why")
            refusal = Stopped() if stopped else other
        if refusal is not None:
            raise refusal
        yield


def of_first(value: np.ndarray) -> np.ndarray:
    """Returns process 0's array on all processes, which call it together, of equal shapes."""
    return multihost_utils.broadcast_one_to_all(value) if jax.process_count() > 1 else value


@contextlib.contextmanager
def exit_alone() -> Generator[None, None, None]:
    """Ends this process, of several, with its own exit code when an exception leaves it.

    The code says which process failed: its own (1, with the traceback, or as `errors.exit_codes`
    has it), or 75 where it has only lost another (`exit_if_peer_lost`). An ordinary exit would wait
    for the others, which wait for this process, until JAX aborts all of them with one code.
    """
    try:
        with exit_if_peer_lost():
            yield
    except (Exception, KeyboardInterrupt) as error:
        if jax.process_count() == 1:
            raise
        code = report(error)
        if code is None:
            traceback.print_exc()
            code = 1
        _leave(code)


@contextlib.contextmanager
def exit_if_peer_lost() -> Generator[None, None, None]:
    """Exits with code 75, after the traceback, when a collective fails because a process is gone.

    75 is the code of what the same command resumes, and of a machine's outage: nothing is wrong
    with this process, and the restart goes on from the last checkpoint. Enter it after all that
    waits for the other processes when it is left, such as a checkpoint's writer: the lost one's
    answer will never come. Where JAX learns of the loss first, from its heartbeats, it ends the
    process with SIGABRT (134) itself.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        if jax.process_count() == 1 or not _lost_peer(error):
            raise
        traceback.print_exc()
        print(
            f"interrupted: process {jax.process_index()} of {jax.process_count()} lost contact "
            "with another, which has ended or cannot be reached; its own output says why: "
            f"{_first_line(error)}\n"
            "Stopped. The same command, for all processes, resumes from the last checkpoint.",
            file=sys.stderr,
            flush=True,
        )
        _leave(os.EX_TEMPFAIL)


def _leave(code: int) -> NoReturn:
    """Ends this process without waiting for the others."""
    with contextlib.suppress(OSError, ValueError):  # nobody reads it any more, or it is closed
        sys.stdout.flush()
    if jax.process_index() == 0:
        time.sleep(LAST)
    os._exit(code)


def _lost_peer(error: Exception) -> bool:
    """Says whether an error is that of a collective, or of a barrier, whose peer is gone.

    Words such as "peer" or "connection" alone do not tell: this process's own errors have them too.
    """
    text = str(error)
    # XLA and the coordination service begin with the status. An error of Python's that begins so
    # is none of theirs; but gloo's reach us as ValueErrors at times.
    status = text.partition(":")[0]
    of_xla = isinstance(error, jax.errors.JaxRuntimeError)
    return (of_xla and status in _UNREACHABLE) or bool(_TRANSPORT.search(text))


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:300]
