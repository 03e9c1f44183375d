"""Reads a run's directory: its config, its last evaluation, its progress and its state."""

import contextlib
import json
import os
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from etils import epath

from save_jax import files, locks, processes
from save_jax.errors import UserError
from save_jax.progress import duration
from save_jax.recorded import EXIT_FILE, flatten, without_provenance

LOCK_FILE = "launch.lock"  # locked by a run of a local sweep for as long as its process lives
# Where nobody can tell whether a run's process lives: seconds without a line, after which the run
# is assumed to have stopped.
QUIET_AFTER = 15 * 60
# The keys of an evaluation's protocol that must be equal for two results to be comparable.
QUESTION = ("data.dataset", "data.variant", "split", "captions", "videos", "videos_with_captions")
QUESTION += ("ties", "v2t", "dtype")
SHOWN = 3  # names of runs in a warning


class Run(NamedTuple):
    """A run, as found on disk.

    Attributes:
        workdir: its directory.
        config: the config in its config.json; empty if there is none (yet).
        evaluation: metrics.json of its last evaluation; None before the first.
        step: updates done, by the last line of metrics.jsonl or the last evaluation.
        fraction: the fraction of its steps that are done, 0 to 1.
        state: "complete", "running", "failed", "stopped" (the same command resumes) or "waiting".
        problems: files that cannot be read, and why.
        assumed: why the state is only assumed; empty if it is known.
    """

    workdir: epath.Path
    config: dict[str, Any]
    evaluation: dict[str, Any] | None
    step: int
    fraction: float
    state: str
    problems: tuple[str, ...]
    assumed: str = ""


def read(workdir: epath.PathLike) -> Run:
    """Reads a run's directory; a broken file is named in `problems` and counts as absent.

    A run is complete when the last step of its schedule is evaluated and its checkpoint is
    written. Where all checkpoints were removed later to save space, the evaluation suffices.
    """
    workdir = epath.Path(workdir)
    problems: list[str] = []
    config = without_provenance(_object(workdir / "config.json", problems))
    last = _last_line(workdir / "metrics.jsonl", problems)
    evaluated, evaluation = _last_evaluation(workdir, problems)
    step, fraction = int(last.get("step", 0)), 0.0
    total = _total_steps(config, last)
    if total:
        fraction = min(step / total, 1.0)
    if total and evaluated >= total and _checkpoint_kept(workdir, evaluated):
        state, fraction, assumed = "complete", 1.0, ""
    else:
        state, assumed = _unfinished(workdir, problems)
    step = max(step, evaluated)
    return Run(workdir, config, evaluation, step, fraction, state, tuple(problems), assumed)


def find(directory: epath.PathLike) -> list[Run]:
    """Finds every run in or below a directory, and the points of its sweeps not started yet.

    Raises:
        UserError: there is no such directory, or no run in or below it.
    """
    directory = epath.Path(directory)
    if not directory.is_dir():
        raise UserError(
            f"{directory} is not a directory: expected a run's --workdir, or a directory of runs"
        )
    runs = [read(workdir) for workdir in _workdirs(directory)]
    if not runs:
        raise UserError(
            f"no run in or below {directory}: expected directories with config.json and "
            "metrics.jsonl, as `python -m save_jax.main --workdir=DIR` writes them, or a sweep's "
            "sweep.json"
        )
    return runs


def last_evaluation(workdir: epath.PathLike) -> dict[str, Any]:
    """Returns the metrics of a run's last evaluation.

    Raises:
        UserError: there is no such run, it has no evaluation, or that cannot be read.
    """
    problems: list[str] = []
    workdir = epath.Path(workdir)
    _, evaluation = _last_evaluation(workdir, problems)
    if evaluation is None and not workdir.is_dir():
        raise UserError(
            f"{workdir} {'is not a directory' if workdir.exists() else 'does not exist'}: expected "
            "the --workdir of a run that has evaluated (python -m save_jax.main)"
        )
    if evaluation is None:
        raise UserError(
            "; ".join(problems)
            or f"{workdir} holds no evaluation/STEP/metrics.json: expected the --workdir of a run "
            "that has evaluated (python -m save_jax.main)"
        )
    return evaluation


def incomparable(evaluations: Mapping[str, Mapping[str, Any] | None]) -> list[str]:
    """Returns one sentence for each way in which the protocols of evaluations differ.

    Args:
        evaluations: the name under which each run is shown -> its metrics.json; None without one.
            A key that a file lacks counts as equal.
    """
    protocols = {
        name: flatten(evaluation.get("protocol", {}))
        for name, evaluation in evaluations.items()
        if evaluation
    }
    lines = []
    for key in QUESTION:
        names: dict[Any, list[str]] = {}
        for name, protocol in protocols.items():
            if key in protocol:
                names.setdefault(protocol[key], []).append(name)
        if len(names) > 1:
            found = (
                f"{value!r} in {', '.join(of[:SHOWN])}"
                + (f" and {len(of) - SHOWN} more" if len(of) > SHOWN else "")
                for value, of in names.items()
            )
            lines.append(f"these evaluations differ in protocol: {key} is {'; '.join(found)}")
    return lines


def write_json(path: epath.PathLike, value: Any) -> None:
    """Writes a JSON file atomically."""
    files.write(epath.Path(path), json.dumps(value, indent=2) + "\n")


def lock(workdir: epath.PathLike) -> int | None:
    """Takes a local run's lock and returns its descriptor; None when another process has it.

    A child process that inherits the descriptor keeps the lock, even when its parent dies.
    """
    return locks.lock(pathlib.Path(workdir) / LOCK_FILE)


def _workdirs(directory: epath.Path) -> Iterator[epath.Path]:
    """Yields the directories of runs, sorted by name, without looking inside them."""
    if any((directory / name).exists() for name in ("metrics.jsonl", "evaluation", EXIT_FILE)):
        yield directory
        return
    below = {path.name: path for path in directory.iterdir() if path.is_dir()}
    problems: list[str] = []
    for name in _object(directory / "sweep.json", problems).get("points", {}):
        path = below.pop(name, directory / name)
        found = list(_workdirs(path)) if path.is_dir() else []
        yield from found or [path]  # a point without results is a run in state "waiting"
    for name in sorted(below):
        if not name.startswith("."):
            yield from _workdirs(below[name])


def _object(path: epath.Path, problems: list[str]) -> dict[str, Any]:
    """Reads a JSON object; returns {} when there is none, or none that can be read."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        problems.append(f"{path} cannot be read ({error})")
        return {}
    if not isinstance(value, dict):
        problems.append(f"{path} is not a JSON object")
        return {}
    return value


def _last_line(path: epath.Path, problems: list[str]) -> dict[str, Any]:
    """Reads the last training line of metrics.jsonl, ignoring lines that were cut off."""
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        problems.append(f"{path} cannot be read ({error})")
        return {}
    for line in reversed(lines):
        try:
            values = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(values, dict) and "loss" in values and "step" in values:
            return values
    if lines and not any(line.startswith("{") for line in lines):
        problems.append(f"{path} has no line that is a JSON object")
    return {}


def _last_evaluation(workdir: epath.Path, problems: list[str]) -> tuple[int, dict[str, Any] | None]:
    """Returns step and metrics of the last evaluation that can be read; (0, None) without one."""
    folder = workdir / "evaluation"
    steps = [int(p.name) for p in folder.iterdir() if p.name.isdecimal()] if folder.is_dir() else []
    for step in sorted(steps, reverse=True):
        path = folder / str(step) / "metrics.json"
        metrics = _object(path, problems)
        if metrics and isinstance(metrics.get("t2v"), dict):
            return step, metrics
        if metrics:
            problems.append(f'{path} has no "t2v"')
    return 0, None


def _total_steps(config: dict[str, Any], last: dict[str, Any]) -> int:
    """Returns the number of steps of the schedule; 0 if it is not known yet."""
    if config.get("steps"):
        return int(config["steps"])
    if config.get("epochs") and last.get("epoch"):
        return round(config["epochs"] * last["step"] / last["epoch"])
    return 0


def _checkpoint_kept(workdir: epath.Path, step: int) -> bool:
    folder = workdir / "checkpoints"
    if not folder.exists():
        return True
    if not files.is_remote(folder):
        return (folder / str(step)).exists()
    from save_jax import checkpoint  # with JAX and orbax, which take seconds to import

    return (folder / str(step)).exists() and checkpoint.is_complete(folder / str(step))


def _unfinished(workdir: epath.Path, problems: list[str]) -> tuple[str, str]:
    """Returns the state of a run that is not complete, and why it is only assumed ("": known)."""
    if not workdir.is_dir():
        return "waiting", ""
    held, holder = _held(workdir)
    if held:
        return "running", ""
    code = _object(workdir / EXIT_FILE, problems).get("code")
    if code is not None:
        return "stopped" if code in (0, os.EX_TEMPFAIL) else "failed", ""
    changes = []
    for name in ("metrics.jsonl", "log.txt", "config.json", locks.LOCK):
        with contextlib.suppress(FileNotFoundError):
            changes.append((workdir / name).stat().mtime)
    if held is False:
        return "stopped" if changes else "waiting", ""
    changed = max(changes, default=0)
    cannot = f"{holder} cannot be checked from here, and "
    if not changed:
        return "running", f"{cannot}the store does not say when the run's files changed"
    quiet = max(time.time() - changed, 0)
    return (
        "running" if quiet < QUIET_AFTER else "stopped",
        f"{cannot}the run's files last changed {duration(quiet)} ago",
    )


def _held(workdir: epath.Path) -> tuple[bool | None, str]:
    """Returns whether a process holds a run's directory, None if that is unknown, and which one."""
    if not files.is_remote(workdir) and locks.is_locked(workdir / LOCK_FILE):
        return True, ""
    # A run has it from its first write to its end.
    try:
        found = locks.read(workdir / locks.LOCK)
    except OSError:  # no permission
        found = {"holder": "the process that holds it"}
    if not found:
        return False, ""
    return processes.is_alive(found), f"{found.get('holder')},"
