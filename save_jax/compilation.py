"""The cache of compiled programs, which outlives a process: a restart need not compile again."""

import hashlib
import os
import pathlib
import platform
import re
import uuid

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.experimental.compilation_cache import compilation_cache

from save_jax import files
from save_jax.progress import warn

VARIABLE = "JAX_COMPILATION_CACHE_DIR"  # JAX's own; where it is set, it decides


def use_cache(where: str) -> None:
    """Keeps compiled programs in a directory, and takes those that are there, from now on.

    All processes of a run call it together. If they do not all see what the first of them writes
    there, none uses it: on GPUs, one that has a program would not tune it with those that compile.
    What stands in the way of a cache costs time and no result, so it is a warning.

    Args:
        where: the directory, on a disk or in a bucket; "" = no cache.
    """
    if VARIABLE in os.environ:
        return
    folder = _shared(where) if where else None
    compilation_cache.reset_cache()  # which JAX may have begun to do without
    jax.config.update("jax_compilation_cache_dir", folder and os.fspath(folder))


def _shared(where: str) -> files.Path | None:
    """Returns the directory to use below `where`; None if it cannot be used, after a warning."""
    token, first = np.frombuffer(uuid.uuid4().bytes, np.uint8), jax.process_index() == 0
    if jax.process_count() > 1:
        token = multihost_utils.broadcast_one_to_all(token)
    failed, folder, probe = "", None, None
    try:
        # CPUs of a cluster may share a home directory, and not each other's instructions.
        folder = files.path(where) / (_cpu() if jax.default_backend() == "cpu" else "accelerator")
        probe = folder / f".{token.tobytes().hex()}.probe"
        if first:
            folder.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"")
    except Exception as error:  # each kind of store has its own
        failed = f"cannot be used ({error})"
    _answers(True)  # when all have come here, the first one's file is there
    seen = _answers(probe is not None and not failed and probe.exists())
    if first and probe is not None and not failed:
        probe.unlink()
    if seen.all():
        return folder
    warn(
        f"config.compilation_cache = {where!r} "
        + (failed or f"is another directory for {(~seen).sum()} of the {seen.size} processes")
        + ": programs are compiled at each start. Give a directory that can be written to and that "
        "all processes share, or a bucket; '' is no cache"
    )
    return None


def _answers(mine: bool) -> np.ndarray:
    """Returns what each process answers."""
    if jax.process_count() == 1:
        return np.array([mine])
    return np.asarray(multihost_utils.process_allgather(np.bool_(mine)))


def _cpu() -> str:
    """Names the instructions of this machine's CPU, for which XLA compiles."""
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text()
        features = "".join(re.findall(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)[:1])
    except OSError:  # not Linux
        features = platform.processor()
    return f"cpu-{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:12]}"
