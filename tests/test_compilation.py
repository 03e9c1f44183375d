"""The cache of compiled programs: found again, in a bucket too, and never in the way of a run."""

import contextlib
import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from configs import base
from save_jax import compilation, resume
from tests.support import object_store, programs


@pytest.fixture
def unset(monkeypatch):
    """As where the user has set nothing; what is compiled goes to the cache however quickly."""
    monkeypatch.delenv(compilation.VARIABLE)
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update(names[1], 0.0)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def compiles(number: float) -> list[str]:
    """Compiles a small program as a new process would; says what the cache had to do with it."""
    events = []
    listener = lambda name, **_: events.append(name.rpartition("/")[2])  # noqa: E731
    jax.monitoring.register_event_listener(listener)
    try:
        jax.jit(lambda x: jnp.sin(x) + number).lower(
            jax.ShapeDtypeStruct((3,), "float32")
        ).compile()
    finally:
        jax.monitoring.unregister_event_listener(listener)
    return [name for name in events if name in ("cache_hits", "cache_misses")]


def test_it_is_on_by_default(unset, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    compilation.use_cache(base.get_config().compilation_cache)
    assert compiles(0.25) == ["cache_misses"]
    assert list((tmp_path / ".cache" / "save_jax").rglob("*-cache"))
    assert not list(tmp_path.rglob("*.probe"))
    compilation.use_cache("")
    assert compiles(0.25) == []
    compilation.use_cache(base.get_config().compilation_cache)
    assert compiles(0.25) == ["cache_hits"]


def test_it_may_be_in_a_bucket(unset):
    store = object_store.register()
    compilation.use_cache("gs://bucket/compiled")
    assert compiles(0.5) == ["cache_misses"] and compiles(0.5) == ["cache_hits"]
    assert [name for name in store.find("gs://bucket/compiled") if name.endswith("-cache")]
    assert not [name for name in store.find("gs://bucket/compiled") if name.endswith(".probe")]


def test_jaxs_own_variable_wins(unset, tmp_path, monkeypatch):
    monkeypatch.setenv(compilation.VARIABLE, str(tmp_path / "theirs"))
    before = jax.config.jax_compilation_cache_dir
    compilation.use_cache(str(tmp_path / "ours"))
    assert jax.config.jax_compilation_cache_dir == before
    assert not (tmp_path / "ours").exists()


def test_a_directory_that_cannot_be_written_is_a_warning(unset, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    compilation.use_cache(str(tmp_path / "file" / "compiled"))
    assert compiles(0.75) == []
    said = capsys.readouterr().err
    assert said.startswith("warning: config.compilation_cache = ") and "Not a directory" in said
    compilation.use_cache("nowhere://bucket")
    assert "expected a path on a disk, gs:// or s3://" in capsys.readouterr().err


def test_a_run_resumes_with_another(tmp_path):
    (tmp_path / "config.json").write_text('{"compilation_cache": "a"}')
    resume.check_same_config({"compilation_cache": "b"}, tmp_path)
    (tmp_path / "config.json").write_text("{}")  # an earlier version's
    resume.check_same_config({"compilation_cache": "b"}, tmp_path)


PROCESS = """
import sys
import jax
from save_jax import compilation, distributed
distributed.join(sys.argv[1], 2, int(sys.argv[2]))
for where in ("~/compiled", sys.argv[3]):
    compilation.use_cache(where)
    print(jax.config.jax_compilation_cache_dir)
"""


def test_processes_that_do_not_share_it_do_without(tmp_path):
    """One that had a program and one that compiled it would wait for each other on GPUs."""
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {key: v for key, v in os.environ.items() if key != compilation.VARIABLE}
    environment["XLA_FLAGS"] = programs.flags()
    job = []
    for number in range(2):
        home = tmp_path / str(number)
        home.mkdir()
        command = [sys.executable, "-c", PROCESS, coordinator, str(number), str(tmp_path / "both")]
        job.append(
            subprocess.Popen(
                command, env=environment | {"HOME": str(home)}, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )
        )  # fmt: skip
    try:
        ended = [process.communicate(timeout=200) for process in job]
    finally:
        for process in job:
            process.kill()
    assert [process.returncode for process in job] == [0, 0], ended
    for out, _ in ended:
        assert out.splitlines()[-2] == "None"
        assert out.splitlines()[-1].startswith(str(tmp_path / "both"))
    assert "is another directory for 1 of the 2 processes" in ended[0][1]
