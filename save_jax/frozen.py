"""Frozen parameters: written once a run, beside its checkpoints, which say which ones they need.

They lie in a directory that is named by a digest of what it holds. So one that an earlier start of
the run has written is used again, and a checkpoint never gets those of another run.
"""

import functools
import hashlib
import json
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax import lax
from jax.experimental import multihost_utils

from save_jax import files, sharding
from save_jax.errors import UserError
from save_jax.parameters import Parameters

DIRECTORY = "frozen"  # within a workdir
COMMITTED = "commit_success.txt"  # orbax's name for what is written last, in gs://
_MULTIPLIERS = (0x9E3779B1, 0x85EBCA77)  # odd, so that no bit of what is mixed is lost


def digest(params: Parameters) -> str:
    """Returns a digest of names, shapes, dtypes and values, the same on every mesh.

    Each device sums what it holds, as integers modulo 2^32, so that neither the order nor the
    slices count and nothing is gathered.

    Args:
        params: global arrays on one mesh, at least one.
    """
    sums = _checksums(sharding.replicated(sharding.mesh_of(next(iter(params.values())))))
    found = jax.device_get(sums(dict(params)))
    facts = [
        (name, params[name].shape, str(params[name].dtype), found[name].tolist())
        for name in sorted(params)
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


@functools.cache  # else it would be compiled again for each checkpoint
def _checksums(everywhere: jax.sharding.NamedSharding) -> jax.stages.Wrapped:
    return jax.jit(lambda arrays: jax.tree.map(_checksum, arrays), out_shardings=everywhere)


def _checksum(x: jax.Array) -> jax.Array:
    """Returns sums over all elements of their bits mixed with their places, uint32 [2]."""
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    bits = lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        place = place * jnp.uint32(size) + lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    sums = []
    for multiplier in _MULTIPLIERS:
        mixed = (bits ^ (place * jnp.uint32(multiplier))) * jnp.uint32(multiplier)
        mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(0xC2B2AE3D)
        sums.append(jnp.sum(mixed ^ (mixed >> 13), dtype=jnp.uint32))
    return jnp.stack(sums)


def write(
    workdir: files.Path,
    params: Parameters,
    name: str = "",
    is_sound: Callable[[files.Path], bool] = lambda folder: True,
) -> str:
    """Writes frozen parameters into a run's directory, if they are not there; returns their digest.

    All processes call it together. It returns once all is written: a directory has its name only
    then, and in gs:// a file that says so. What an interrupted start has left is removed.

    Args:
        workdir: the run's directory.
        params: as in `digest`.
        name: their digest, where it is known.
        is_sound: asked of what an earlier start has left under that name; else it is written anew.
    """
    name = name or digest(params)
    folder = workdir / DIRECTORY / name
    there = is_complete(folder) and is_sound(folder)
    if jax.process_count() > 1:  # a network's disk may show them different things
        there = bool(multihost_utils.broadcast_one_to_all(np.asarray(there)))
    if not there:
        if jax.process_index() == 0:
            epath.Path(folder).rmtree(missing_ok=True)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"frozen {name}")
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(epath.Path(folder) / "default", {"parameters": dict(params)})
            checkpointer.wait_until_finished()
    return name


def find(checkpoint: files.Path, name: str) -> files.Path:
    """Returns the directory of a checkpoint's frozen parameters: in its run, or beside it.

    Args:
        checkpoint: a STEP directory.
        name: the digest that it needs.

    Raises:
        UserError: it is not there, or not complete.
    """
    near = [parent / DIRECTORY / name for parent in (checkpoint.parent.parent, checkpoint.parent)]
    for folder in near:
        if is_complete(folder):
            return folder
    raise UserError(
        f"{checkpoint} lacks its frozen parameters, which a run has once for all its checkpoints: "
        f"expected {near[0]}, or {near[1]}. Copy this directory too, from the run that the "
        "checkpoint is of; or give the run"
    )


def is_complete(folder: files.Path) -> bool:
    """Says whether all of a run's frozen parameters are written, if that is their directory."""
    held = folder / "default"
    return held.is_dir() and (not str(held).startswith("gs://") or (held / COMMITTED).exists())
