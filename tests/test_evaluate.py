"""Evaluation: padding and the shapes of the gallery change nothing; what is written, and when."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from launch import compare
from launch.report import __main__ as report
from save_jax import evaluate, metrics, sharding
from save_jax.progress import Writer
from tests.support import synthetic, system
from tests.support.training import BATCH, RATES, program


@pytest.fixture(scope="module")
def embedded():
    _, state, _, evaluator = program(RATES, 1)
    params = {**state.trained, **state.frozen}
    data = synthetic.evaluation_set(BATCH)
    return evaluator, params, data, evaluator.embed_videos(params, data)


def test_padding_rows_leave_no_trace(embedded):
    evaluator, params, data, videos = embedded
    assert evaluator.embed_captions(params, data.caption_ids).shape == (15, 16)
    assert videos.frames.shape == (11, 3, 16)
    np.testing.assert_array_equal(videos.mask, synthetic.clips(1, 11).frame_mask)
    # Other rows fill the last batch up; the same clips give the same embeddings.
    alone = synthetic.evaluation_set(BATCH, count=8)
    first = synthetic.rows(synthetic.clips(1, 11), np.arange(8))
    alone = alone._replace(batches=lambda: iter([first._replace(caption_ids=None)]))
    again = evaluator.embed_videos(params, alone)
    np.testing.assert_allclose(again.frames, videos.frames[:8], atol=1e-6)


@pytest.mark.parametrize(
    ("count", "most", "multiple", "size"),
    [(8, 64, 1, 8), (3, 64, 8, 8), (65, 64, 1, 33), (1000, 512, 8, 504), (10, 4, 8, 8)],
)
def test_batches_are_as_few_and_as_small_as_they_can_be(count, most, multiple, size):
    assert sharding.even_size(count, most, multiple) == size


def test_captions_are_padded_to_what_they_need(embedded, monkeypatch):
    evaluator, params, data, _ = embedded
    shapes, encode = [], evaluator.encode_text

    def recorded(params, ids):
        shapes.append(ids.shape)
        return encode(params, ids)

    whole = evaluator.embed_captions(params, data.caption_ids)
    monkeypatch.setattr(evaluator, "encode_text", recorded)
    few = evaluator.embed_captions(params, data.caption_ids[:3])
    assert shapes == [(3, synthetic.WORDS)]
    np.testing.assert_allclose(few, whole[:3], atol=1e-6)


def test_more_videos_than_captions_and_the_other_way_round(embedded):
    evaluator, params, data, *_ = embedded
    few = data._replace(
        captions=data.captions[:4],
        caption_ids=data.caption_ids[:4],
        video_of_caption=data.video_of_caption[:4],
        groups=data.groups[:4],
    )
    arrays, result = evaluator.evaluate(params, few)
    assert arrays["t2v_rank"].shape == (4,) and arrays["best_videos"].shape == (4, 10)
    assert (arrays["v2t_rank"] >= 0).tolist() == [True] * 4 + [False] * 7
    assert result["t2v"]["MnR"] == 1 + arrays["t2v_rank"].mean()
    assert result["v2t"]["MnR"] == 1 + arrays["v2t_rank"][:4].mean()
    assert evaluate.protocol(few, "x")["videos_with_captions"] == 4
    assert evaluate.protocol(data, "x")["v2t"] == "the best of each video's captions"
    assert evaluate.protocol(few, "x")["v2t"] == "the only caption of each video"


def evaluated(embedded, workdir) -> tuple[dict, dict]:
    """Evaluates into a directory: ranks.npz and metrics.json."""
    evaluator, params, data, _ = embedded
    writer = Writer(workdir, None)
    chosen = {"evaluator": evaluator, "data": data, "writer": writer, "workdir": workdir}
    evaluate.run_evaluation(params, 3, "now", **chosen)
    writer.close()
    folder = workdir / "evaluation" / "3"
    return dict(np.load(folder / "ranks.npz")), json.loads((folder / "metrics.json").read_text())


def test_the_matrix_is_written_up_to_a_size_and_ranks_always(
    embedded, tmp_path, monkeypatch, capsys
):
    evaluator, _, data, videos = embedded
    matrix = tmp_path / "evaluation" / "3" / "similarity.npy"
    ranks, result = evaluated(embedded, tmp_path)
    scores, own = np.load(matrix), data.video_of_caption
    assert result["similarity.npy"] == {"written": True, "entries": 165, "most": 10_000}
    assert result["t2v"] == metrics.retrieval_metrics(scores, own, data.groups)["t2v"]
    assert result["v2t"] == metrics.retrieval_metrics(scores, own, data.groups)["v2t"]
    np.testing.assert_array_equal(ranks["t2v_rank"], metrics.text_to_video(scores, own))
    np.testing.assert_array_equal(ranks["v2t_rank"], metrics.video_to_text(scores, own))
    np.testing.assert_array_equal(ranks["own_score"], scores[np.arange(15), own])
    np.testing.assert_array_equal(ranks["best_scores"], -np.sort(-scores, axis=1)[:, :10])
    for name in ("without_sound", "without_speech", "vision_alone"):
        assert ranks[f"t2v_rank_{name}"].shape == (15,)
    assert ranks["sound_gates"].shape == ranks["speech_gates"].shape == (11, 1, 2)
    np.testing.assert_array_equal(ranks["sound_gates"], videos.gates["sound"])
    assert "is not written" not in capsys.readouterr().out

    monkeypatch.setattr(evaluator, "matrix_entries", 164)
    again, smaller = evaluated(embedded, tmp_path)
    assert not matrix.exists()  # it would be of the evaluation before
    assert smaller.pop("similarity.npy") == {"written": False, "entries": 165, "most": 164}
    assert smaller == {k: v for k, v in result.items() if k != "similarity.npy"}
    assert (
        all((again[name] == ranks[name]).all() for name in ranks) and again.keys() == ranks.keys()
    )
    said = capsys.readouterr().out
    assert "similarity.npy is not written: it would have 165 entries, more than config." in said
    assert report.main([str(tmp_path)]) == compare.main([str(tmp_path)]) == 0


def test_a_large_gallery_is_not_ranked_without_its_branches(embedded, monkeypatch):
    evaluator, params, data, _ = embedded
    monkeypatch.setattr(evaluate, "ABLATED_UP_TO", 10)
    arrays, _ = evaluator.evaluate(params, data)
    assert not [name for name in arrays if name.startswith("t2v_rank_")]
    assert arrays["sound_gates"].shape == (11, 1, 2)


def test_a_matrix_that_the_disk_has_no_room_for_is_an_error_and_not_the_end(tmp_path):
    """A write to mapped memory without room ends the process: SIGBUS."""
    system.need("mount", "mount")
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if os.getuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can make a file system that is full")
    try:
        script = f"""
import pathlib
import numpy as np
from save_jax import evaluate
with evaluate._similarity_file(pathlib.Path({str(tmp_path)!r}), 1000, 1000, 10**7) as keep:
    keep(np.arange(1000), 0, np.ones((1000, 1000), np.float32))
"""
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert done.returncode == 1, done.returncode
        assert "OSError: [Errno 28] No space left on device" in done.stderr
        assert not list(tmp_path.iterdir()), "nothing is left of it"
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
