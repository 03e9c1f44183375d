"""What a sweep consists of, and what is refused before anything starts."""

import json
import pathlib

import pytest

from launch.sweep import points
from save_jax.errors import UserError
from tests.support import object_store, stand_in

EXAMPLE = "configs/demo_sweep.py"


def test_the_example_is_a_grid_with_readable_names():
    sweep = points.load(EXAMPLE, "runs/sweep", ["--config.steps=5"])
    assert list(sweep.points)[:2] == [
        "optimizer.new-0.0003__seed-0",
        "optimizer.new-0.0003__seed-1",
    ]
    assert len(sweep.points) == 6
    assert sweep.arguments("optimizer.new-0.003__seed-1") == [
        f"--config={EXAMPLE}",
        "--workdir=runs/sweep/optimizer.new-0.003__seed-1",
        "--config.steps=5",
        "--config.optimizer.new=0.003",
        "--config.seed=1",
    ]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ('yield {"nokey": 1}', "point 1 .*unknown config key 'nokey'"),
        ('yield {"seed": 1}; yield {"optimizer.nokey": 1}', "point 2 .*'optimizer.nokey'"),
        ('yield {"seed": "many"}', "point 1 .*expected a whole number"),
        ('yield {"seed": 1.5}', "point 1 .*seed"),
        ('yield {"optimizer.new": -1.0}', "point 1 .*at least 0"),
        ('yield {"model.clip.patch_size": 7}', "point 1 .*not a multiple of patch_size"),
        ('yield {"steps": 6}', "steps, which the command line sets too"),
        ('yield {"optimizer.new": 1}; yield {"optimizer.new": 1.0}', "point 2 .*there twice"),
        ("yield 3", r"point 1 .*expected a dictionary"),
        ("return []", "yields no points"),
    ],
)
def test_a_mistake_in_a_point_names_it(write_config, body, message):
    with pytest.raises(UserError, match=message):
        points.load(write_config(body), "runs", ["--config.steps=5"])


def test_a_config_without_a_sweep_is_refused():
    with pytest.raises(UserError, match=r"configs/demo\.py defines no sweep\(\)"):
        points.load("configs/demo.py", "runs", [])


def test_a_config_that_is_not_there_is_refused():
    with pytest.raises(UserError, match=r"configs/nope\.py"):
        points.load("configs/nope.py", "runs", [])


def test_names_are_safe_short_and_different():
    assert points.point_name({}) == "base"
    slash, dash = (points.point_name({"model.clip": f"ViT-B{sign}16"}) for sign in "/-")
    assert dash == "model.clip-ViT-B-16"
    assert slash.startswith("model.clip-ViT-B-16-") and slash != dash
    long = [points.point_name({"data.dir": "x" * 300 + end}) for end in "ab"]
    assert all(len(name) <= points.LONGEST_NAME for name in long) and long[0] != long[1]
    assert points.point_name({"mesh": {"data": 2, "fsdp": 4}}).startswith("mesh--data-2-fsdp-4")


def test_a_point_may_be_any_type_the_command_line_takes(write_config):
    body = 'yield {"model.clip": "ViT-B/16", "mesh": {"data": 2}, "model.frame_positions": False}'
    path = write_config(body)
    pathlib.Path(path).write_text(
        pathlib.Path(path).read_text().replace("demo", "msrvtt").replace("msrvtt_", "demo_")
    )
    (name,) = (sweep := points.load(path, "runs", [])).points
    resolved = points.resolve(path, sweep.arguments(name)[2:])
    assert resolved["model"]["clip"] == "ViT-B/16"
    assert resolved["mesh"] == {"data": 2}
    assert resolved["model"]["frame_positions"] is False


def test_only_what_is_missing(tmp_path):
    sweep = points.load(EXAMPLE, str(tmp_path), ["--config.steps=5"])
    names = list(sweep.points)
    assert stand_in.main([a for a in sweep.arguments(names[2])[1:]]) == 0
    assert points.missing(sweep) == [name for name in names if name != names[2]]


def test_the_record_keeps_points_and_refuses_another_sweep(tmp_path, write_config):
    config = write_config('yield {"seed": 1}')
    points.record(points.load(config, str(tmp_path / "s"), []))
    write_config('yield {"seed": 2}')
    points.record(points.load(config, str(tmp_path / "s"), []))
    recorded = json.loads((tmp_path / "s/sweep.json").read_text())
    assert recorded["points"] == {"seed-1": {"seed": 1}, "seed-2": {"seed": 2}}
    with pytest.raises(UserError, match="holds another sweep"):
        points.record(points.load(config, str(tmp_path / "s"), ["--config.steps=5"]))
    (tmp_path / "s/sweep.json").write_text("{")
    with pytest.raises(UserError, match=r"sweep\.json cannot be read"):
        points.record(points.load(config, str(tmp_path / "s"), []))


def test_a_sweep_in_a_bucket():
    store = object_store.register()
    sweep = points.load(EXAMPLE, "gs://bucket/sweep", [])
    assert points.missing(sweep) == list(sweep.points)
    points.record(sweep)
    points.record(sweep)
    assert len(json.loads(store.cat("gs://bucket/sweep/sweep.json"))["points"]) == 6
