"""Prepares the miniature MSR-VTT and kills itself at a moment of it: for tests/…/test_resume.py.

`python -m tests.support.preparing ROOT OUT MOMENT…` does so for each moment in a process of its
own, into OUT/MOMENT, and prints "ended MOMENT" with the signal or the exit code that ended it.
Moments:

    shard      the third shard is written but does not have its name yet
    note       the third shard is there, but not its note
    index      before the last of the files that describe the records has its name
    rename     all is written, but the directory does not have its name yet
    clean      the directory has its name, and beside it are notes of no more use
"""

import os
import signal
import sys

# Here, once, instead of in each of the processes: PyTorch reads the miniature's vectors.
import torch  # noqa: F401

from data_pipelines import prepared
from data_pipelines.preparation import prepare
from data_pipelines.recipe import Recipe
from data_pipelines.storage import build, shards  # noqa: F401

RECIPE = Recipe(image_size=32, fbank_frames=64, max_frames=4)
CLIPS_PER_SHARD = 3


def run(root: str, out: str, **options):
    """Prepares in this process, in shards that are small enough for there to be some."""
    before = shards.CLIPS_PER_SHARD
    shards.CLIPS_PER_SHARD = CLIPS_PER_SHARD
    try:
        return prepare("msrvtt", root, out, recipe=RECIPE, workers=1, **options)
    finally:
        shards.CLIPS_PER_SHARD = before


def die(*_, **__) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(moment: str) -> None:
    """Arranges for SIGKILL at a moment."""
    third = "msrvtt-train.array_record-00002-of-00003"
    replaced = {"shard": third, "note": f"{third}.json", "index": "metadata.json"}
    if moment in replaced:
        replace = os.replace

        def dying(source, target):
            if os.path.basename(target) == replaced[moment]:
                die()
            replace(source, target)

        os.replace = dying
    elif moment == "rename":
        os.rename = die
    elif moment == "clean":
        prepared.clean_up = die
    else:
        raise ValueError(moment)


if __name__ == "__main__":
    root, out, *moments = sys.argv[1:]
    for moment in moments:
        child = os.fork()
        if child == 0:
            arm(moment)
            run(root, os.path.join(out, moment))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print("ended", moment, os.waitstatus_to_exitcode(status), flush=True)
