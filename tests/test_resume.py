"""A run is resumed with any config and place of its data that cannot change its result."""

import json

import pytest

from configs import base
from save_jax import recorded, resume
from save_jax.errors import UserError

DIGESTS = {"train": "1" * 64, "test": "2" * 64}
# Of each kind, and of the sections, a value that base.py has not.
CHANGED = {
    "eval_batch_size": 128,
    "eval_caption_batch_size": 128,
    "eval_matrix_entries": 9,
    "data.dir": "/local/prepared",
    "init_from": "elsewhere",
    "eval_every": 3,
    "follow_keep": 3,
    "data.test_split": "other",
    "checkpoint_every": 7,
    "log_every": 1,
    "mode": "evaluate",
    "micro_batch": 16,
    "mesh.data": 4,
    "mesh.fsdp": 2,
    "model.remat": "blocks",
    "model.attention": "xla",
    "cache.dir": "/cache",
    "compilation_cache": "/programs",
    "profile": "2:4",
}


def config(**changes) -> dict:
    found = base.get_config()
    found.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return found.to_dict()


@pytest.fixture
def run(tmp_path):
    """A workdir whose run has a checkpoint and digests of its data."""
    (tmp_path / "checkpoints/5/default").mkdir(parents=True)
    recorded.write(config(), tmp_path, {"digests": DIGESTS}, {"step": 0})
    return tmp_path


def test_what_cannot_change_the_result_may_change(run):
    resume.check_same_config(config(**CHANGED), run)
    covered = {key for key in recorded.FREE if any(f"{c}.".startswith(f"{key}.") for c in CHANGED)}
    assert covered == set(recorded.FREE)


def test_every_other_key_counts(run):
    """Those of today, and any that is added without being listed."""
    free = tuple(f"{key}." for key in recorded.FREE)
    flat = recorded.flatten(config())
    others = [key for key in flat if not f"{key}.".startswith(free)]
    assert len(others) > 30
    for key in others:
        changed = json.loads(json.dumps(config()))
        *sections, last = key.split(".")
        place = changed
        for section in sections:
            place = place[section]
        place[last] = {"model.clip": "ViT-L/14", "model.ast": {"width": 96}}.get(key, "another")
        with pytest.raises(UserError, match=rf"\n  {key}[.:]"):
            resume.check_same_config(changed, run)
    with pytest.raises(UserError, match=r"\n  optimizer\.newer: '\(absent\)' there, 1 now\n"):
        resume.check_same_config({**config(), "optimizer": {"newer": 1}}, run)


def test_a_run_of_an_earlier_version_has_the_defaults_of_newer_keys(run):
    path = run / "config.json"
    older = json.loads(path.read_text())
    del older["micro_batch"], older["loss"]["soft_albef_weight"], older["model"]["init_std"]
    older["model"]["clip"] = {"patch_size": 16}  # one of the sizes that there are today
    path.write_text(json.dumps(older))
    sizes = {"patch_size": 16, "vision_width": 768}
    same = config()
    same["model"]["clip"] = sizes
    resume.check_same_config(same, run)
    same["loss"]["soft_albef_weight"] = 0.5
    same["model"]["clip"] = {**sizes, "vision_width": 512}
    with pytest.raises(UserError) as refusal:
        resume.check_same_config(same, run)
    lines = [line for line in str(refusal.value).splitlines() if line.startswith("  ")]
    assert lines == [
        "  loss.soft_albef_weight: 1.0 there, 0.5 now",
        "  model.clip.vision_width: 768 there, 512 now",
    ]


def test_weights_to_start_from_count_until_there_is_a_checkpoint(tmp_path):
    recorded.write(config(), tmp_path, {"digests": DIGESTS}, {"step": 0})
    with pytest.raises(UserError, match="init_from: '' there, 'elsewhere' now"):
        resume.check_same_config(config(init_from="elsewhere"), tmp_path)


def test_the_place_of_data_counts_where_no_digest_tells_them_apart(run):
    path = run / "config.json"
    path.write_text(json.dumps(config(data__dir="/old")))  # as a version wrote it that took none
    resume.check_same_config(config(data__dir="/old"), run)
    with pytest.raises(UserError, match=r"data\.dir: '/old' there, '/new' now"):
        resume.check_same_config(config(data__dir="/new"), run)
    (run / "data.json").write_text(json.dumps(DIGESTS))  # where the next version kept them
    resume.check_same_config(config(data__dir="/new"), run)


def test_data_are_compared_by_their_digests(run, tmp_path):
    resume.check_same_data(DIGESTS, run)
    other = {**DIGESTS, "test": "3" * 64}
    with pytest.raises(UserError, match="the split 'test' was prepared anew") as refusal:
        resume.check_same_data(other, run)
    assert "'train'" not in str(refusal.value)
    (tmp_path / "config.json").write_text(json.dumps(config()))  # of an earlier version
    (tmp_path / "data.json").write_text(json.dumps(DIGESTS))
    with pytest.raises(UserError, match="the split 'test' was prepared anew"):
        resume.check_same_data(other, tmp_path)


def test_what_a_later_start_changes_is_recorded(run):
    path = run / "config.json"
    first = json.loads(path.read_text())
    for step in (5, 10):
        recorded.write(config(eval_batch_size=128), run, {"digests": {}}, {"step": step})
    found = json.loads(path.read_text())
    starts = found[recorded.PROVENANCE].pop("starts")
    assert [(start["step"], start["changed"]) for start in starts] == [
        (0, {}),
        (5, {"eval_batch_size": 128}),  # and not at 10, where nothing else has changed
    ]
    assert starts[:1] == first[recorded.PROVENANCE].pop("starts")
    assert found == first and found["eval_batch_size"] == 64  # the rest is the first start's
