"""What computes a run or an evaluation: the code's revision, versions, devices."""

import functools
import importlib.metadata
import pathlib
import platform
import subprocess
from typing import Any

import jax

import save_jax

_ROOT = pathlib.Path(save_jax.__file__).parent.parent
# What decides results; launchers and tests do not.
_CODE = ("save_jax", "data_pipelines", "configs", "setup.py")
_PACKAGES = ("jax", "jaxlib", "flax", "optax")
_WITHIN = 30  # seconds for git, on a slow network file system


def environment() -> dict[str, Any]:
    """Describes the code and the devices of all processes, in a form that is written as JSON."""
    devices = jax.devices()
    return {
        "git": revision(),
        "versions": {
            "python": platform.python_version(),
            "save_jax": save_jax.__version__,
            **{name: importlib.metadata.version(name) for name in _PACKAGES},
        },
        "devices": {
            "platform": devices[0].platform,
            "kinds": sorted({device.device_kind for device in devices}),
            "count": len(devices),
            "processes": jax.process_count(),
        },
    }


@functools.cache
def revision(root: pathlib.Path = _ROOT) -> str | None:
    """Returns the git revision of the code, with "-dirty" where files differ from it.

    Args:
        root: the folder that holds the package save_jax.

    Returns:
        None where the code is in no clone of its repository, or git cannot tell.
    """
    # An installed package may lie inside a clone of something else: its revision says nothing.
    if _git(root, "ls-files", "--error-unmatch", "save_jax/__init__.py") is None:
        return None
    commit = _git(root, "rev-parse", "HEAD")
    changes = _git(root, "status", "--porcelain", "--", *_CODE)
    if commit is None or changes is None:
        return None
    return f"{commit}-dirty" if changes else commit


def _git(root: pathlib.Path, *arguments: str) -> str | None:
    """Returns what a git command prints; None where it fails, or there is no git."""
    # Without locks: `status` would refresh the index, which other processes may be writing.
    command = ["git", "--no-optional-locks", "-C", str(root), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_WITHIN, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
