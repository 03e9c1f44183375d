"""Command line: raw videos and annotations in, a prepared directory out.

python -m data_pipelines.prepare DATASET --root=DIR [--out=DIR] [--variant=NAME] [...]

A prepared directory is `OUT/DATASET/VARIANT/1.0.0/`. Beside TFDS's own files it holds
`index-SPLIT.json`, all that training start-up needs of the records without reading them, and
`problems.csv`, which names everything that was not as it should be. Until it is complete it is
called `1.0.0.incomplete`, and `1.0.0.progress` holds what is known of its finished shards; in an
object store, where nothing can be renamed, it is complete once it has its `metadata.json`.

Whatever ends a preparation, the same command goes on from there.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

from etils import epath

from data_pipelines import datasets, outages, prepared, sidecars
from data_pipelines.recipe import Recipe, version_directory
from data_pipelines.sidecars import Speech
from data_pipelines.tables import table
from save_jax import files
from save_jax.errors import UserError, exit_codes

TRANSCRIPTS = ("file", "whisper", "none")
BEAM_RUNNERS = ("DirectRunner", "FlinkRunner", "SparkRunner", "DataflowRunner")
_RECIPE_FLAGS = ("image_size", "max_frames", "frames_per_second", "fbank_frames", "encoding")


def prepare(
    dataset: str,
    root: str | None = None,
    out: str | None = None,
    variant: str | None = None,
    recipe: Recipe | None = None,
    workers: int = 0,
    strict: bool = False,
    *,
    transcripts: str = "",
    whisper: str = "large-v3",
    translate: bool = False,
    imagebind: str = "",
    beam_runner: str = "",
    beam_options: str = "",
    wait: bool = False,
) -> epath.Path:
    """Prepares one variant of a data set, or what is not yet done of it.

    Args:
        dataset: the data set's name, a key of datasets.DATASETS.
        root: the folder with its raw files. For "demo", none means OUT/corpus, and the corpus is
            made when it is not there.
        out: the folder for prepared data sets; none means ROOT/prepared.
        variant: one of the data set's variants; none means its first.
        recipe: what to make of the media; none means what is usual for the data set.
        workers: processes that read media; 0 = as many as there are processors (with Beam: one,
            the runner's worker itself).
        strict: raise UserError on the first file that is not usable, instead of counting it.
        transcripts: "file", "whisper" or "none"; "" = the file if there is one, or else Whisper.
        whisper: Whisper's model, an id or a local directory.
        translate: have Whisper translate other languages to English.
        imagebind: path of imagebind_huge.pth, to compute the vectors that are not there; "" = none.
        beam_runner: one of BEAM_RUNNERS; "" = this machine alone.
        beam_options: Beam's own options, as on a command line.
        wait: wait for another process that is preparing the same, instead of raising UserError.

    Returns:
        The prepared directory.

    Raises:
        UserError: something is absent or wrong, or the directory was prepared by another recipe.
        OutageError: the machine, its network or a store fails; the same call goes on from there.
    """
    variant = datasets.check_variant(dataset, variant)
    recipe = recipe or usual_recipe(dataset)
    _check(recipe, workers, transcripts, beam_runner)
    speech = Speech(transcripts, whisper, translate)
    root, out = _places(dataset, root, out)
    directory = version_directory(out, dataset, variant, recipe.version)
    if _is_done(directory, recipe, speech):
        return directory
    if dataset != "demo" and not outages.is_folder(root):
        raise UserError(f"expected the folder of {dataset}'s files at --root={root}, found none.")

    # Here, because worker processes import this module again, and have no use for what writes.
    from data_pipelines.storage import tfds_format
    from data_pipelines.storage.build import build

    processors = os.cpu_count() or 1
    # In a bucket, too: on two machines, each would remove what the other has written so far.
    with files.hold(directory, beside=prepared.lock_path(directory), wait=wait):
        if _is_done(directory, recipe, speech):  # by the process that was waited for
            return directory
        if dataset == "demo":
            sidecars.announce("corpus", f"the demo's clips in {root}")
            with tfds_format.writing(root):
                _make_demo_corpus(root, workers or processors)
        with tfds_format.writing(out):
            found = sidecars.read(
                dataset,
                variant,
                root=root,
                out=out,
                speech=speech,
                imagebind=imagebind,
                workers=workers,
                strict=strict,
            )
            build(
                directory,
                dataset,
                variant,
                recipe,
                found,
                workers=workers or (1 if beam_runner else processors),
                strict=strict,
                beam_runner=beam_runner,
                beam_options=beam_options,
            )
    return directory


def usual_recipe(dataset: str, **given: Any) -> Recipe:
    """The recipe of a data set's own choosing, but for the fields that are given."""
    return Recipe(**{**datasets.load_dataset(dataset).RECIPE, **given})


def prepared_by(directory: epath.Path) -> Recipe:
    """Reads the recipe of a prepared directory; UserError when it is not one."""
    try:
        with outages.reaching(directory):
            recorded = (directory / "metadata.json").read_text()
        return Recipe.from_json(json.dumps(json.loads(recorded)["recipe"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{directory}: expected a directory that data_pipelines.prepare finished, found no "
            f"usable metadata.json ({error}). Remove it and prepare again."
        ) from error


def summary(directory: epath.Path) -> str:
    """What a prepared directory holds and what went wrong, as a table of one line a split."""
    recorded = metadata(directory)
    lines = [table(recorded["counts"])]
    if recorded["problems"]:
        lines.append(f"{recorded['problems']} problems; each is in {directory / 'problems.csv'}")
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
            f"preparing needs the package {error.name!r}: pip install -e '.[prepare]', in the "
            "checkout"
        ) from error
    except Exception as error:
        if isinstance(error, UserError) or not outages.is_outage(error):
            raise
        raise outages.outage(options.dataset, error) from error
    print(directory)
    print(summary(directory))
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m data_pipelines.prepare",
        description="Turns a data set's raw videos into what training and evaluation read.",
        epilog="Exit codes: 0: done (--verify: nothing stops training). 1: --verify found what "
        "stops training. 2: a mistake in what was given; the message says what to do. 75: "
        "interrupted, by a signal or because a disk, memory, the network or a store failed; the "
        "same command goes on from there.",
    )
    add = parser.add_argument
    add("dataset", help=f"one of: {', '.join(sorted(datasets.DATASETS))}")
    add("--root", default="", help="the data set's files (demo: OUT/corpus, made when not there)")
    add("--out", default="", help="where to write; default: ROOT/prepared")
    add("--variant", default="", help="default: the data set's first")
    usual = Recipe()
    for field, words in (
        ("image_size", "height and width of a frame, in pixels"),
        ("max_frames", "most frames of a clip"),
        ("frames_per_second", "candidates for them"),
        ("fbank_frames", "length of a clip's filterbank"),
    ):
        add(
            f"--{field}",
            type=int,
            help=f"{words}; default: the data set's, or {getattr(usual, field)}",
        )
    add("--encoding", choices=("jpeg", "raw"), help=f"of frames; default: {usual.encoding}")
    add("--workers", type=int, default=0, help="processes; default: one a processor")
    add("--strict", action="store_true", help="stop at the first thing that is not as it should be")
    add(
        "--transcripts",
        choices=TRANSCRIPTS,
        default="",
        help="where they are from; default: the data set's file if it is there, or else Whisper",
    )
    add("--whisper", default="large-v3", help="model id or directory; default: %(default)s")
    add("--translate", action="store_true", help="have Whisper translate to English")
    add("--imagebind", default="", help="imagebind_huge.pth, to compute vectors that are absent")
    add("--beam_runner", choices=BEAM_RUNNERS, default="", help="prepare with Apache Beam")
    add("--beam_options", default="", help='Beam\'s own options: "--key=value ..."')
    add(
        "--verify",
        action="store_true",
        help="prepare nothing: check what is prepared and the data set's files, and print what "
        "training would lack",
    )
    return parser.parse_args(arguments)


def _is_done(directory: epath.Path, recipe: Recipe, speech: Speech) -> bool:
    """Whether a directory is prepared already; UserError when it is, but otherwise than wanted."""
    if not outages.exists(directory / "metadata.json") and (
        prepared.work_directory(directory) == directory or not outages.exists(directory)
    ):
        return False
    prepared_by(directory).check(json.loads(recipe.to_json()), str(directory))
    found = metadata(directory).get("transcripts", "")
    if speech.source and str(speech) != found:
        raise UserError(
            f"{directory} was prepared with other transcripts than are wanted now: wanted "
            f"{str(speech)!r}, found {found!r}. Prepare into another --out."
        )
    prepared.clean_up(directory)  # which whoever completed it may have had no time to do
    print(f"Already prepared, nothing to do: {directory}")
    return True


def _verify(options: argparse.Namespace) -> bool:
    """Checks what is prepared and, as far as there is a root, the data set's files."""
    from data_pipelines.verify import verify

    dataset = options.dataset
    variant = datasets.check_variant(dataset, options.variant)
    root, out = _places(dataset, options.root or options.out, options.out)
    directory = version_directory(out, dataset, variant, Recipe.version)
    recipe = prepared_by(directory) if outages.exists(directory / "metadata.json") else None
    root = os.path.join(out, "corpus") if dataset == "demo" and not options.root else options.root
    if root and not outages.is_folder(root):
        raise UserError(f"expected the folder of {dataset}'s files at --root={root}, found none.")
    return verify(directory, recipe, dataset, variant, root, out)


def _make_demo_corpus(root: str, workers: int) -> None:
    """Makes the demo corpus, or what an interruption left out of it; nothing when it is there."""
    from data_pipelines import demo_corpus

    demo_corpus.generate(root, seed=0, workers=workers)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Makes SIGTERM end the work as Ctrl-C does, and nothing end the ending."""

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


def _places(dataset: str, root: str | None, out: str | None) -> tuple[str, str]:
    """Where to read from and write to, each defaulting to a folder in the other."""
    if dataset == "demo" and out and not root:
        root = os.path.join(out, "corpus")
    if not root:
        raise UserError(
            f"expected --root=DIR, the folder of {dataset}'s files, found none."
            + (" For the demo, --out=DIR is enough." if dataset == "demo" else "")
        )
    return root, out or os.path.join(root, "prepared")


def _check(recipe: Recipe, workers: int, transcripts: str, beam_runner: str) -> None:
    for field in dataclasses.fields(recipe):
        if field.type is int and getattr(recipe, field.name) < 1:
            raise UserError(
                f"expected --{field.name} of at least 1, found {getattr(recipe, field.name)}"
            )
    for name, value, known in (
        ("encoding", recipe.encoding, ("jpeg", "raw")),
        ("transcripts", transcripts, ("", *TRANSCRIPTS)),
        ("beam_runner", beam_runner, ("", *BEAM_RUNNERS)),
    ):
        if value not in known:
            raise UserError(
                f"expected --{name} {' or '.join(filter(None, known))}, found {value!r}"
            )
    if workers < 0:
        raise UserError(f"expected --workers of at least 0, found {workers}")


def metadata(directory: epath.Path) -> dict[str, Any]:
    """What a prepared directory records of itself: recipe, transcripts, counts, problems."""
    return json.loads((directory / "metadata.json").read_text())


if __name__ == "__main__":
    sys.exit(main())
