"""Checkpoints: written asynchronously by orbax, kept by retention, read by name and shape.

A checkpoint holds the step, the trained parameters and the optimiser's state, each under its flat
name, and the digest of the frozen parameters, which the run has once (`save_jax.frozen`); those of
earlier versions hold these too. A directory appears under its final name only once it is complete,
so an interrupted write is never restored.
"""

import contextlib
import functools
import logging
import os
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.typing import ArrayLike

from save_jax import checkpoint_errors, files, frozen, results, retention
from save_jax.errors import UserError
from save_jax.parameters import Parameters
from save_jax.train_state import FROZEN, PARAMETERS, TrainState, from_tree, to_tree

DIRECTORY = results.CHECKPOINTS  # within a workdir
COMMITTED = frozen.COMMITTED


class Checkpoints:
    """The checkpoints of one workdir.

    Args:
        workdir: the run's directory.
        kept: decides with each one written which of them stay; by default the latest two and the
            best.
    """

    def __init__(self, workdir: str | os.PathLike, kept: retention.Retention | None = None):
        self.workdir = files.path(workdir)
        self._directory = self.workdir / DIRECTORY
        self._digest = ""  # of the frozen parameters, which stay the same
        check = functools.partial(files.check, self._directory)
        check()  # what others have begun to write is removed there
        self._manager = ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=kept or retention.Retention(self.workdir),
                cleanup_tmp_directories=True,
                async_options=ocp.AsyncOptions(post_finalization_callback=check),  # before commit
            ),
        )

    def latest_step(self) -> int | None:
        """Returns the last complete checkpoint's step, or None."""
        return self._manager.latest_step()

    def save(self, state: TrainState, step: int) -> None:
        """Starts writing; returns once the arrays are copied, so the caller may donate them."""
        files.check(self._directory)
        with checkpoint_errors.writing(self.workdir):
            # First: a checkpoint is none without them.
            if state.frozen:
                # Of this start, it is known to be sound once it was read or written.
                sound = functools.partial(_is_sound, like=state.frozen)
                known = {} if self._digest else {"is_sound": sound}
                self._digest = frozen.write(self.workdir, state.frozen, self._digest, **known)
        with checkpoint_errors.writing(self._directory):
            self._manager.save(
                step,
                args=ocp.args.StandardSave(to_tree(state, self._digest)),
                force=True,
            )

    def restore(self, step: int, like: TrainState) -> TrainState:
        """Reads a checkpoint into the shapes and shardings of `like`, whose hyperparameters stay.

        Raises:
            UserError: it holds another architecture, or cannot be read.
        """
        where = self._directory / str(step)
        found = _metadata(where)
        stored = _stored(where, found)
        checkpoint_errors.check_shapes(_joined(stored), {**like.trained, **like.frozen}, str(where))
        abstract = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding),
            to_tree(like, _digest(found)),
        )
        try:
            tree: Any = self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise checkpoint_errors.unreadable(where, error) from error
        for beside in list(stored)[1:]:
            tree[PARAMETERS] |= _restore_frozen(beside, like.frozen, stored[beside])
            self._digest = beside.name
        return from_tree(tree, like)

    def wait(self) -> None:
        """Returns once every started write is complete."""
        with checkpoint_errors.writing(self._directory):
            self._manager.wait_until_finished()

    def close(self) -> None:
        with checkpoint_errors.writing(self._directory):
            self._manager.close()


def is_ours(path: str | os.PathLike) -> bool:
    """Says whether a path is a run's directory, or one complete checkpoint of it."""
    path = files.path(path)
    return _is_one(path) or any(
        child.name.isdigit() and is_complete(child)
        for parent in (path, path / DIRECTORY)
        for child in parent.glob("*")
    )


def abstract(params: Parameters, names: Iterable[str] | None = None) -> Parameters:
    """Returns shapes, dtypes and shardings of parameters, or some, to read others of their kind."""
    return {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
        for name, x in ((name, params[name]) for name in (params if names is None else names))
    }


def complete_steps(workdir: files.Path) -> list[int]:
    """Returns the steps of a workdir's complete checkpoints, in order."""
    found = (workdir / DIRECTORY).glob("*")
    return sorted(int(path.name) for path in found if path.name.isdigit() and is_complete(path))


def is_complete(checkpoint: files.Path) -> bool:
    """Says whether orbax has written all of a STEP directory, if there is one of that name.

    On a disk, and in s3://, it has that name only then; in gs:// it holds a file that says so.
    """
    return not os.fspath(checkpoint).startswith("gs://") or (checkpoint / COMMITTED).exists()


def _is_one(path: files.Path) -> bool:
    return (path / "default").is_dir() and is_complete(path)


def find(path: str | os.PathLike) -> files.Path:
    """Returns the checkpoint that a path means: itself, or the latest of a workdir.

    Raises:
        UserError: there is none, naming what was looked for.
    """
    path = files.path(path)
    unfinished = [path] if (path / "default").is_dir() else []
    for parent in (path / DIRECTORY, path):
        steps = [int(p.name) for p in parent.glob("*") if p.name.isdigit() and p.is_dir()]
        for step in sorted(steps, reverse=True):
            if is_complete(parent / str(step)):
                return parent / str(step)
            unfinished.append(parent / str(step))
    if _is_one(path):
        return path
    if unfinished:
        raise UserError(
            f"no complete checkpoint at {path}: {unfinished[0]} lacks {COMMITTED}, with which "
            "writing one to gs:// ends. It was interrupted; or, if it was copied from a disk, read "
            "it there."
        )
    raise UserError(
        f"no checkpoint at {path}: expected a workdir with {DIRECTORY}/STEP/ in it, or one such "
        "STEP directory" + ("" if path.exists() else " (the path does not exist)")
    )


def workdir_of(path: str | os.PathLike) -> files.Path:
    """Returns the run's directory for a path to a run or to a checkpoint (see `find`).

    Raises:
        UserError: as `find`.
    """
    parent = find(path).parent
    return parent.parent if parent.name == DIRECTORY else parent


def _metadata(checkpoint: files.Path) -> Mapping[str, Any]:
    """Reads names, shapes and dtypes of a checkpoint's arrays.

    Raises:
        UserError: the directory is not a checkpoint of ours.
    """
    # A Checkpointer would also look for metadata of a whole step, and warn that there is none.
    with contextlib.closing(ocp.StandardCheckpointHandler()) as handler:
        try:
            return handler.metadata(epath.Path(checkpoint) / "default").tree
        except (OSError, ValueError, KeyError, TypeError) as error:
            if checkpoint_errors.is_failing(error) or isinstance(error, PermissionError):
                raise checkpoint_errors.unreadable(checkpoint, error) from error
            raise UserError(
                f"{checkpoint} is not a complete checkpoint: its list of arrays is absent or "
                f"damaged ({checkpoint_errors.short(error)})"
            ) from error


def _digest(metadata: Mapping[str, Any]) -> str:
    """Returns the digest of the frozen parameters that a checkpoint needs; "" for none."""
    return next(iter(metadata.get(FROZEN, {})), "")


def _stored(
    checkpoint: files.Path, metadata: Mapping[str, Any]
) -> dict[files.Path, Mapping[str, Any]]:
    """Returns which parameters lie where: in the checkpoint and, perhaps, in its run's directory.

    Raises:
        UserError: the frozen ones are not there.
    """
    stored = {checkpoint: metadata.get(PARAMETERS, {})}
    if digest := _digest(metadata):
        beside = frozen.find(checkpoint, digest)
        stored[beside] = _metadata(beside)[PARAMETERS]
    return stored


def _joined(stored: Mapping[files.Path, Mapping[str, Any]]) -> dict[str, Any]:
    return {name: value for held in stored.values() for name, value in held.items()}


def load_parameters(
    path: str | os.PathLike, like: Parameters, part: str = PARAMETERS
) -> tuple[int, Parameters]:
    """Reads the step and the parameters of a checkpoint, without its optimiser state.

    Args:
        path: a workdir or a checkpoint in it.
        like: arrays (or abstract ones with shardings) of the expected names and shapes.
        part: PARAMETERS or AVERAGE.

    Raises:
        UserError: no checkpoint there, one of another architecture, or a damaged one.
    """
    checkpoint = find(path)
    metadata = _metadata(checkpoint)
    stored = _stored(checkpoint, metadata) if part == PARAMETERS else {checkpoint: metadata[part]}
    checkpoint_errors.check_shapes(_joined(stored), like, str(checkpoint))
    step, found = 0, Parameters()
    for where, names in stored.items():
        if where != checkpoint:
            found |= _restore_frozen(where, like, names)
            continue
        wanted: dict[str, Any] = {part: abstract(like, names)} if names else {}
        wanted["step"] = jax.ShapeDtypeStruct((), "int32")
        tree = _restore_placed(where, wanted)
        step = int(tree["step"])
        found |= tree.get(part, {})
    logging.info("read %s", checkpoint)
    return step, {name: found[name] for name in like}


def parameter_shapes(
    path: str | os.PathLike, part: str = PARAMETERS
) -> dict[str, jax.ShapeDtypeStruct]:
    """Reads names, shapes and dtypes of a checkpoint's parameters, of whatever model.

    Args:
        path: a workdir or a checkpoint in it.
        part: PARAMETERS or AVERAGE, which few have.

    Raises:
        UserError: no complete checkpoint there.
    """
    checkpoint = find(path)
    found = _metadata(checkpoint)
    found = _joined(_stored(checkpoint, found)) if part == PARAMETERS else found.get(part, {})
    return {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in found.items()}


def read_parameters(
    path: str | os.PathLike, like: Mapping[str, jax.Array | jax.ShapeDtypeStruct]
) -> dict[str, np.ndarray]:
    """Reads parameters of a checkpoint into host memory, whatever devices it was written on.

    Args:
        path: a workdir or a checkpoint in it.
        like: abstract arrays of the wanted names and shapes; see `parameter_shapes`.

    Raises:
        UserError: no checkpoint there, or its arrays are damaged.
    """
    checkpoint = find(path)
    found: dict[str, np.ndarray] = {}
    for where, names in _stored(checkpoint, _metadata(checkpoint)).items():
        wanted = {PARAMETERS: {name: like[name] for name in names if name in like}}
        if wanted[PARAMETERS]:
            restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
            found |= _restore(where, wanted, restore_args)[PARAMETERS]
    return found


def _restore_placed(checkpoint: files.Path, wanted: Mapping[str, Any]) -> Any:
    """Restores the wanted arrays of a checkpoint, each where the abstract one is."""
    return _restore(checkpoint, wanted, ocp.checkpoint_utils.construct_restore_args(wanted))


def _restore_frozen(beside: files.Path, like: Parameters, names: Iterable[str]) -> Parameters:
    """Restores a run's frozen parameters, each where the abstract one is.

    Raises:
        UserError: they cannot be read, or are not those that the directory's name stands for.
    """
    found = _restore_placed(beside, {PARAMETERS: abstract(like, names)})[PARAMETERS]
    if frozen.digest(found) != beside.name:
        raise checkpoint_errors.unreadable(beside, ValueError("its arrays have another digest"))
    return found


def _is_sound(beside: files.Path, like: Parameters) -> bool:
    """Says whether a run's frozen parameters can be read, and are those of their digest."""
    try:
        _restore_frozen(beside, like, like)
    except UserError:
        return False
    return True


def _restore(checkpoint: files.Path, wanted: Mapping[str, Any], restore_args: Any) -> Any:
    """Restores the wanted arrays of a checkpoint, each as its argument says.

    Raises:
        UserError: its arrays cannot be read.
    """
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            return checkpointer.restore(
                checkpoint / "default",
                args=ocp.args.PyTreeRestore(
                    wanted, partial_restore=True, restore_args=restore_args
                ),
            )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise checkpoint_errors.unreadable(checkpoint, error) from error


def write_parameters(
    workdir: str | os.PathLike, parameters: Mapping[str, ArrayLike], step: int = 0
) -> None:
    """Writes a checkpoint of parameters alone, for `read_parameters` and `load_parameters`."""
    with checkpoint_errors.writing(files.path(workdir)), ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(
            files.path(workdir) / DIRECTORY / str(step) / "default",
            {"step": np.int32(step), "parameters": dict(parameters)},
        )
        checkpointer.wait_until_finished()
