"""What a run's directory says about it: its config, its last evaluation, how far it has come."""

import json
import os
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from etils import epath

from save_jax import files, locks
from save_jax.errors import UserError
from save_jax.recorded import flatten

EXIT_FILE = "exit.json"  # {"code": of save_jax.main}, left by whoever launched the run
LOCK_FILE = "launch.lock"  # locked by a run that was launched here, for as long as it lives
QUIET_AFTER = 15 * 60  # seconds without a line, after which a run counts as stopped
# Of an evaluation's protocol: what has to be equal for two results to be answers to one question.
QUESTION = ("data.dataset", "data.variant", "split", "captions", "videos", "videos_with_captions")
QUESTION += ("ties", "v2t", "dtype")
SHOWN = 3  # names of runs in a warning


class Run(NamedTuple):
    """A run, as found on disk.

    Attributes:
        workdir: its directory.
        config: what it was started with; empty if that is not there (yet).
        evaluation: metrics.json of its last evaluation; None before the first.
        step: updates done, by the last line or evaluation.
        fraction: of its steps that are done, 0 to 1.
        state: "complete", "running", "failed", "stopped" (the same command goes on) or "waiting".
        problems: files that cannot be read, and why.
    """

    workdir: epath.Path
    config: dict[str, Any]
    evaluation: dict[str, Any] | None
    step: int
    fraction: float
    state: str
    problems: tuple[str, ...]


def read(workdir: epath.PathLike) -> Run:
    """Reads what there is; a file that is broken is named, and counts as absent.

    A run is complete when the last step of its schedule is evaluated and its checkpoint is
    written. Where all checkpoints were removed since, to save space, the evaluation suffices.
    """
    workdir = epath.Path(workdir)
    problems: list[str] = []
    config = _object(workdir / "config.json", problems)
    last = _last_line(workdir / "metrics.jsonl", problems)
    evaluated, evaluation = _last_evaluation(workdir, problems)
    step, fraction = int(last.get("step", 0)), 0.0
    total = _total_steps(config, last)
    if total:
        fraction = min(step / total, 1.0)
    if total and evaluated >= total and _checkpoint_kept(workdir, evaluated):
        state, fraction = "complete", 1.0
    else:
        state = _unfinished(workdir, problems)
    return Run(workdir, config, evaluation, max(step, evaluated), fraction, state, tuple(problems))


def find(directory: epath.PathLike) -> list[Run]:
    """Every run in or below a directory, and every point of its sweeps that was not started yet.

    Raises:
        UserError: there is no such directory, or no run below it.
    """
    directory = epath.Path(directory)
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory: expected one with runs below it")
    runs = [read(workdir) for workdir in _workdirs(directory)]
    if not runs:
        raise UserError(
            f"no run below {directory}: expected directories with config.json and metrics.jsonl, "
            "as `python -m save_jax.main --workdir=DIR` makes them, or a sweep's sweep.json"
        )
    return runs


def last_evaluation(workdir: epath.PathLike) -> dict[str, Any]:
    """The metrics of a run's last evaluation.

    Raises:
        UserError: the run has none, or it cannot be read.
    """
    problems: list[str] = []
    _, evaluation = _last_evaluation(epath.Path(workdir), problems)
    if evaluation is None:
        raise UserError(
            "; ".join(problems)
            or f"{workdir} holds no evaluation/STEP/metrics.json: train or evaluate there first"
        )
    return evaluation


def incomparable(evaluations: Mapping[str, Mapping[str, Any] | None]) -> list[str]:
    """In words: in what the protocols of evaluations differ that are shown side by side.

    Args:
        evaluations: metrics.json of each run, by the name that it is shown by; None without one.
            What a file does not say counts as equal.
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
    """Writes a file that is either whole or not there."""
    files.write(epath.Path(path), json.dumps(value, indent=2) + "\n")


def lock(workdir: epath.PathLike) -> int | None:
    """Takes a local run's lock; None when another process has it.

    A child process that inherits the descriptor keeps the lock, even when its parent dies.
    """
    return locks.lock(pathlib.Path(workdir) / LOCK_FILE)


def _workdirs(directory: epath.Path) -> Iterator[epath.Path]:
    """Directories of runs, without looking into those; names decide the order."""
    if any((directory / name).exists() for name in ("metrics.jsonl", "evaluation", EXIT_FILE)):
        yield directory
        return
    below = {path.name: path for path in directory.iterdir() if path.is_dir()}
    problems: list[str] = []
    for name in _object(directory / "sweep.json", problems).get("points", {}):
        path = below.pop(name, directory / name)
        found = list(_workdirs(path)) if path.is_dir() else []
        yield from found or [path]  # a point without results is a run that waits
    for name in sorted(below):
        if not name.startswith("."):
            yield from _workdirs(below[name])


def _object(path: epath.Path, problems: list[str]) -> dict[str, Any]:
    """A JSON object, or {} when there is none to be read."""
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
    """The last training line of metrics.jsonl; lines cut off while being written do not count."""
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
    """Step and metrics of the last evaluation that can be read; (0, None) without one."""
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
    """Length of the schedule; 0 if it is not known yet."""
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


def _unfinished(workdir: epath.Path, problems: list[str]) -> str:
    if not workdir.is_dir():
        return "waiting"
    code = _object(workdir / EXIT_FILE, problems).get("code")
    if code is not None:
        return "stopped" if code in (0, os.EX_TEMPFAIL) else "failed"
    changed = [
        (workdir / name).stat().mtime
        for name in ("metrics.jsonl", "log.txt", "config.json")
        if (workdir / name).exists()
    ]
    if not changed:
        return "waiting"
    return "running" if time.time() - max(changed) < QUIET_AFTER else "stopped"
