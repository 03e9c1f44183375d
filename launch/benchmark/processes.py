"""Processes of their own for measurements, and what memory they take."""

import concurrent.futures
import multiprocessing
import pathlib
from collections.abc import Callable
from typing import Any


def in_own_process(measure: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function in a new process, so that no measurement sees another's memory."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(measure, *arguments).result()


def memory(field: str) -> float:
    """Returns a field of /proc/self/status of this process, in MiB."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    (value,) = (line.split()[1] for line in lines if line.startswith(f"{field}:"))
    return int(value) * 1024 / 2**20
