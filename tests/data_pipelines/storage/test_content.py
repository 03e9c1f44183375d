"""The digest of a split's records: the same for the same files, another for any other clip."""

import json
import os
import shutil

import av
import numpy as np

from data_pipelines import splits
from tests.support import preparing


def contents(directory) -> dict[str, str]:
    return json.loads((directory / "metadata.json").read_text())["content"]


def test_every_clip_counts(miniature, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(miniature, root, copy_function=os.link)
    one = contents(preparing.run(str(root), str(tmp_path / "one")))
    assert set(one) == {"train", "test"} and len(set(one.values())) == 2
    assert contents(preparing.run(str(root), str(tmp_path / "again"))) == one
    # The same frames of one clip, brighter: no sample of a few records would show that.
    video = root / "VideoData" / "video1.mp4"
    with av.open(str(video)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    video.unlink()
    with av.open(str(video), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width = frames[0].shape[:2]
        for pixels in frames:
            brighter = np.minimum(pixels.astype(int) + 40, 255).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(brighter, format="rgb24")))
        container.mux(stream.encode(None))
    other = contents(preparing.run(str(root), str(tmp_path / "other")))
    assert other["train"] != one["train"] and other["test"] == one["test"]
    split = splits.open_split(str(tmp_path / "other"), "msrvtt", "9k", "train", {})
    assert split.content == other["train"]
