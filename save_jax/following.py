"""Evaluates the checkpoints of a run from another job, so that its trainer need not stand still.

The follower says in follower.json that it lives, with a number that moves. The trainer watches that
number by its own clock: while it moves, the trainer saves and goes on; once it stands still, the
trainer evaluates again itself. Both write the same files to `evaluation/STEP`, whose metrics.json
is the one sign that a checkpoint is evaluated, so that nothing goes wrong if both evaluate one.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Collection, Generator, Mapping
from typing import Any

import jax
import numpy as np

from save_jax import (
    averaging,
    checkpoint,
    distributed,
    evaluate,
    files,
    progress,
    recorded,
    results,
    resume,
    stopping,
    train,
)
from save_jax import config as configuration
from save_jax.data import open_splits
from save_jax.errors import UserError
from save_jax.evaluations import Evaluations, Job, Load
from save_jax.meter import Plan
from save_jax.parameters import Parameters
from save_jax.progress import Writer, say

HEARTBEAT = "follower.json"  # within a workdir
SCALARS = "follower"  # likewise: the follower's metrics.jsonl and events; the others are another's
BEAT = 5.0  # seconds between two numbers
TIMEOUT = 60.0  # seconds that the number may stand still
POLL = 5.0  # seconds between two looks for checkpoints


# ---------------------------------------------------------------------------------- the heartbeat


@contextlib.contextmanager
def beating(workdir: files.Path) -> Generator[None, None, None]:
    """Shows, meanwhile, that a follower lives; from process 0.

    From its very start on, before there is a run: what a trainer leaves it then, it finds.
    """
    if jax.process_index():
        yield
        return
    workdir.mkdir(parents=True, exist_ok=True)
    path, ended = workdir / HEARTBEAT, threading.Event()
    name = {"id": uuid.uuid4().hex, "holder": f"process {os.getpid()} on {socket.gethostname()}"}

    def beat() -> None:
        for number in range(sys.maxsize):
            try:
                files.write(path, json.dumps({**name, "beat": number}) + "\n", fsync=False)
            except Exception as error:  # of each store its own; it may work again
                print(f"warning: {path} cannot be written: {error}", file=sys.stderr)
            if ended.wait(BEAT):
                return

    # At once, and here: where it may not be written, this must not begin.
    files.write(path, json.dumps({**name, "beat": -1}) + "\n", fsync=False)
    thread = threading.Thread(target=beat, name="follower", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with contextlib.suppress(Exception):  # then it stands still, which says the same
            if json.loads(path.read_text()).get("id") == name["id"]:
                path.unlink()


class Watch:
    """Watches for a follower's heartbeat, on process 0; a context manager.

    Hosts' clocks are not compared: what counts is when this process has seen the number move.
    """

    def __init__(self, workdir: files.Path):
        self._path = workdir / HEARTBEAT
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)
        self._moved: float | None = None
        self._lived = False
        self._began = time.monotonic()
        self._seen = self._read() if jax.process_index() == 0 else ""

    def __enter__(self) -> "Watch":
        if jax.process_index() == 0:
            self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def _read(self) -> str:
        with contextlib.suppress(FileNotFoundError):
            return self._path.read_text()
        return ""

    def _watch(self) -> None:
        while not self._ended.wait(BEAT / 2):
            with contextlib.suppress(Exception):  # of a store, for a while: nothing has moved
                self.look()

    def look(self) -> None:
        """Looks whether the number has moved since the last look."""
        found = self._read()
        if found != self._seen:
            self._moved = time.monotonic() if found else None
        self._seen = found

    def is_alive(self) -> bool:
        """Says whether a follower lives, and prints what has changed; on all processes the same."""
        alive = jax.process_index() == 0 and self._is_alive()
        alive = bool(distributed.of_first(np.asarray(alive)))
        if self._lived and not alive:
            say(f"the follower has gone, or {HEARTBEAT} stands still: evaluating here again")
        self._lived = alive
        return alive

    def _is_alive(self) -> bool:
        # One that is there from the beginning may have been left by a follower that was killed.
        while self._seen and self._moved is None and time.monotonic() - self._began < 3 * BEAT:
            time.sleep(BEAT / 10)
        return self._moved is not None and time.monotonic() - self._moved < TIMEOUT


class Trainers:
    """The evaluations of a trainer, which leaves them to a follower while one lives.

    Args:
        evaluations: the run's.
        watch: for a follower.
        like: abstract parameters, as `checkpoint.abstract`, to read what is left at the end.
    """

    def __init__(self, evaluations: Evaluations, watch: Watch, like: Parameters):
        self._evaluations, self._watch, self._like = evaluations, watch, like

    def evaluate(self, models: Mapping[str, Parameters], step: int) -> None:
        """Evaluates the state after a step, unless that is done, or a follower's to do.

        Raises:
            Stopped: as `Evaluations.evaluate`.
        """
        done = jax.process_index() == 0 and self._evaluations.is_complete(Job(step))
        if distributed.of_first(np.asarray(done)):
            return
        if self._watch.is_alive():
            say(f"step {step}: saved, and left to the follower to evaluate")
            return
        self._evaluations.evaluate(models, Job(step), saved=False)

    def finish(self) -> bool:
        """Evaluates what is left once training is over, and prints the summary.

        Returns:
            False when it was stopped before.
        """
        if not self._watch.is_alive():
            return self._evaluations.finish(_reader(self._evaluations.workdir, self._like))
        if jax.process_index() == 0:
            left = ", ".join(map(str, self._evaluations.waiting())) or "none"
            say(
                f"training is complete; checkpoints left to the follower: {left}. It prints the "
                "summary; should it end before, this command or --config.mode=follow goes on"
            )
        return True


def _reader(workdir: files.Path, like: Parameters) -> Load:
    """Returns what reads the parameters of a step's checkpoint, and their average if it has one."""

    def read(step: int) -> Mapping[str, Parameters]:
        source = str(workdir / checkpoint.DIRECTORY / str(step))
        params = checkpoint.load_parameters(source, like)[1]
        return averaging.models(params, averaging.load(source, like))

    return read


# ----------------------------------------------------------------------------------- the follower


def config_of_run(
    config: dict[str, Any], workdir: files.Path, explicit: Collection[str]
) -> dict[str, Any]:
    """Waits until a run has its first checkpoint; returns the config to follow it with.

    Raises:
        UserError: an explicit key contradicts the run, or asks for another split than its own.
    """
    said = False
    while not ((workdir / recorded.RECORDED).exists() and checkpoint.complete_steps(workdir)):
        if not said:
            print(f"waiting for a run with a checkpoint in {workdir}", flush=True)
        said = True
        time.sleep(POLL)
    # The command is that of the training, with the mode added: weights to begin with mean nothing.
    config = resume.as_trained({**config, "init_from": ""}, workdir, explicit)
    if other := results.subset(config, workdir):
        raise UserError(
            f"config.mode = 'follow' evaluates the run in {workdir} on its own evaluation split, "
            f"and the config asks for {other!r}. Leave config.data.eval_split and the data set as "
            "they are in its config.json; other splits are for config.mode = 'evaluate'"
        )
    run = recorded.read(workdir / recorded.RECORDED)
    return {**config, "optimizer": run.get("optimizer", config["optimizer"])}


def follow(
    config: dict[str, Any], workdir: files.Path, mesh: jax.sharding.Mesh, given: Writer | None
) -> bool:
    """Evaluates the checkpoints of a run until the last one is evaluated.

    Args:
        config: of `config_of_run`.
        workdir: the run's directory.
        mesh: devices.
        given: takes scalars in place of the follower's own files.

    Returns:
        True when all is evaluated, False when a signal came before.

    Raises:
        UserError: the run has not recorded which checkpoints are due, or cannot be evaluated.
    """
    plan = Plan.of({**config, "profile": ""}, 1).again(recorded.plan(workdir))
    splits = open_splits(config)
    data, test = splits.evaluation(), splits.test()
    if other := results.subset(config, workdir, data.digest):
        raise UserError(
            f"config.data.dir = {config['data']['dir']!r} has other data than the run in {workdir} "
            f"was evaluated on ({other}): expected those, by their digest in its config.json"
        )
    model = configuration.model_config(config)
    rates = configuration.optimizer_config(config, plan.total_steps)
    structure, state = train.abstract_state(model, rates, mesh)
    read = _reader(workdir, {**state.trained, **state.frozen})
    if jax.process_index() == 0:
        (workdir / SCALARS).mkdir(parents=True, exist_ok=True)
    with splits, contextlib.ExitStack() as closing:
        writer = closing.enter_context(progress.writing(workdir / SCALARS, None, given))
        closing.enter_context(distributed.exit_if_peer_lost())
        stop = closing.enter_context(stopping.StopRequest(mesh))
        evaluations = Evaluations(
            workdir,
            plan,
            evaluator=evaluate.Evaluator.of(config, structure, mesh),
            data=data,
            test=test,
            writer=writer,
            stop=stop,
        )
        say(f"following the run in {workdir}: the latest checkpoint that is due comes first")
        cached = False
        try:
            while True:
                stop.heed()
                # A trainer that starts again may have another plan.
                evaluations.plan = plan.again(recorded.plan(workdir))
                job = evaluations.next()
                if job is None and evaluations.is_over():
                    return evaluations.finish(read)
                if job is None:
                    time.sleep(POLL)
                    continue
                models = _models(workdir, job, read)
                if models is None:
                    time.sleep(POLL)
                    continue
                if not cached:  # of any checkpoint: what a cache stands for does not train
                    for params in models.values():
                        splits.use_cache(params, rates, mesh)
                    cached = True
                evaluations.evaluate(models, job)
                del models  # before the next ones are read
        except stopping.Stopped:
            name = stop.signal.name if stop.signal else "a signal to another process"
            say(f"{name}: stopped following; the same command goes on")
            return False


def _models(workdir: files.Path, job: Job, read: Load) -> Mapping[str, Parameters] | None:
    """Returns what a checkpoint has to evaluate; None where the trainer has just dropped it."""
    try:
        return read(job.step)
    except UserError:
        if job.step in checkpoint.complete_steps(workdir):
            raise
        say(f"checkpoint {job.step} is skipped: the trainer has dropped it")
        return None
