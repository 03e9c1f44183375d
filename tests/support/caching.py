"""A tiny experiment with frozen encoders, on the miniature MSR-VTT: for tests/test_cache.py.

As a program, `python -m tests.support.caching DATA OUT SAVES` writes a cache of it and kills itself
with SIGKILL when it is about to note, for the SAVES-th time, how far it has come.
"""

import os
import pathlib
import signal
import sys
from typing import Any

from configs import demo
from save_jax.cache import __main__ as command
from save_jax.cache import writing

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


def main(data: str, out: str, saves: str) -> None:
    save, left = writing._Files.save, int(saves)
    writing.SAVED_EVERY = -1.0

    def dying(*arguments, **options) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        save(*arguments, **options)

    writing._Files.save = dying
    command.run(config(pathlib.Path(data), eval_batch_size=2), out, dtype="float32")


if __name__ == "__main__":
    main(*sys.argv[1:])
