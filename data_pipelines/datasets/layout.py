"""Finds the files that belong to annotated clips, in the layout of spec section 10.

    ROOT/VideoData/ID.mp4                          or another ending; may be in sub-folders
    ROOT/ImageData/ID/                             a video's frames as images (Charades)
    ROOT/AudioData/ID.wav                          if there is none, the sound is the video's own
    ROOT/FeatureData/ImageBind/VideoFeature/ID.pt  or .npy: the teacher's vectors
    ROOT/FeatureData/ImageBind/AudioFeature/ID.pt
    ROOT/Annotations/query_groups.csv              optional: video_id,caption,group

Each folder is listed once, and none of its files is opened: a data set may be large, and its root
remote.
"""

import dataclasses
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from data_pipelines import outages
from data_pipelines.datasets import annotations
from data_pipelines.datasets.types import Annotations, Clip, Problem
from save_jax.errors import UserError
from save_jax.files import is_remote
from save_jax.messages import counted

VIDEO_ENDINGS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm")

GROUPS = os.path.join("Annotations", "query_groups.csv")

# The captions of each clip of each split: split -> id -> captions.
Captions = Mapping[str, Mapping[str, Sequence[str]]]


class Files(NamedTuple):
    """The paths of the files of clips, by id; a clip need not be in any of these."""

    videos: dict[str, str]
    sounds: dict[str, str]
    teacher_videos: dict[str, str]
    teacher_audios: dict[str, str]


def annotate(
    root: str,
    captions: Captions,
    problems: list[Problem],
    *,
    known: Collection[str] = (),
    images: bool = False,
) -> Annotations:
    """Joins captions with query groups and with files.

    Args:
        root: the data set's folder.
        captions: the captions of each clip of each split.
        problems: those of reading the annotations; the result has them too.
        known: ids that the annotations mention, though no split has them.
        images: whether a folder of images, if there is one, replaces the video.
    """
    problems = [*problems, *repeated(captions)]
    groups = _read_groups(root, captions, problems)
    folder = os.path.join(root, "VideoData")
    files = find(root, folder, problems)
    frames = _folders(os.path.join(root, "ImageData")) if images else {}
    splits = {
        split: [
            _with_images(
                clip_of(
                    files,
                    video_id,
                    its_captions,
                    [groups.get((video_id, caption.strip()), "") for caption in its_captions],
                    absent=os.path.join(folder, f"{video_id}.mp4"),
                ),
                frames,
                files,
            )
            for video_id, its_captions in clips.items()
        ]
        for split, clips in captions.items()
    }
    annotated = {video_id for clips in captions.values() for video_id in clips}.union(known)
    for video_id in sorted({**files.videos, **frames}.keys() - annotated):
        path = files.videos.get(video_id) or frames[video_id]
        problems.append(("", path, "not used: the annotations do not mention it"))
    return Annotations(splits, tuple(problems))


def captions_of(
    split: str,
    ids: Iterable[str],
    captions: Mapping[str, Sequence[str]],
    ids_path: str,
    captions_path: str,
    problems: list[Problem],
) -> dict[str, Sequence[str]]:
    """Returns the captions of the clips that a split's list names.

    Args:
        split: the split.
        ids: its clips.
        captions: the captions of all clips.
        ids_path: the file with the ids.
        captions_path: the file with the captions.
        problems: gets the clips without captions.

    Raises:
        UserError: none of the clips has captions.
    """
    ids = list(dict.fromkeys(ids))
    bare = [video_id for video_id in ids if not captions.get(video_id)]
    if len(bare) == len(ids):
        raise UserError(
            f"{captions_path}: expected captions of the {counted(len(ids), 'clip')} of {ids_path}, "
            f"found none of any, {bare[0]!r} first. Do the two files belong together?"
        )
    problems += [(split, video_id, f"no captions in {captions_path}") for video_id in bare]
    return {video_id: captions.get(video_id, ()) for video_id in ids}


def find(root: str, videos: str, problems: list[Problem], *, paths_are_ids: bool = False) -> Files:
    """Lists the files of all clips.

    Args:
        root: the data set's folder.
        videos: the folder of its videos.
        problems: gets the videos that are not used because another has the same id.
        paths_are_ids: whether an id is a file's path, rather than its name, without the ending.
    """

    def by_id(folder: str, endings: tuple[str, ...]) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for path in sorted(_walk(folder, problems)):
            if path.lower().endswith(endings):
                name = path if paths_are_ids else path.rpartition("/")[2]
                found.setdefault(name.rpartition(".")[0], []).append(os.path.join(folder, path))
        return found

    def firsts(found: dict[str, list[str]]) -> dict[str, str]:
        return {video_id: paths[0] for video_id, paths in found.items()}

    all_videos = by_id(videos, VIDEO_ENDINGS)
    for video_id, (first, *others) in all_videos.items():
        problems += [
            ("", other, f"not used: {first} has the same id, {video_id!r}") for other in others
        ]
    vectors = os.path.join(root, "FeatureData", "ImageBind")
    return Files(
        firsts(all_videos),
        firsts(by_id(os.path.join(root, "AudioData"), (".wav",))),
        firsts(by_id(os.path.join(vectors, "VideoFeature"), (".npy", ".pt"))),
        firsts(by_id(os.path.join(vectors, "AudioFeature"), (".npy", ".pt"))),
    )


def clip_of(
    files: Files, video_id: str, captions: Sequence[str], groups: Sequence[str], absent: str = ""
) -> Clip:
    """Makes a clip of its files; `absent` is where its video should be if there is none.

    Preparation reports it if it is still absent.
    """
    return Clip(
        video_id=video_id,
        video=files.videos.get(video_id, absent),
        audio=files.sounds.get(video_id),
        captions=tuple(captions),
        groups=tuple(groups),
        teacher_video=files.teacher_videos.get(video_id),
        teacher_audio=files.teacher_audios.get(video_id),
    )


def repeated(captions: Mapping[str, Collection[str]]) -> list[Problem]:
    """Names the clips that are in more than one split: what is trained on cannot be tested on."""
    seen: dict[str, str] = {}
    problems = []
    for split, clips in captions.items():
        for video_id in clips:
            if video_id in seen:
                problems.append((split, video_id, f"it is in the split {seen[video_id]!r} too"))
            seen.setdefault(video_id, split)
    return problems


def _with_images(clip: Clip, frames: dict[str, str], files: Files) -> Clip:
    """Returns the clip with images, if there are any, as its frames; its video keeps the sound."""
    if clip.video_id not in frames:
        return clip
    sound = clip.audio or files.videos.get(clip.video_id)
    return dataclasses.replace(clip, video=frames[clip.video_id], audio=sound)


def _read_groups(
    root: str, captions: Captions, problems: list[Problem]
) -> dict[tuple[str, str], str]:
    """Reads the group of each (clip, caption) from the query-group file, if there is one."""
    path = os.path.join(root, GROUPS)
    if not outages.exists(path):
        return {}
    listed = {
        (video_id, caption.strip())
        for clips in captions.values()
        for video_id, its_captions in clips.items()
        for caption in its_captions
    }
    groups: dict[tuple[str, str], str] = {}
    for line, row in annotations.read_csv(path, ("video_id", "caption", "group"), problems):
        pair = (row["video_id"], row["caption"].strip())
        if pair not in listed:
            problems.append(("", path, f"line {line} not used: {pair[0]} has no such caption"))
        elif groups.setdefault(pair, row["group"].strip()) != row["group"].strip():
            problems.append(("", path, f"line {line} not used: the caption is in {groups[pair]!r}"))
    return groups


def _folders(parent: str) -> dict[str, str]:
    """Returns the folders in a folder that are not empty, by name; {} when it does not exist."""
    _, names, _ = next(outages.walk(parent), (parent, [], []))
    paths = {n: os.path.join(parent, n) for n in sorted(names) if not n.startswith(".")}
    if is_remote(parent):  # where there are no empty folders
        return paths
    with outages.reaching(parent):
        return {name: path for name, path in paths.items() if os.listdir(path)}


def _walk(folder: str, problems: list[Problem]) -> Iterator[str]:
    """Yields the paths, from `folder`, of all files below it that are not hidden.

    A link back to a folder that contains it is not followed. What cannot be listed, read as a file,
    or named in UTF-8, as a record must be, goes to `problems`.

    Raises:
        OutageError: a folder cannot be listed now.
    """
    walk = _walk_remote(folder) if is_remote(folder) else _walk_local(folder, "", (), problems)
    for path in walk:
        try:
            path.encode()
        except UnicodeEncodeError:
            whole = os.path.join(folder, path)
            problems.append(("", _shown(whole), "not used: its name is not UTF-8; rename it"))
        else:
            yield path


def _walk_local(
    folder: str, prefix: str, above: tuple[str, ...], problems: list[Problem]
) -> Iterator[str]:
    above = (*above, os.path.realpath(folder))
    try:
        with outages.reaching(folder):
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except FileNotFoundError as error:
        if prefix:  # it was listed a moment ago: its mount has been lost
            raise outages.outage(folder, error) from error
        return
    except OSError as error:
        problems.append(("", _shown(folder), f"not used: it cannot be listed ({error.strerror})"))
        return
    for entry in entries:
        link = entry.is_symlink()
        if entry.name.startswith("."):
            continue
        # A link may lead nowhere or to itself: that is found when the file is to be read.
        if outages.is_folder(entry.path) if link else entry.is_dir():
            if not (link and _leads_back(entry.path, above)):
                yield from _walk_local(entry.path, f"{prefix}{entry.name}/", above, problems)
        elif link or entry.is_file():
            if link and "." not in entry.name and not os.path.exists(entry.path):
                words = "not used: it is a link that leads nowhere (is what it leads to mounted?)"
                problems.append(("", _shown(entry.path), words))
            yield prefix + entry.name
        else:
            problems.append(("", _shown(entry.path), "not used: it is a pipe or a device"))


def _leads_back(link: str, above: tuple[str, ...]) -> bool:
    """Returns whether a link leads to a folder that it was reached through, or to one above."""
    target = os.path.realpath(link)
    return any(os.path.commonpath((target, folder)) == target for folder in above)


def _walk_remote(folder: str) -> Iterator[str]:
    start = len(folder.rstrip("/")) + 1
    for parent, _, names in outages.walk(folder):
        for name in names:
            path = os.path.join(os.fspath(parent), name)[start:]
            if not any(part.startswith(".") for part in path.split("/")):
                yield path


def _shown(path: str) -> str:
    return path.encode(errors="backslashreplace").decode()
