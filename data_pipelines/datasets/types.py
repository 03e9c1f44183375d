"""The clips of a data set as its annotations describe them, before any media is read."""

import dataclasses
from typing import NamedTuple


@dataclasses.dataclass(frozen=True)
class Clip:
    """One clip, as a data set module describes it to preparation (spec section 10).

    Paths are plain strings; nothing here says that the media can be read.

    Attributes:
        video_id: the data set's own name of the clip, unique in its split.
        video: path of the video file, which may not exist; or of a folder of images, all of which,
            in the order of their names, are candidates for frames.
        audio: path of an existing file to prefer over the video's own track; None = the video's.
        captions: the clip's captions; may be empty for a clip that is only searched.
        groups: one per caption, the group its results are also reported under; "" = ungrouped.
        teacher_video: path of a .pt or .npy vector of the clip's video; None = absent.
        teacher_audio: the same for its audio.
        transcript: what is said in the clip; "" = nothing, or not known yet: preparation adds it to
            what annotations hold.
    """

    video_id: str
    video: str
    audio: str | None
    captions: tuple[str, ...]
    groups: tuple[str, ...]
    teacher_video: str | None
    teacher_audio: str | None
    transcript: str = ""

    def __post_init__(self):
        if len(self.groups) != len(self.captions):
            raise ValueError(
                f"clip {self.video_id!r}: {len(self.captions)} captions, {len(self.groups)} groups"
            )


# A fault that stops nothing: its split, or ""; a clip's id, or a file; and what is wrong, in words.
Problem = tuple[str, str, str]


class Annotations(NamedTuple):
    """The clips of a data set, as its module reads them.

    Attributes:
        splits: the clips of each split, in the order of the annotations.
        problems: those of the annotations and the folders, not those within media files.
    """

    splits: dict[str, list[Clip]]
    problems: tuple[Problem, ...] = ()
