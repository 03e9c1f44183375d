"""One clip as a data set's annotations describe it, before any media is read."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Clip:
    """What a data set module hands to preparation for each clip (spec section 10).

    Paths are plain strings; nothing here says that the media can be read.

    Attributes:
        video_id: the data set's own name of the clip, unique in its split.
        video: path of the video file, which may not exist.
        audio: path of an existing .wav to prefer over the video's own track; None = the video's.
        transcript: what is said in the clip; "" = none.
        captions: the clip's captions; may be empty for a clip that is only searched.
        groups: one per caption, the group its results are also reported under; "" = ungrouped.
        teacher_video: path of a .pt or .npy vector of the clip's video; None = absent.
        teacher_audio: the same of its audio.
    """

    video_id: str
    video: str
    audio: str | None
    transcript: str
    captions: tuple[str, ...]
    groups: tuple[str, ...]
    teacher_video: str | None
    teacher_audio: str | None

    def __post_init__(self):
        if len(self.groups) != len(self.captions):
            raise ValueError(
                f"clip {self.video_id!r}: {len(self.captions)} captions, {len(self.groups)} groups"
            )
