"""Command line: raw videos and annotations in, a prepared directory out.

python -m data_pipelines.prepare DATASET --root=DIR [--out=DIR] [--variant=NAME] [...]
"""

import argparse
import json
import os
import pathlib
import sys

from data_pipelines import datasets
from data_pipelines.recipe import Recipe, version_directory
from save_jax.errors import UserError


def prepare(
    dataset: str,
    root: str | None = None,
    out: str | None = None,
    variant: str | None = None,
    recipe: Recipe | None = None,
    workers: int = 0,
    strict: bool = False,
) -> pathlib.Path:
    """Prepares one variant of a data set, unless that is already done.

    Args:
        dataset: the data set's name, a key of datasets.DATASETS.
        root: the folder with its raw files. For "demo", none means OUT/corpus, and the corpus is
            made when it is not there.
        out: the folder for prepared data sets; none means ROOT/prepared.
        variant: one of the data set's variants; none means its first.
        recipe: what to make of the media; none means the default recipe.
        workers: processes that read media; 0 = as many as there are processors.
        strict: raise UserError on the first file that is not usable, instead of counting it.

    Returns:
        The prepared directory.

    Raises:
        UserError: something is absent or wrong, or the directory was prepared by another recipe.
    """
    recipe = recipe or Recipe()
    _check(recipe, workers)
    variant = datasets.check_variant(dataset, variant)
    root, out = _places(dataset, root, out)
    workers = workers or os.cpu_count() or 1
    directory = version_directory(out, dataset, variant, recipe.version)
    if directory.exists():
        prepared_by(directory).check(json.loads(recipe.to_json()), str(directory))
        print(f"Already prepared, nothing to do: {directory}")
        return directory

    if dataset == "demo":
        _make_demo_corpus(root, workers)
    if not os.path.isdir(root):
        raise UserError(f"expected the folder of {dataset}'s files at --root={root}, found none.")
    splits = datasets.load_dataset(dataset).read_annotations(root, variant)
    try:
        os.makedirs(out, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out={out}: expected a folder to write to, found: {error}.") from error

    # Here, because worker processes import this module again, and have no use for TensorFlow.
    from data_pipelines.datasets.builder import ClipsBuilder

    builder = ClipsBuilder(
        out=out,
        dataset=dataset,
        variant=variant,
        recipe=recipe,
        splits=splits,
        workers=workers,
        strict=strict,
    )
    builder.build()
    return directory


def prepared_by(directory: pathlib.Path) -> Recipe:
    """Reads the recipe of a prepared directory; UserError when it is not one."""
    try:
        return Recipe.from_json(json.dumps(_metadata(directory)["recipe"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{directory}: expected a directory that data_pipelines.prepare finished, found no "
            f"usable metadata.json ({error}). Remove it and prepare again."
        ) from error


def summary(directory: pathlib.Path) -> str:
    """What a prepared directory holds and what went wrong, as a table of one line a split."""
    counts = _metadata(directory)["counts"]
    columns = list(next(iter(counts.values())))
    rows = [["split", *columns]]
    rows += [[split, *(str(its[column]) for column in columns)] for split, its in counts.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    if any(its["problems"] for its in counts.values()):
        lines.append(f"Every problem is named in {directory / 'problems.csv'}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    options = _parse(arguments)
    try:
        directory = prepare(
            options.dataset,
            root=options.root,
            out=options.out,
            variant=options.variant,
            recipe=Recipe(
                image_size=options.image_size,
                max_frames=options.max_frames,
                fbank_frames=options.fbank_frames,
                encoding=options.encoding,
            ),
            workers=options.workers,
            strict=options.strict,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(directory)
    print(summary(directory))
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    default = Recipe()
    parser = argparse.ArgumentParser(
        prog="python -m data_pipelines.prepare",
        description="Turns a data set's raw videos into what training and evaluation read.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("dataset", help=f"one of: {', '.join(sorted(datasets.DATASETS))}")
    parser.add_argument("--root", default="", help="the data set's files (demo: OUT/corpus)")
    parser.add_argument("--out", default="", help="where to write; empty: ROOT/prepared")
    parser.add_argument("--variant", default="", help="empty: the data set's first")
    parser.add_argument("--image_size", type=int, default=default.image_size, help="pixels")
    parser.add_argument("--max_frames", type=int, default=default.max_frames, help="per clip")
    parser.add_argument("--fbank_frames", type=int, default=default.fbank_frames, help="per clip")
    parser.add_argument("--encoding", choices=("jpeg", "png"), default=default.encoding)
    parser.add_argument("--workers", type=int, default=0, help="processes; 0: one a processor")
    parser.add_argument("--strict", action="store_true", help="stop at the first unusable file")
    return parser.parse_args(arguments)


def _make_demo_corpus(root: str, workers: int) -> None:
    """Makes the demo corpus, or what an interruption left out of it; nothing when it is there."""
    from data_pipelines import demo_corpus

    demo_corpus.generate(root, seed=0, workers=workers)


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


def _check(recipe: Recipe, workers: int) -> None:
    for field in ("image_size", "max_frames", "fbank_frames", "mel_bins", "teacher_size"):
        if getattr(recipe, field) < 1:
            raise UserError(f"expected --{field} of at least 1, found {getattr(recipe, field)}")
    if recipe.encoding not in ("jpeg", "png"):
        raise UserError(f"expected --encoding jpeg or png, found {recipe.encoding!r}")
    if workers < 0:
        raise UserError(f"expected --workers of at least 0, found {workers}")


def _metadata(directory: pathlib.Path) -> dict:
    return json.loads((directory / "metadata.json").read_text())


if __name__ == "__main__":
    sys.exit(main())
