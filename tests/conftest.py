"""Tests run on the CPU, as eight devices, with every shape annotation of `save_jax` checked."""

import ctypes
import gc
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile

import pytest

from tests.support import programs

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {programs.flags(devices=8)}".strip()

# What one process has compiled, the others of this session read: pytest's own, which inherit these
# variables, and the commands that tests start.
MADE_CACHE = "JAX_COMPILATION_CACHE_DIR" not in os.environ
if MADE_CACHE:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="save_jax-tests-")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

# A shell starts its background jobs with Ctrl-C ignored, and their children inherit that; tests
# send Ctrl-C to commands.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

from jaxtyping import install_import_hook  # noqa: E402, after the variables above

install_import_hook("save_jax", "beartype.beartype")

# With several test processes, the longest tests start first: nobody waits for the last of them.
# In this order, that of their time: so the full-size ones do not add their memory to the README's.
LONGEST = (
    "tests/test_readme.py",
    "tests/test_cache.py",
    "tests/test_distributed.py",
    "tests/test_train.py",
    "tests/test_scaling.py",
    "tests/weights/test_full_size.py",
    "tests/test_evaluated_run.py",
    "tests/test_workdir.py",
    "tests/data_pipelines/modalities/test_whisper.py",
    "tests/test_own_videos.py",
    "tests/launch/benchmark/test_train.py",
    "tests/weights/test_command.py",
)


def pytest_unconfigure(config):
    """Removes the session's compiled programs; only the process that made their folder has it."""
    if MADE_CACHE and not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


@pytest.fixture(autouse=True, scope="module")
def _memory():
    """Forgets, after each file, its programs and what its tests cached: memory would fill up.

    A file's tests run in one process (`--dist=loadfile`), so no other file's wait for them.
    """
    yield
    for name, module in list(sys.modules.items()):
        if name.startswith("tests."):
            for value in vars(module).values():
                if hasattr(value, "cache_clear"):  # functools.cache
                    value.cache_clear()
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def pytest_pyfunc_call(pyfuncitem):
    """Runs a test that is marked `profiler` in a process of its own, where this one has libtpu.

    Its profiler ends a process without a TPU with SIGSEGV, once other tests have compiled with it.
    """
    maps = pathlib.Path("/proc/self/maps")
    if (
        pyfuncitem.get_closest_marker("profiler") is None
        or not maps.exists()
        or "libtpu" not in maps.read_text()
    ):
        return None
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", pyfuncitem.nodeid]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(
        command, cwd=pyfuncitem.config.rootpath, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return True


def pytest_collection_modifyitems(items):
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.nodeid.partition("::")[0], len(LONGEST)))
