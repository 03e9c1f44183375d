"""The points of a sweep: the overrides that a config's sweep() yields, checked and named."""

import hashlib
import importlib.util
import inspect
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from launch.report import runs
from save_jax import config as configuration
from save_jax import config_files
from save_jax.errors import UserError
from save_jax.messages import counted

LONGEST_NAME = 100  # characters; file systems stop at 255, terminals earlier


class Sweep(NamedTuple):
    """A sweep's points and what they have in common.

    Attributes:
        config: the config file, with its variant: configs/msrvtt.py:7k.
        workdir: the directory that holds the points' directories.
        base: command-line overrides of every point: ("--config.steps=5", ...).
        points: name -> overrides.
    """

    config: str
    workdir: str
    base: tuple[str, ...]
    points: dict[str, dict[str, Any]]

    def arguments(self, name: str) -> list[str]:
        """Returns the arguments of `save_jax.main` for a point."""
        return [
            f"--config={self.config}",
            f"--workdir={self.workdir.rstrip('/')}/{name}",
            *self.base,
            *(_argument(key, value) for key, value in self.points[name].items()),
        ]


def load(config: str, workdir: str, base: Sequence[str]) -> Sweep:
    """Reads the points of a config's sweep and checks each as a run would.

    Raises:
        UserError: the config defines no sweep, or a point does not fit the config.
    """
    swept = {argument.split("=")[0].removeprefix("--config.") for argument in base}
    points: dict[str, dict[str, Any]] = {}
    resolve(config, base)
    for number, overrides in enumerate(_overrides(config), 1):
        where = f"point {number} of sweep() in {config}"
        if not isinstance(overrides, Mapping) or not all(isinstance(k, str) for k in overrides):
            raise UserError(
                f'{where} is {overrides!r}: expected a dictionary such as {{"optimizer.new": 3e-4}}'
            )
        if both := sorted(swept & set(overrides)):
            raise UserError(
                f"{where} sets {both[0]}, which the command line sets too: remove one of them"
            )
        arguments = [_argument(key, value) for key, value in overrides.items()]
        try:
            resolved = resolve(config, [*base, *arguments])
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        # The config's own types name the point: 1 and 1.0 are one learning rate.
        point = {key: _get(resolved, key) for key in overrides}
        for key, value in overrides.items():
            if point[key] != value:
                raise UserError(
                    f"{where}: {key} = {value!r} would be read as {point[key]!r}: expected a value "
                    "of the type that the config has there"
                )
        name = point_name(point)
        if name in points:
            raise UserError(f"{where} is there twice: {point}. Expected different points")
        points[name] = point
    if not points:
        raise UserError(f"sweep() in {config} yields no points: expected at least one dictionary")
    return Sweep(config, workdir, tuple(base), points)


def resolve(config: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Reads a config with command-line overrides and checks all that needs no data.

    Raises:
        UserError: the file, a key or a value is wrong.
    """
    resolved = config_files.read(config, overrides)
    configuration.check(resolved, devices=())  # another machine's devices may run it
    return resolved


def point_name(overrides: Mapping[str, Any]) -> str:
    """Returns a directory's name made from overrides, such as "optimizer.new-0.0003__seed-1".

    Characters that are special to a file system or a shell are replaced, and a long name is cut; a
    hash of the overrides is then added to keep names distinct.
    """
    exact = "__".join(f"{key}-{value}" for key, value in overrides.items()) or "base"
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", exact)
    if readable == exact and len(exact) <= LONGEST_NAME:
        return exact
    digest = hashlib.sha256(exact.encode()).hexdigest()[:8]
    return f"{readable[: LONGEST_NAME - 9].rstrip('-._')}-{digest}"


def record(sweep: Sweep) -> None:
    """Writes sweep.json, keeping the points that it already has.

    Raises:
        UserError: it belongs to another sweep, or cannot be read.
    """
    path = epath.Path(sweep.workdir) / "sweep.json"
    points = {}
    if path.exists():
        try:
            old = json.loads(path.read_text())
            was, points = {"config": old["config"], "base": old["base"]}, old["points"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} cannot be read ({error!r}): restore or delete it, or use another --workdir"
            ) from error
        now = {"config": sweep.config, "base": list(sweep.base)}
        if was != now:
            raise UserError(
                f"{sweep.workdir} holds another sweep: expected {was}, found {now}. Use another "
                "--workdir, or the config and flags with which that sweep was started"
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    runs.write_json(
        path,
        {
            "config": sweep.config,
            "base": list(sweep.base),
            "points": {**points, **sweep.points},
        },
    )


def missing(sweep: Sweep) -> list[str]:
    """Returns the names of the points that are not complete, in the sweep's order."""
    workdir = epath.Path(sweep.workdir)
    return [name for name in sweep.points if runs.read(workdir / name).state != "complete"]


def _overrides(config: str) -> list[Any]:
    """Returns the dictionaries that the config file's sweep() yields."""
    path = config.split(":")[0]
    spec = importlib.util.spec_from_file_location("swept_config", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is not a Python file: expected a config file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sweep = getattr(module, "sweep", None)
    if not callable(sweep) or inspect.signature(sweep).parameters:
        raise UserError(
            f"{path} defines no sweep(): expected a function without arguments that yields one "
            'dictionary of overrides per point, such as {"optimizer.new": 3e-4, "seed": 1}'
        )
    return list(sweep())


def _argument(key: str, value: Any) -> str:
    return f"--config.{key}={value}"


def _get(config: Mapping[str, Any], key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value[part]
    return value


def headline(sweep: Sweep, names: Sequence[str], how: str) -> str:
    """Formats one line: the number of points, how many are complete, and how the others run."""
    complete = len(sweep.points) - len(names)
    return (
        f"{sweep.config}: {counted(len(sweep.points), 'point')} in {sweep.workdir}, {complete} "
        f"complete; {len(names)} to run, {how}"
    )
