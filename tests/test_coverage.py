"""Nothing is silently off: what a split lacks for the model's branches is said, or refused."""

import json

import pytest

from data_pipelines.prepare import prepare
from data_pipelines.recipe import Recipe
from save_jax import evaluate
from save_jax.data import Splits
from save_jax.errors import UserError
from tests.support import caching, media

RECIPE = Recipe(image_size=32, fbank_frames=64, max_frames=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """(sound, speech) -> a prepared folder of three videos to train on and two to test on."""
    made = {}

    def prepared(sound: bool, speech: bool):
        if (sound, speech) not in made:
            root, out = (tmp_path_factory.mktemp(name) for name in ("videos", "prepared"))
            ids = {"one": "train", "two": "train", "three": "train", "four": "test", "five": "test"}
            for number, name in enumerate(ids):
                tone = media.tone(1.0, 220.0 * (number + 1))[None] if sound else None
                media.write_video(root / f"{name}.mp4", media.numbered_frames(6), sound=tone)
            rows = [f"{name},{caption} stripe,{split}" for name, split in ids.items()
                    for caption in ("a", "no")]  # fmt: skip
            (root / "captions.csv").write_text("\n".join(["video_id,caption,split", *rows]))
            # Under 5 characters is no transcript (spec section 1).
            texts = {"one": "light the fire", "two": "oh", "four": "come in here"}
            asr = [{"key": f"{k}.mp4", "text": v if speech else "oh"} for k, v in texts.items()]
            (root / "asr.json").write_text(json.dumps(asr))
            prepare("folder", root=str(root), out=str(out), recipe=RECIPE, workers=1)
            made[sound, speech] = out
        return made[sound, speech]

    return prepared


def config(out, **changes):
    data = {"data__dataset": "folder", "data__variant": "default", "batch_size": 2}
    return caching.config(out, **data, **changes)


WITHOUT_TEACHER = {"loss__soft_albef_weight": 0.0}
LINE = (
    "data: test (2 clips) 100 % with sound, 50 % with a transcript, 0 % with the teacher's vectors"
    "; train (3 clips) 100 % with sound, 33.3 % with a transcript, 0 % with the teacher's vectors\n"
)


def test_one_line_says_what_the_clips_have(folder, capsys):
    splits = Splits(config(folder(sound=True, speech=True), **WITHOUT_TEACHER))
    capsys.readouterr()
    splits.evaluation(), splits.training()
    said = capsys.readouterr()
    assert said.out.startswith(LINE) and said.err == ""
    values = config(folder(sound=True, speech=True), mode="evaluate")
    evaluation = Splits(values).evaluation()
    assert capsys.readouterr().out == LINE.partition(";")[0] + "\n"
    facts = evaluate.protocol(evaluation, "x")
    assert facts["data"]["clips_with"] == {"sound": 100, "transcript": 50, "teacher": 0}
    assert facts["warnings"] == []


@pytest.mark.parametrize(
    ("sound", "speech", "changes", "named", "flags"),
    [
        (True, True, {}, ["soft-ALBEF: it compares clips that have"], "loss.soft_albef_weight"),
        (
            True,
            False,
            WITHOUT_TEACHER,
            ["speech: none has a transcript"],
            "model.speech_weight",
        ),
        (False, True, WITHOUT_TEACHER, ["sound: none has an audio track"], "model.sound_weight"),
        (
            False,
            False,
            {},
            ["sound: none has an audio track", "speech: none has a transcript"],
            "model.sound_weight model.speech_weight loss.soft_albef_weight",
        ),
    ],
)
def test_training_on_what_is_switched_on_and_not_there_is_refused(
    folder, capsys, sound, speech, changes, named, flags
):
    out = folder(sound=sound, speech=speech)
    with pytest.raises(UserError) as refusal:
        Splits(config(out, **changes)).training()
    message = str(refusal.value)
    assert message.startswith("the 3 clips in the split 'train' lack what the config")
    lines = [line.strip() for line in message.splitlines() if line.startswith("  ")]
    assert [line[: len(start)] for line, start in zip(lines, named, strict=True)] == named
    switches = [f"--config.{flag}=0" for flag in flags.split()]
    assert message.endswith(f"To train without on purpose, set {' '.join(switches)}")
    # And that is all that is needed.
    off = {flag.replace(".", "__"): 0.0 for flag in flags.split()}
    Splits(config(out, **{**changes, **off})).training()


def test_an_evaluation_says_what_its_results_do_not_show(folder, capsys):
    out = folder(sound=False, speech=False)
    evaluation = Splits(config(out, mode="evaluate")).evaluation()
    said = capsys.readouterr().err
    warnings = evaluate.protocol(evaluation, "x")["warnings"]
    assert [line[:44] for line in warnings] == [
        "no clip of the split 'test' has an audio tra",
        "no clip of the split 'test' has a transcript",
    ]
    assert said == "".join(f"warning: {line}\n" for line in warnings)
    off = {"model__sound_weight": 0.0, "model__speech_weight": 0.0, **WITHOUT_TEACHER}
    evaluation = Splits(config(out, mode="evaluate", **off)).evaluation()
    assert evaluate.protocol(evaluation, "x")["warnings"] == []
    assert capsys.readouterr().err == ""
