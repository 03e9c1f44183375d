"""The short form of `python -m launch.chaos`: real runs, real signals, bit-equal in the end."""

import json

import numpy as np
import pytest

from launch.chaos import __main__ as command
from launch.chaos import campaign, verdicts
from launch.chaos.jobs import CHECKPOINT, STAGES
from tests.support import caching
from tests.test_workdir import prepared

# Of the demo's config, at the sizes of the miniature data.
SIZES = [f"--config.{key}={value}" for key, value in caching.CHANGES.items() if key != "steps"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("a"), tmp_path_factory.mktemp("b"), n_test=8)


def test_a_run_that_is_struck_ends_with_the_bits_of_one_that_is_not(data, tmp_path, capsys):
    options = [f"--data={data}", f"--workdir={tmp_path}", "--models=clip4clip", *SIZES]
    assert command.main([*options, "--faults=1", "--least=0"]) == 0
    (case, *_) = [json.loads(line) for line in (tmp_path / "chaos.jsonl").read_text().splitlines()]
    assert case["verdict"] == "bit-equal" and case["distance"] == 0
    assert "faults, nothing lost: start-up " in capsys.readouterr().out
    # What is done is not done again, whatever a kill has left; another seed is another campaign.
    with open(tmp_path / "chaos.jsonl", "a") as journal:
        journal.write('{"case": 1, "se')
    assert command.main([*options, "--faults=1", "--least=0"]) == 0
    assert command.main([*options, "--faults=1", "--least=0", "--seed=1"]) == 2
    assert "holds a campaign of --seed=0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data=EMPTY", "--workdir=W"], "expected prepared data"),
        (["--data=DATA", "--workdir=FULL"], "expected an empty directory, or a new one"),
        (["--data=DATA", "--workdir=W", "--faults=-1"], "expected --faults of at least 1"),
        (["--data=DATA", "--workdir=W", "--models=sav"], "expected some of"),
        (["--data=DATA", "--workdir=W", "--nope=1"], "--nope"),
    ],
)
def test_mistakes_are_told_before_anything_is_run(data, tmp_path, capsys, flags, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "case0").write_text("somebody's")
    places = {"EMPTY": "empty", "FULL": "full", "W": "new"}
    for name, place in places.items():
        flags = [flag.replace(f"={name}", f"={tmp_path / place}") for flag in flags]
    flags = [flag.replace("=DATA", f"={data}") for flag in flags]
    assert command.main(flags) == 2
    assert message in capsys.readouterr().err
    assert (tmp_path / "full" / "case0").exists()


class Finished:
    """A job that has ended."""

    def __init__(self, logs, *codes: int):
        self.logs, self._codes = logs, codes

    def codes(self):
        return list(self._codes)

    def said(self, number: int = 0) -> str:
        return "what it said"


@pytest.mark.parametrize(
    ("codes", "stage", "name", "victims", "fine"),
    [
        ((-9, 75), "step", "SIGKILL", [0], True),
        ((-9, -6), "step", "SIGKILL", [0], True),
        ((-9, 1), "step", "SIGKILL", [0], False),  # nothing would start it again
        ((-9, -9), "step", "SIGKILL", [0], False),  # it hung, and was killed
        ((-9, -9), "start-up", "SIGKILL", [0], True),  # it waited for the one that never came
        ((75, 75), "evaluation", "SIGTERM", [1], True),
        ((75, 2), "evaluation", "SIGTERM", [1], False),
        ((0, 75), "", "SIGTERM", [1], False),  # the signal was never sent
    ],
)
def test_what_ends_are_such_that_the_job_is_started_again(
    tmp_path, codes, stage, name, victims, fine
):
    job = Finished(tmp_path, *codes)
    number = getattr(campaign.signal, name)
    if fine:
        verdicts.check_ends(job, stage, number, victims)
        return
    with pytest.raises(verdicts.Failure, match="what it said"):
        verdicts.check_ends(job, stage, number, victims)


def test_a_difference_in_one_bit_fails_the_case(tmp_path):
    one, other = ({"a": np.float32([1, 2])} for _ in range(2))
    assert verdicts.distance(one, other) == 0
    other["a"][1] = np.nextafter(np.float32(2), np.float32(3))
    assert verdicts.distance(one, other) > 0
    assert verdicts.distance(one, {"b": one["a"]}) == float("inf")


def test_cases_follow_from_the_seed_and_have_every_kind():
    def first(seed):
        found = campaign.cases(seed, ["save", "clip4clip"])
        return [next(found) for _ in range(16)]

    assert first(3) == first(3) != first(4)
    assert {case.kind for case in first(3)} == {"same", "other", "long", "stopped"}
    assert {shape.processes for case in first(3) for shape in case.shapes} == {1, 2, 4}
    assert CHECKPOINT in STAGES
