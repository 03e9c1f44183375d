"""Computes the teacher vectors that clips lack: ImageBind embeddings (spec section 8)."""

import concurrent.futures
import contextlib
import dataclasses
import functools
import io
import itertools
import os
from collections.abc import Callable, Generator, Sequence

import numpy as np
from etils import epath
from tqdm import tqdm

from data_pipelines.datasets.types import Clip
from data_pipelines.modalities import teacher_files, teacher_inputs
from data_pipelines.pool import in_order
from data_pipelines.storage import tfds_format
from save_jax.batch import Embed
from save_jax.errors import UserError

# Below a folder of vectors, as in the layout of the reference's users (spec section 10).
FOLDERS = {"video": "VideoFeature", "audio": "AudioFeature"}
_READERS = 8  # threads that look for vectors: if these are remote, it is mostly waiting


def compute(
    clips: Sequence[Clip],
    directory: str,
    embed: Embed,
    *,
    workers: int = 0,
    strict: bool = False,
) -> tuple[list[Clip], tuple[tuple[str, str, str], ...]]:
    """Computes the vectors that clips lack, one file each: DIRECTORY/VideoFeature/ID.npy, ….

    A usable vector that exists already, the clip's own or one of an earlier run in `directory`, is
    not computed again; a file gets its name only once it is complete. So the same call resumes
    after an interruption, with the same result.

    A clip without sound gets no vectors, which is no problem: the loss that uses them leaves out
    clips without sound anyway.

    Args:
        clips: the clips, of any splits; the same id means the same clip.
        directory: the folder for the vectors, here or remote; made if absent.
        embed: the teacher.
        workers: processes that read media; 0 = one per processor, 1 = this one.
        strict: raise UserError at the first problem.

    Returns:
        The clips, with the paths of the vectors that there are now; and the problems, each as
        ("", the clip's id, what is wrong in words).

    Raises:
        UserError: the directory cannot be written to, or the teacher gives numbers that are not
            finite.
    """
    problems: list[tuple[str, str, str]] = []

    def problem(clip: Clip, words: str) -> None:
        if strict:
            raise UserError(
                f"clip {clip.video_id}: expected usable files for ImageBind, found: {words}. "
                "Repair or remove the file, or prepare without --strict."
            )
        problems.append(("", clip.video_id, words))

    unique = {clip.video_id: clip for clip in clips}
    usable: dict[str, dict[str, str]] = {}
    with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
        look = functools.partial(_usable, directory=directory, size=embed.config.embed_dim)
        for clip, (paths, unusable) in zip(
            unique.values(), pool.map(look, unique.values()), strict=True
        ):
            usable[clip.video_id] = paths
            for words in unusable:
                problem(clip, words)

    tasks = []
    for video_id, clip in unique.items():
        wanted = {kind: kind not in usable[video_id] for kind in FOLDERS}
        if any(wanted.values()) and not _is_file_name(video_id):
            problem(clip, "no teacher: its id cannot be a file's name")
        elif any(wanted.values()):
            tasks.append(teacher_inputs.Task(clip, **wanted))
    embedded = _embedded(tasks, directory, embed, workers or os.cpu_count() or 1)
    with tfds_format.writing(directory), contextlib.closing(embedded):
        for inputs in embedded:
            if inputs.problem:
                problem(inputs.clip, f"no teacher: {inputs.problem}")
            for kind, array in (("video", inputs.frames), ("audio", inputs.fbanks)):
                if array is not None:
                    usable[inputs.clip.video_id][kind] = _path(directory, kind, inputs.clip)
    return [_with_paths(clip, usable[clip.video_id]) for clip in clips], tuple(problems)


def _embedded(
    tasks: Sequence[teacher_inputs.Task], directory: str, embed: Embed, workers: int
) -> Generator[teacher_inputs.Inputs]:
    """Reads, embeds and writes; yields each clip's inputs once its vectors are written."""
    config = embed.config
    sizes = teacher_inputs.Sizes(config.image_size, config.fbank_frames, config.mel_bins)
    read = in_order(
        functools.partial(teacher_inputs.read_inputs, sizes=sizes),
        tasks,
        min(workers, max(len(tasks), 1)),
        teacher_inputs.crashed,
        lambda task: task.clip.video,
    )
    progress = tqdm(total=len(tasks), desc="teacher vectors", unit="clip", disable=not tasks)
    with contextlib.closing(read), progress:
        for batch in iter(lambda: list(itertools.islice(read, embed.clips)), []):
            _write(directory, "video", embed.video, {i.clip: i.frames for i in batch})
            _write(directory, "audio", embed.audio, {i.clip: i.fbanks for i in batch})
            progress.update(len(batch))
            yield from batch


def _write(
    directory: str,
    kind: str,
    embed: Callable[[np.ndarray], np.ndarray],
    inputs: dict[Clip, np.ndarray | None],
) -> None:
    """Embeds the inputs that are not None and writes their vectors."""
    given = {clip: array for clip, array in inputs.items() if array is not None}
    if not given:
        return
    for clip, vector in zip(given, embed(np.stack(list(given.values()))), strict=True):
        if not np.isfinite(vector).all():
            raise UserError(
                f"clip {clip.video_id}: expected finite numbers from ImageBind for its {kind}, "
                f"found {int((~np.isfinite(vector)).sum())} others. Is the file given as "
                "--imagebind damaged?"
            )
        path, content = _path(directory, kind, clip), io.BytesIO()
        np.save(content, vector.astype(np.float32))
        epath.Path(path).parent.mkdir(parents=True, exist_ok=True)
        tfds_format.write_file(path, content.getvalue())


def _usable(clip: Clip, directory: str, size: int) -> tuple[dict[str, str], list[str]]:
    """Returns the path of each usable vector, by kind, and what is wrong with the others."""
    paths, unusable = {}, []
    for kind, given in (("video", clip.teacher_video), ("audio", clip.teacher_audio)):
        for path in (given, _path(directory, kind, clip)):
            if kind in paths or path is None:
                continue
            try:
                teacher_files.read_vector(path, size)
                paths[kind] = path
            except teacher_files.AbsentError:
                continue
            except teacher_files.VectorError as error:
                unusable.append(f"not used: {path}: {error}")
    return paths, unusable


def _path(directory: str, kind: str, clip: Clip) -> str:
    return os.path.join(directory, FOLDERS[kind], f"{clip.video_id}.npy")


def _is_file_name(video_id: str) -> bool:
    """Returns whether an id, as a file name, stays below its folder; slashes make sub-folders."""
    return not {"", ".", ".."} & set(video_id.split("/")) and "\0" not in video_id


def _with_paths(clip: Clip, paths: dict[str, str]) -> Clip:
    return dataclasses.replace(
        clip,
        teacher_video=paths.get("video", clip.teacher_video),
        teacher_audio=paths.get("audio", clip.teacher_audio),
    )
