"""SIGTERM and Ctrl-C end the command with 75 at moments in which Python's handlers cannot run."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from tests.support import caching
from tests.test_workdir import prepared

WITHIN = 60  # seconds for a start on a busy machine
SOON = 25  # a TPU that is preempted is there for 30 s


def end(process: subprocess.Popen, number: signal.Signals) -> tuple[int, str, float]:
    """Sends a signal; returns the exit code, what was said on stderr, and the seconds it took."""
    began = time.monotonic()
    process.send_signal(number)
    try:
        said = process.communicate(timeout=WITHIN)[1]
    finally:
        process.kill()
    return process.returncode, said, time.monotonic() - began


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_while_the_other_processes_are_waited_for(tmp_path, number):
    with contextlib.closing(socket.socket()) as coordinator:
        coordinator.bind(("127.0.0.1", 0))
        coordinator.listen()
        coordinator.settimeout(WITHIN)
        address = f"--coordinator=127.0.0.1:{coordinator.getsockname()[1]}"
        command = (address, "--num_processes=2", "--process_id=1", f"--workdir={tmp_path / 'run'}")
        process = subprocess.Popen(
            [sys.executable, "-m", "save_jax.main", *command], stderr=subprocess.PIPE, text=True
        )
        with coordinator.accept()[0]:  # and no answer
            code, said, took = end(process, number)
    assert code == os.EX_TEMPFAIL, said
    assert said.endswith("interrupted: what was done is kept, and the same command resumes\n")
    assert took < SOON and "Traceback" not in said
    assert not (tmp_path / "run").exists()


@pytest.mark.soak
def test_while_the_first_step_is_compiled(tmp_path):
    """For most of a minute, as it is optimised here."""
    data = prepared(tmp_path / "root", tmp_path / "prepared")
    changes = caching.CHANGES | {"data.dir": data}
    flags = [f"--config.{key}={value}" for key, value in changes.items()]
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "save_jax.main", "--config=configs/demo.py", *flags,
         f"--workdir={tmp_path / 'run'}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"XLA_FLAGS": "", "JAX_ENABLE_COMPILATION_CACHE": "false"},
    )  # fmt: skip
    for line in process.stdout:
        if line.startswith("utilisation is not logged"):
            break
    time.sleep(4)  # it is traced first
    code, said, took = end(process, signal.SIGTERM)
    assert code == os.EX_TEMPFAIL, said
    assert said.endswith("interrupted: what was done is kept, and the same command resumes\n")
    assert took < SOON
    assert not list((tmp_path / "run").glob("checkpoints/*/default"))
