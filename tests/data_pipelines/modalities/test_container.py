import csv
import json

import av
import pytest

from data_pipelines.modalities import audio
from data_pipelines.modalities import video as video_files
from data_pipelines.modalities.container import MediaError, decodable
from data_pipelines.prepare import main
from data_pipelines.recipe import Recipe
from tests.support import media as synthetic

SMALL = Recipe(image_size=32)


def test_frames_held_back_are_given_when_reading_breaks_off(tmp_path):
    path = synthetic.write_video(
        tmp_path / "a.mp4", synthetic.numbered_frames(20), codec="libx264"
    )  # whose frames are stored in another order than they are shown

    class Breaking:
        def demux(self, stream):
            for packet in container.demux(stream):
                if packet.size == 0:
                    raise av.error.OSError(5, "Input/output error")
                yield packet

    with av.open(str(path)) as container:
        assert len(list(decodable(Breaking(), container.streams.video[0]))) == 20


# What names a.mp4, or an address, instead of holding anything itself; and what is said of it.
REFERENCES = {
    "concat": (
        "ffconcat version 1.0\nfile a.mp4\n",
        "a playlist, is not opened",
    ),
    "playlist": (
        "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\na.mp4\n#EXT-X-ENDLIST\n",
        "FFmpeg",  # which itself refuses, in most builds, what is not called .m3u8
    ),
    "session": (
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n"
        "a=rtpmap:96 H264/90000\n",
        "a playlist, is not opened",
    ),
}


def test_files_that_name_others_are_left_out(tmp_path, monkeypatch):
    root = tmp_path / "root"
    (root / "AudioData").mkdir(parents=True)
    video = synthetic.write_video(
        root / "a.mp4", synthetic.numbered_frames(30), sound=synthetic.tone(3)[None]
    )
    for name, (text, _) in REFERENCES.items():
        (root / f"{name}.mp4").write_text(text)
    synthetic.write_video(root / "b.mp4", synthetic.numbered_frames(30))
    synthetic.write_wav(root / "AudioData" / "other.wav", synthetic.tone(3)[None])
    (root / "AudioData" / "b.wav").write_text("ffconcat version 1.0\nfile other.wav\n")
    out = f"--out={tmp_path / 'out'}"
    flags = ["--transcripts=none", "--workers=1", "--image_size=32", "--fbank_frames=64"]
    assert main(["folder", f"--root={root}", out, *flags]) == 0
    directory = tmp_path / "out" / "folder" / "default" / "1.0.0"
    entries = json.loads((directory / "index-test.json").read_text())
    assert [(entry["video_id"], entry["has_audio"]) for entry in entries] == [
        ("a", True),
        ("b", False),
    ]
    with (directory / "problems.csv").open() as file:
        problems = {row["video_id"]: row["problem"] for row in csv.DictReader(file)}
    assert set(problems) == {"b", *REFERENCES}
    assert problems["b"].startswith(f"no audio from {root / 'AudioData' / 'b.wav'}: ")
    for name, (_, words) in REFERENCES.items():
        assert problems[name].startswith(f"left out: {root / name}.mp4: ")
        assert words in problems[name]
    # Nor does a name that is more than one: FFmpeg's protocols are not asked.
    with pytest.raises(MediaError, match="does not exist"):
        video_files.decode_frames(f"concat:{video}", SMALL)


@pytest.mark.parametrize(
    "name",
    ["a.mp4", "a.m4v", "a.mov", "a.mkv", "a.webm", "a.avi", "a.flv", "a.ts", "a.mpg", "a.wmv",
     "a.3gp", "a.nut", "a.mxf"],
)  # fmt: skip
def test_containers_that_are_read_whatever_they_are_called(tmp_path, name):
    codecs = {"a.webm": "libvpx", "a.mpg": "mpeg1video", "a.wmv": "wmv2",
              "a.mxf": "mpeg2video", "a.flv": "flv1"}  # fmt: skip
    path = synthetic.write_video(
        tmp_path / name, synthetic.numbered_frames(50), 25, codec=codecs.get(name, "mpeg4")
    )
    found = video_files.decode_frames(path.rename(tmp_path / "renamed.mp4"), SMALL)
    assert [synthetic.number_of(frame) for frame in found] == [0, 25]


@pytest.mark.parametrize("name", ["a.wav", "a.mp3", "a.flac", "a.ogg", "a.m4a", "a.aac", "a.aiff"])
def test_sound_that_is_read_whatever_it_is_called(tmp_path, name):
    codec = {"a.wav": "pcm_s16le", "a.mp3": "libmp3lame", "a.flac": "flac", "a.ogg": "libopus",
             "a.aiff": "pcm_s16be"}.get(name, "aac")  # fmt: skip
    with av.open(str(tmp_path / name), "w") as container:
        stream = container.add_stream(codec, rate=48000, layout="mono")
        frame = av.AudioFrame.from_ndarray(
            synthetic.tone(2, rate=48000)[None], format="fltp", layout="mono"
        )
        frame.sample_rate = 48000
        frame = av.AudioResampler(stream.codec_context.format, "mono", 48000).resample(frame)
        for piece in (*frame, None):
            container.mux(stream.encode(piece))
    waveform = audio.read_waveform((tmp_path / name).rename(tmp_path / "renamed.wav"))
    assert abs(len(waveform) - 32000) < 3000 and waveform.std() > 0.2
