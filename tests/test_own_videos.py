"""One's own videos, with the tiny model and the commands that configs/README.md shows."""

import json
import pathlib
import shlex

import jax
import pytest

from data_pipelines import prepare
from save_jax import main, train
from tests.support import media

README = pathlib.Path(__file__).parents[1] / "configs/README.md"


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """The page's config as a file, and its two commands on three clips, as lists of flags."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "videos").mkdir()
    for number, name in enumerate(("one", "two", "three")):
        sound = media.tone(1.0, 220.0 * (number + 1))[None]
        media.write_video(
            folder / f"videos/{name}.mp4", media.numbered_frames(10)[number:], sound=sound
        )
    captions = (
        "video_id,caption,split\none,a stripe,train\ntwo,two stripes,train\nthree,three,test\n"
    )
    (folder / "videos/captions.csv").write_text(captions)
    text = README.read_text(encoding="utf-8").partition("`tiny.py`, for a first look:")[2]
    (folder / "tiny.py").write_text(text.split("```python\n")[1].split("```")[0])
    commands = text.split("```bash\n")[1].split("```")[0].replace("\\\n", " ")
    places = {"VIDEOS": "videos", "PREPARED": "prepared", "RUN": "run", "tiny.py": "tiny.py"}
    for place, name in places.items():
        commands = commands.replace(f"={place}", f"={folder / name}")
    first, second = (shlex.split(line)[3:] for line in commands.splitlines())
    assert prepare.main([*first, "--workers=1"]) == 0
    return folder, ["save_jax.main", *second, "--config.eval_batch_size=2"]


@pytest.fixture
def one_device(monkeypatch):
    """Two clips are too few for the tests' eight."""
    one = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: one)


def test_the_tiny_example_trains_and_is_evaluated(example, one_device, capsys):
    folder, command = example
    assert main.main([*command, "--config.steps=1"]) == 0
    said = capsys.readouterr()
    assert "training on 2 clips, 2 captions: 1 step per epoch\n" in said.out
    assert "\ntest: 1 caption, 1 video, " in said.out
    assert said.err == ""

    assert main.main([*command, "--config.steps=1", "--config.mode=evaluate"]) == 0
    run = folder / "run"
    said = capsys.readouterr().out
    before, _, after = said.partition("text → video")
    assert (
        f"evaluating checkpoint {run}/checkpoints/1 (step 1) on the split 'test': 1 caption, "
        f"1 video; the results go to {run}/evaluation/1\n"
    ) in before
    assert after.endswith(f"the results are in {run}/evaluation/1\n")
    assert json.loads((run / "evaluation/1/metrics.json").read_text())["protocol"]["videos"] == 1


def test_random_encoders_at_rates_for_pretrained_ones_are_warned_of(
    example, one_device, monkeypatch, capsys
):
    folder, command = example
    monkeypatch.setattr(train, "train", lambda *_, **__: False)
    rates = ["--config.optimizer.clip=1e-7", "--config.optimizer.ast=0"]
    assert main.main([*command, f"--workdir={folder / 'slow'}", *rates]) == 75
    said = capsys.readouterr().err
    assert said.startswith(
        "warning: the encoders start at random and hardly learn: config.optimizer.clip = 1e-07, "
        "config.optimizer.ast = 0 (rates for pretrained weights; 0 is frozen). Give pretrained "
        "weights, --config.init_from="
    )
