"""Stopping a run of one process or many after the same step, with a checkpoint."""

import signal
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from save_jax import sharding


class Stopped(Exception):
    """What runs between steps was asked to stop; raised on all processes at the same place."""


class StopRequest:
    """Makes Ctrl-C and SIGTERM ask all processes to stop after the same step, with a checkpoint.

    A signal may reach one process only, and not at the same step everywhere. So with every step
    the processes vote, and act upon a vote when they read that step's results.

    It is a context manager: handlers are those of before until the first vote, because a process
    that still compiles its first step has nothing to keep, and once it is left. Python sets
    handlers in the main thread only; in another one (a notebook's, a launcher's) signals stay the
    caller's, who may call `request`.
    """

    def __init__(self, mesh: jax.sharding.Mesh) -> None:
        self.signal: signal.Signals | None = None
        self.agreed = False
        self._mesh = mesh
        self._any = jax.jit(jnp.any, out_shardings=sharding.replicated(mesh))
        self._waits = False  # to set handlers
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        self._waits = threading.current_thread() is threading.main_thread()
        return self

    def __exit__(self, *_: Any) -> None:
        self._waits = False
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def request(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Asks for the stop as this signal would."""
        self.signal = number

    def _note(self, number: int, frame: Any) -> None:
        del frame
        self.request(signal.Signals(number))
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C is immediate

    def vote(self) -> jax.Array | None:
        """Casts this process's vote at this step, to be counted later; None if it is alone."""
        if self._waits:
            self._waits = False
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        if jax.process_count() == 1:
            return None
        rows = sharding.process_rows(self._mesh, self._mesh.size)  # one for each device
        mine = np.full(len(rows), self.signal is not None)
        return self._any(sharding.global_array(mine, sharding.batch_sharding(self._mesh), rows))

    def count(self, vote: jax.Array | None) -> None:
        """Waits for a vote, and notes its outcome."""
        self.agreed |= self.signal is not None if vote is None else bool(jax.device_get(vote))

    def heed(self) -> None:
        """Raises Stopped, on all processes at the same call, once one of them was asked to stop."""
        self.count(self.vote())
        if self.agreed:
            raise Stopped

    def heed_alone(self) -> None:
        """Raises Stopped if this process was asked to stop; for what one does for all of them."""
        if self.signal is not None:
            raise Stopped
