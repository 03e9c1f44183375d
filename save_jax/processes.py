"""Which process is which: on this host or another, and whether it still lives."""

import contextlib
import os
import pathlib
import socket
from collections.abc import Mapping
from typing import Any

_WHERE = ("host", "boot", "namespace")


def describe(pid: int | None = None) -> dict[str, Any]:
    """Returns what tells a process of this host, by default this one, from all others.

    Returns:
        "host", its name; "boot", of the system; "namespace", because other containers' processes
        are not seen; "pid"; "started", in clock ticks since the host did. All but the host and the
        pid are None where there is no /proc.
    """
    pid = os.getpid() if pid is None else pid
    boot = namespace = None
    with contextlib.suppress(OSError):
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
    host = socket.gethostname()
    return {"host": host, "boot": boot, "namespace": namespace, "pid": pid, "started": _began(pid)}


def is_alive(described: Mapping[str, Any]) -> bool | None:
    """Says whether a process lives, by what `describe` gave; None where this one cannot see it.

    A later process with the same number is told apart by when it started.
    """
    here = describe()
    seen = all(here[key] and described.get(key) == here[key] for key in _WHERE)
    if not seen or not isinstance(pid := described.get("pid"), int):
        return None
    began = _began(pid)
    return began is not None and began == described.get("started")


def _began(pid: int) -> int | None:
    """Returns when a process started, in clock ticks since the host did; None if it has ended."""
    try:
        # The name, in parentheses, may hold any character; after it come the state and numbers.
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])  # ended, though its parent has not asked
