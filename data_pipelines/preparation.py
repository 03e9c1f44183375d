"""Prepares a data set: finds its clips, makes what they lack, and writes their records.

The next call resumes a preparation that was interrupted. The command is `prepare.py`.
"""

import dataclasses
import json
import os
from typing import Any

from etils import epath

from data_pipelines import datasets, outages, prepared, sidecars
from data_pipelines.recipe import Recipe, version_directory
from data_pipelines.sidecars import Speech
from save_jax import locks
from save_jax.errors import UserError
from save_jax.files import is_remote

TRANSCRIPTS = ("file", "whisper", "none")
BEAM_RUNNERS = ("DirectRunner", "FlinkRunner", "SparkRunner", "DataflowRunner")


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
    """Prepares one variant of a data set, resuming what an earlier call began.

    Args:
        dataset: the data set's name, a key of datasets.DATASETS.
        root: the folder with its raw files. For "demo", none means OUT/corpus, and the corpus is
            made if it is absent.
        out: the folder for prepared data sets; none means ROOT/prepared.
        variant: one of the data set's variants; none means its first.
        recipe: decides the stored arrays; none means the data set's usual recipe.
        workers: processes that read media; 0 = one per processor (with Beam: one, the runner's
            worker itself).
        strict: raise UserError on the first file that is not usable, instead of counting it.
        transcripts: "file", "whisper" or "none"; "" = the file if there is one, otherwise Whisper.
        whisper: Whisper's model, an id or a local directory.
        translate: have Whisper translate other languages to English.
        imagebind: path of imagebind_huge.pth, to compute missing teacher vectors; "" = none.
        beam_runner: one of BEAM_RUNNERS; "" = this machine alone.
        beam_options: Beam's own options, as on a command line.
        wait: wait for another process that is preparing the same, instead of raising UserError.

    Returns:
        The prepared directory.

    Raises:
        UserError: something is absent or wrong, or the directory was prepared by another recipe.
        OutageError: the machine, its network or a store fails; the same call resumes.
    """
    variant = datasets.check_variant(dataset, variant)
    recipe = recipe or usual_recipe(dataset)
    _check(recipe, workers, transcripts, beam_runner)
    speech = Speech(transcripts, whisper, translate)
    root, out = places(dataset, root, out)
    directory = version_directory(out, dataset, variant, recipe.version)
    if _is_done(directory, recipe, speech):
        return directory
    if dataset != "demo" or outages.exists(root):  # the demo's is made
        check_root(dataset, root)
    check_out(out)

    # Imported here: worker processes import this module again, and do not need the writers.
    from data_pipelines.storage import tfds_format
    from data_pipelines.storage.build import build

    processors = os.cpu_count() or 1
    # In a bucket, too: of two machines, each would remove what the other has written so far.
    with locks.hold(directory, beside=prepared.lock_path(directory), wait=wait):
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
    """Returns the usual recipe of a data set with the given fields replaced."""
    return Recipe(**{**datasets.load_dataset(dataset).RECIPE, **given})


def places(dataset: str, root: str | None, out: str | None) -> tuple[str, str]:
    """Returns the folders to read from and to write to; each defaults to a folder in the other."""
    if dataset == "demo" and out and not root:
        root = os.path.join(out, "corpus")
    if not root:
        raise UserError(
            f"expected --root=DIR, the folder of {_files_of(dataset)}, found none."
            + (" For the demo, --out=DIR is enough." if dataset == "demo" else "")
        )
    return root, out or os.path.join(root, "prepared")


def _files_of(dataset: str) -> str:
    return "your videos" if dataset == "folder" else f"{dataset}'s files"


def check_root(dataset: str, root: str) -> None:
    """Raises UserError if the folder of a data set's files is not there, or is no folder."""
    if not outages.is_folder(root):
        found = " is a file, not a directory" if outages.exists(root) else ": no such directory"
        raise UserError(f"--root={root}{found}. Give the folder of {_files_of(dataset)}.")


def check_out(out: str) -> None:
    """Raises UserError if the folder to write to is a file, or would be below one."""
    path = out
    while not outages.exists(path) and not is_remote(path):
        path = os.path.dirname(os.path.abspath(path))
    if outages.exists(path) and not outages.is_folder(path):
        raise UserError(
            f"--out={out}: {path} is a file, not a directory. Give a folder to write to, which "
            "need not exist."
        )


def _is_done(directory: epath.Path, recipe: Recipe, speech: Speech) -> bool:
    """Returns whether a directory is prepared already; raises UserError if not as wanted now."""
    if not outages.exists(directory / "metadata.json") and (
        prepared.work_directory(directory) == directory or not outages.exists(directory)
    ):
        return False
    prepared.prepared_by(directory).check(json.loads(recipe.to_json()), str(directory))
    found = prepared.metadata(directory).get("transcripts", "")
    if speech.source and str(speech) != found:
        raise UserError(
            f"{directory} was prepared with other transcripts than are wanted now: wanted "
            f"{str(speech)!r}, found {found!r}. Prepare into another --out, or leave out "
            "--transcripts to use it as it is."
        )
    prepared.clean_up(directory)  # the process that completed it may have been killed before that
    print(f"Already prepared, nothing to do: {directory}")
    return True


def _make_demo_corpus(root: str, workers: int) -> None:
    """Makes the files of the demo corpus that are missing."""
    from data_pipelines import demo_corpus

    demo_corpus.generate(root, seed=0, workers=workers)


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
