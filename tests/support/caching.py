"""A tiny experiment with frozen encoders, on the miniature MSR-VTT: for tests/test_cache.py.

As a program, `python -m tests.support.caching DATA OUT SHARDS SIGNAL` writes a cache of it, in
shards of few rows, and sends itself a signal when SHARDS are written, and the next one half.
"""

import functools
import os
import pathlib
import signal
import sys
from typing import Any

import numpy as np

from configs import demo
from save_jax import files
from save_jax.cache import __main__ as command
from save_jax.cache import shards, writing
from save_jax.errors import exit_codes

# The demo's config with these is the experiment, from Python and from the command line.
CHANGES = {
    "data.dataset": "msrvtt",
    "data.variant": "9k",
    "data.max_words": 12,
    "model.clip.embed_dim": 16,
    "model.clip.image_size": 32,
    "model.clip.patch_size": 16,
    "model.clip.vision_width": 16,
    "model.clip.vision_heads": 2,
    "model.clip.text_width": 16,
    "model.clip.text_heads": 2,
    "model.clip.vision_layers": 1,
    "model.clip.text_layers": 1,
    "model.ast.fbank_frames": 64,
    "model.ast.width": 16,
    "model.ast.heads": 2,
    "model.ast.layers": 1,
    "model.fusion_layers": 1,
    "model.audio_queries": 4,
    "optimizer.clip": 0.0,
    "optimizer.clip_stem": 0.0,
    "optimizer.ast": 0.0,
    "batch_size": 8,
    "eval_batch_size": 8,
    "steps": 5,
}


def config(data: pathlib.Path, **changes: Any) -> dict[str, Any]:
    """The experiment, with changes whose names have two underscores for a dot."""
    found = demo.get_config()
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    found.update_from_flattened_dict(CHANGES | {"data.dir": str(data)} | changes)
    return found.to_dict()


def arrays(directory: pathlib.Path) -> dict[str, np.ndarray]:
    """What a split's cache holds, read without its code."""
    return {
        folder.name: np.concatenate([np.load(path) for path in sorted(folder.glob("*.npy"))])
        for folder in directory.iterdir()
        if folder.is_dir()
    }


def main(data: str, out: str, written: str, name: str = "SIGKILL") -> int:
    shards.CLIPS, shards.CAPTIONS = 2, 16
    writing._WRITERS = 1  # one after the other
    write, left = files.write, int(written)

    def dying(path: files.Path, content: Any, **options: Any) -> None:
        nonlocal left
        if path.suffix == ".npy":
            left -= 1
        if left == -1:
            with files.appearing(path) as temporary:
                temporary.write_bytes(content[: len(content) // 2])
                os.kill(os.getpid(), signal.Signals[name])
                temporary.write_bytes(content)
            return
        write(path, content, **options)

    files.write = dying
    values = config(pathlib.Path(data), eval_batch_size=2)
    run = functools.partial(command.run, values, out, dtype="float32")
    return exit_codes(lambda: run() or 0)()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
