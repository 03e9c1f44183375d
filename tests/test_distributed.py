"""Several processes over loopback: the same numbers, and an end that nobody waits for in vain."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from jax.errors import JaxRuntimeError

from save_jax import distributed
from save_jax.checkpoint import load_parameters
from save_jax.errors import NonFiniteLossError, OutageError, UserError
from tests.support import programs, synthetic
from tests.support.training import FIVE, RATES, VISION, program, run

WITHIN = 300  # seconds for a job on a busy machine


def vision(workdir) -> tuple[str, ...]:
    """The command of a run whose model does not matter."""
    return "tests.support.training", "--vision", str(workdir)


def start(
    workdir, devices: int, moments: list[str], command: tuple[str, ...] = ()
) -> list[subprocess.Popen]:
    """Starts one process a moment, each with so many devices of its own."""
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = command or ("tests.support.training", str(workdir))
    return [
        subprocess.Popen(
            [sys.executable, "-m", *command, moment, coordinator, str(len(moments)), str(number)],
            env=os.environ | cache | {"XLA_FLAGS": programs.flags(devices)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number, moment in enumerate(moments)
    ]


def finish(job: list[subprocess.Popen]) -> tuple[list[int], list[str]]:
    """Waits for all; exit codes, and what each said on stderr."""
    try:
        said = [process.communicate(timeout=WITHIN)[1] for process in job]
    finally:
        for process in job:
            process.kill()
    return [process.returncode for process in job], said


def parameters(workdir, rates, model=synthetic.MODEL) -> dict[str, np.ndarray]:
    like = program(rates, 1, model)[1]
    step, found = load_parameters(workdir, {**like.trained, **like.frozen})
    assert step == rates.total_steps
    return jax.tree.map(np.asarray, found)


def losses(workdir) -> list[float]:
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Losses and parameters of five steps in one process on one device."""
    workdir = tmp_path_factory.mktemp("alone")
    run(workdir, rates=FIVE)
    return losses(workdir), parameters(workdir, FIVE)


ORDERS = ("interleaved", "reversed", "random")


@pytest.mark.parametrize(
    ("count", "devices", "order"),
    [
        # In each test run: tests/test_cache.py, a run and a cache in such orders.
        *(pytest.param(2, 4, order, marks=pytest.mark.soak) for order in ("", *ORDERS)),
        *(pytest.param(4, 2, order, marks=pytest.mark.soak) for order in ("", *ORDERS)),
    ],
)
def test_five_steps_agree_with_those_of_one_process(tmp_path, alone, count, devices, order):
    training = ("tests.support.training", str(tmp_path))
    command = ("tests.support.device_orders", order, *training) if order else training
    codes, said = finish(start(tmp_path, devices, ["five"] * count, command))
    assert codes == [0] * count, said
    expected_losses, expected = alone
    np.testing.assert_allclose(losses(tmp_path), expected_losses, atol=1e-5)
    for name, value in parameters(tmp_path, FIVE).items():
        np.testing.assert_allclose(value, expected[name], atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("count", "devices", "shuffles"),
    [(2, 4, 2), *(pytest.param(*each, 10, marks=pytest.mark.soak) for each in ((2, 4), (4, 2)))],
)
def test_rows_are_where_they_belong_in_every_order(tmp_path, count, devices, shuffles):
    """Batches, captions, weights and votes, on meshes with and without fsdp."""
    job = start(tmp_path, devices, [str(shuffles)] * count, ("tests.support.placing",))
    try:
        said = [process.communicate(timeout=WITHIN) for process in job]
    finally:
        for process in job:
            process.kill()
    assert [process.returncode for process in job] == [0] * count, said
    # Three meshes in each of the orders.
    assert [out.count("checked: ") for out, _ in said] == [3 * (2 + shuffles)] * count


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Parameters of two processes that nothing happened to."""
    workdir = tmp_path_factory.mktemp("uninterrupted")
    codes, said = finish(start(workdir, 1, ["never"] * 2, vision(workdir)))
    assert codes == [0, 0], said
    return parameters(workdir, RATES, VISION)


def test_a_dead_process_ends_the_job_and_the_restart_goes_on(tmp_path, uninterrupted):
    job = start(tmp_path, 1, ["never", "step"], vision(tmp_path))
    job[1].wait(WITHIN)
    died = time.monotonic()
    codes, said = finish(job)
    assert time.monotonic() - died < 60
    assert codes[1] == -signal.SIGKILL
    assert codes[0] == os.EX_TEMPFAIL, said[0]
    assert "Traceback" in said[0] and "\ninterrupted: process 0 of 2 lost contact" in said[0]
    codes, said = finish(start(tmp_path, 1, ["never"] * 2, vision(tmp_path)))
    assert codes == [0, 0], said
    for name, value in parameters(tmp_path, RATES, VISION).items():
        np.testing.assert_array_equal(value, uninterrupted[name], err_msg=name)


@pytest.mark.parametrize(
    ("moment", "code", "message"),
    [
        pytest.param(
            "error",
            1,
            "ValueError: the connection of two peers: coordinates that are unavailable",
            marks=pytest.mark.soak,
        ),
        ("mistake", 2, "error: /data/a: no such file on this host"),
    ],
)
def test_a_process_that_fails_is_told_from_one_that_loses_it(tmp_path, moment, code, message):
    codes, said = finish(start(tmp_path, 1, ["never", moment], vision(tmp_path)))
    assert codes == [os.EX_TEMPFAIL, code], said
    assert message in said[1] and ("Traceback" in said[1]) == (code == 1)
    assert "lost contact" not in said[1] and "process 0 of 2 lost contact" in said[0]


class Left(BaseException):
    """The process has ended."""


@pytest.mark.parametrize(
    ("error", "code"),
    [
        # As gloo, NCCL and the coordination service say it.
        (
            JaxRuntimeError("UNKNOWN: Gloo AllGather failed: […] Connection closed by peer [::1]"),
            75,
        ),
        (ValueError("UNKNOWN: Gloo AllReduce failed: […] Read error [::1]: reset by peer"), 75),
        (JaxRuntimeError("INTERNAL: NCCL operation failed: remote process exited or there"), 75),
        (JaxRuntimeError("UNAVAILABLE: Failed to send RPC to coordination service."), 75),
        (JaxRuntimeError("DEADLINE_EXCEEDED: Barrier timed out. Id: a"), 75),
        # This process's own.
        (ValueError("expected coordinates of a peer, and a connection: unavailable"), 1),
        (ValueError("UNAVAILABLE: a word that begins a message of ours"), 1),
        (JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while a peer's deadline"), 1),
        (JaxRuntimeError("INTERNAL: no coordinator of this kernel"), 1),
        (NonFiniteLossError("step 3: loss = nan"), 1),
        (UserError("no such file"), 2),
        (OutageError("the store fails"), 75),
        (KeyboardInterrupt(), 75),
    ],
)
def test_how_a_process_of_several_ends(monkeypatch, capsys, error, code):
    def leave(code):
        raise Left(code)

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with pytest.raises(Left) as left, distributed.exit_alone():
        raise error
    said = capsys.readouterr().err
    assert left.value.args == (code,)
    lost = "lost contact with another" in said
    assert lost == (code == 75 and isinstance(error, JaxRuntimeError | ValueError))
    told = isinstance(error, UserError | OutageError | NonFiniteLossError | KeyboardInterrupt)
    assert ("Traceback" in said and str(error) in said) != told


def test_alone_an_error_passes():
    with pytest.raises(ValueError, match="Gloo"), distributed.exit_alone():
        raise ValueError("UNKNOWN: Gloo AllReduce failed: Connection closed by peer")


def test_sigterm_to_one_process_stops_all_after_the_same_step(tmp_path, uninterrupted):
    codes, said = finish(start(tmp_path, 1, ["never", "term"], vision(tmp_path)))
    assert codes == [os.EX_TEMPFAIL] * 2, said
    codes, said = finish(start(tmp_path, 1, ["never"] * 2, vision(tmp_path)))
    assert codes == [0, 0], said
    for name, value in parameters(tmp_path, RATES, VISION).items():
        np.testing.assert_array_equal(value, uninterrupted[name], err_msg=name)


def test_alone_nothing_is_joined(monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: pytest.fail("joined"))
    distributed.join()


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "a,b"}, "SLURM"),
        ({"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "a"}, ""),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "Open MPI"),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "Cloud TPU"),
        ({"TPU_WORKER_HOSTNAMES": "a"}, ""),
        ({"KUBERNETES_SERVICE_HOST": "h", "JOB_COMPLETION_INDEX": "0"}, "Kubernetes"),
    ],
)
def test_clusters_are_known_by_their_variables(monkeypatch, variables, expected):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert distributed.cluster() == expected


def test_half_a_description_of_the_job_is_refused():
    with pytest.raises(UserError, match="together"):
        distributed.join(coordinator="127.0.0.1:1", num_processes=2)
