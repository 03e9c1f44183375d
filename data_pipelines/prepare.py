"""Command line: raw videos and annotations in, a prepared directory out.

python -m data_pipelines.prepare DATASET --root=DIR [--out=DIR] [--variant=NAME] [...]

A prepared directory is `OUT/DATASET/VARIANT/1.0.0/`. Besides TFDS's own files it holds
`index-SPLIT.json`, all that training needs to start without reading the records, and
`problems.csv`, which names every fault that was found. Until it is complete it is called
`1.0.0.incomplete`, and `1.0.0.progress` records its finished shards; in an object store, where
nothing can be renamed, it is complete once it has its `metadata.json`.

After an interruption, the same command resumes.
"""

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Generator
from typing import Any

from etils import epath

from data_pipelines import datasets, outages
from data_pipelines.preparation import (
    BEAM_RUNNERS,
    TRANSCRIPTS,
    check_out,
    check_root,
    places,
    prepare,
    usual_recipe,
)
from data_pipelines.prepared import metadata, prepared_by
from data_pipelines.recipe import Recipe, version_directory
from data_pipelines.tables import of_teacher, table
from save_jax.arguments import ArgumentParser
from save_jax.errors import UserError, exit_codes
from save_jax.messages import counted

_RECIPE_FLAGS = ("image_size", "max_frames", "frames_per_second", "fbank_frames", "encoding")


def summary(directory: epath.Path) -> str:
    """Formats what a prepared directory holds and what went wrong, with one row per split."""
    recorded = metadata(directory)
    lines = [table(recorded["counts"]), of_teacher("teacher")]
    if recorded["problems"]:
        problems = counted(recorded["problems"], "problem")
        lines.append(f"{problems}, listed in {directory / 'problems.csv'}")
    return "\n".join(lines)


@exit_codes
def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code, which --help explains."""
    options = _parse(arguments)
    try:
        with _terminable():
            given = {field: getattr(options, field) for field in _RECIPE_FLAGS}
            given = {field: value for field, value in given.items() if value is not None}
            if options.verify:
                return 0 if _verify(options) else 1
            directory = prepare(
                options.dataset,
                root=options.root,
                out=options.out,
                variant=options.variant,
                recipe=usual_recipe(options.dataset, **given),
                workers=options.workers,
                strict=options.strict,
                transcripts=options.transcripts,
                whisper=options.whisper,
                translate=options.translate,
                imagebind=options.imagebind,
                beam_runner=options.beam_runner,
                beam_options=options.beam_options,
            )
    except ModuleNotFoundError as error:
        raise UserError(
            f"preparing needs the package {error.name!r}: pip install -e '.[prepare]' in a clone "
            "of save_jax"
        ) from error
    except Exception as error:
        if isinstance(error, UserError) or not outages.is_outage(error):
            raise
        raise outages.outage(options.dataset, error) from error
    print(directory)
    print(summary(directory))
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="python -m data_pipelines.prepare",
        description="Turns a data set's raw videos into the arrays that training reads.",
        epilog="Exit codes: 0: done (--verify: nothing stops training). 1: --verify found "
        "something that stops training, or a fault of the program (with a traceback). 2: a mistake "
        "in the flags or the files; the message says what to do. 75: interrupted, by a signal or "
        "because a disk, memory, the network or a store failed: run the same command again to "
        "resume.",
    )
    add = parser.add_argument
    add("dataset", help=f"one of: {', '.join(sorted(datasets.DATASETS))}")
    add("--root", default="", help="folder of the data set's files (demo: default OUT/corpus)")
    add("--out", default="", help="folder to write to; default: ROOT/prepared")
    add(
        "--variant", default="", help="variant, such as 7k of msrvtt; default: the data set's first"
    )
    usual = Recipe()
    for field, words in (
        ("image_size", "height and width of a frame, in pixels"),
        ("max_frames", "most frames to keep per clip"),
        ("frames_per_second", "candidate frames per second of video"),
        ("fbank_frames", "length of a clip's filterbank, in frames"),
    ):
        add(
            f"--{field}",
            type=int,
            help=f"{words}; default: the data set's, or {getattr(usual, field)}",
        )
    add(
        "--encoding",
        choices=("jpeg", "raw"),
        help=f"how to store frames; default: {usual.encoding}",
    )
    add("--workers", type=int, default=0, help="processes; 0, the default: one per processor")
    add("--strict", action="store_true", help="stop at the first problem instead of counting it")
    add(
        "--transcripts",
        choices=TRANSCRIPTS,
        default="",
        help="their source; default: the data set's file if there is one, otherwise Whisper",
    )
    add(
        "--whisper",
        default="large-v3",
        help="Whisper's model id, or id@revision, or directory; default: %(default)s",
    )
    add("--translate", action="store_true", help="have Whisper translate to English")
    add("--imagebind", default="", help="imagebind_huge.pth, to compute missing teacher vectors")
    add("--beam_runner", choices=BEAM_RUNNERS, default="", help="prepare with Apache Beam on it")
    add("--beam_options", default="", help='options of the runner: "--key=value ..."')
    add(
        "--verify",
        action="store_true",
        help="prepare nothing: check what is prepared and the data set's files, and print what "
        "training would lack",
    )
    return parser.parse_args(arguments)


def _verify(options: argparse.Namespace) -> bool:
    """Checks what is prepared and, if there is a root, the data set's files."""
    from data_pipelines.verify import verify

    dataset = options.dataset
    variant = datasets.check_variant(dataset, options.variant)
    root, out = places(dataset, options.root or options.out, options.out)
    directory = version_directory(out, dataset, variant, Recipe.version)
    recipe = prepared_by(directory) if outages.exists(directory / "metadata.json") else None
    root = os.path.join(out, "corpus") if dataset == "demo" and not options.root else options.root
    if root:
        check_root(dataset, root)
    check_out(out)
    transcripts = options.transcripts
    if recipe is not None and not transcripts:
        transcripts = metadata(directory).get("transcripts", "")
    return verify(directory, recipe, dataset, variant, root, out, transcripts)


@contextlib.contextmanager
def _terminable() -> Generator[None]:
    """Makes SIGTERM act like Ctrl-C, and ignores both once the work is being ended."""

    def interrupt(*_: Any) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = {
        number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
