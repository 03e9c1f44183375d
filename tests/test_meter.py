"""What a run logs of its speed: steps, waiting for input, utilisation, time in steps that count."""

import json

import jax
import jax.numpy as jnp
import pytest

from save_jax import meter
from save_jax.errors import UserError
from save_jax.meter import Meter, Plan
from save_jax.optimizer import OptimizerConfig
from save_jax.progress import Writer

RATES = OptimizerConfig()
SCALARS = {"loss": 1.0, "contrastive": 1.0, "soft_albef": 0.0}
BEGAN = 1000.0  # by the clock on the wall


class Clock:
    """Both clocks that a meter reads."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def monotonic(self) -> float:
        return self.seconds

    def time(self) -> float:
        return BEGAN + self.seconds


@pytest.fixture
def clock(monkeypatch):
    found = Clock()
    monkeypatch.setattr(meter, "time", found)
    return found


def plan(steps: int = 10) -> Plan:
    return Plan(steps, 10, batch_size=8, eval_every=1, checkpoint_every=2, log_every=20)


def lines(workdir) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def start(workdir, clock, steps: range, plan: Plan, evaluated: int = 0, **known) -> None:
    """A start: ten seconds until its first step, then steps of two, a quarter of them input."""
    clock.seconds += 10
    writer = Writer(workdir, restored_step=steps.start - 1)
    found = Meter(plan, RATES, writer, first=steps.start - 1, began=BEGAN, **known)
    for step in steps:
        with found.waiting():
            clock.seconds += 0.5
        clock.seconds += 1.5
        found.log(step, SCALARS)
        if step == evaluated:
            with found.paused():
                clock.seconds += 30
    writer.close()


def test_steps_that_are_lost_and_done_again_count_once(tmp_path, clock):
    start(tmp_path, clock, range(1, 7), plan(), evaluated=4)  # killed at 52 s
    assert lines(tmp_path)[3]["goodput"] == pytest.approx(8 / 18)
    assert lines(tmp_path)[5]["goodput"] == pytest.approx(12 / 52)
    clock.seconds += 100  # until another machine is found
    start(tmp_path, clock, range(5, 11), plan())  # from checkpoint 4
    found = lines(tmp_path)
    assert [line["step"] for line in found] == list(range(1, 11))
    assert [line["kept_seconds"] for line in found] == pytest.approx(range(2, 22, 2))
    assert found[-1]["goodput"] == pytest.approx(20 / (52 + 100 + 10 + 12))
    for line in found:
        measured = [line[k] for k in ("step_seconds", "input_wait_seconds", "clips_per_second")]
        assert measured == pytest.approx([2, 0.5, 4])
        assert "utilisation" not in line  # of devices whose peak is unknown


def test_steps_between_a_line_and_a_checkpoint_count_too(tmp_path, clock):
    start(tmp_path, clock, range(1, 36), plan(200))
    start(tmp_path, clock, range(31, 61), plan(200))  # from checkpoint 30; the last line is of 20
    found = lines(tmp_path)
    assert [line["step"] for line in found] == [20, 40, 60]
    assert [line["kept_seconds"] for line in found] == pytest.approx([40, 80, 120])
    assert found[-1]["goodput"] == pytest.approx(120 / (10 + 70 + 10 + 60))


def test_goodput_is_a_share_whatever_the_clocks_say(tmp_path, clock):
    """The next host's clock may be behind."""
    start(tmp_path, clock, range(1, 7), plan())
    clock.seconds = -1000.0
    start(tmp_path, clock, range(7, 11), plan())
    assert lines(tmp_path)[-1]["goodput"] == 1


def test_a_run_whose_beginning_is_unknown_has_no_goodput(tmp_path):
    writer = Writer(tmp_path, 0)
    Meter(plan(), RATES, writer, first=0).log(1, SCALARS)
    writer.close()
    assert "goodput" not in lines(tmp_path)[0] and lines(tmp_path)[0]["kept_seconds"] > 0


def test_utilisation_is_of_the_programs_operations_and_compiling_is_no_step(tmp_path, clock):
    traced = []

    @jax.jit
    def product(x):
        traced.append(x)
        clock.seconds += 100
        return x @ x

    writer, peak = Writer(tmp_path, 0), 1e6
    found = Meter(plan(), RATES, writer, first=0, began=BEGAN, peak=peak)
    step, x = found.compiled(product), jnp.ones((50, 50))
    for number in (1, 2):
        step(x)
        clock.seconds += 2
        found.log(number, SCALARS)
    writer.close()
    assert len(traced) == 1
    for line, wall in zip(lines(tmp_path), (102, 104), strict=True):
        assert line["utilisation"] == pytest.approx(2 * 50**3 / 2 / peak)
        assert line["goodput"] == pytest.approx(line["kept_seconds"] / wall)


def test_a_device_without_a_known_peak_is_named_once(tmp_path, capsys):
    writer = Writer(tmp_path, 0)
    for dtype in ("float32", "bfloat16"):
        Meter.of({"dtype": dtype}, plan(), RATES, writer, first=0, began=None)
        said = capsys.readouterr().out
        assert said == (
            "utilisation is not logged: no peak rate is known here of devices of kind cpu\n"
        )
    writer.close()


def test_steps_to_trace_are_those_of_the_run():
    config = {"steps": 12, "epochs": 1, "batch_size": 8, "eval_every": 1}
    config |= {"checkpoint_every": 0, "log_every": 1}
    assert Plan.of({**config, "profile": "10:13"}, 4).traced == range(10, 13)
    assert not Plan.of({**config, "profile": ""}, 4).traced
    with pytest.raises(UserError, match="'10:20': expected steps of the run, 1 to 12, found 19"):
        Plan.of({**config, "profile": "10:20"}, 4)
