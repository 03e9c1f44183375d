"""Evaluation: padding, tiling and the shapes of the gallery change nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from save_jax import evaluate, metrics
from save_jax.similarity import similarity
from tests.support import synthetic
from tests.support.training import BATCH, RATES, program


@pytest.fixture(scope="module")
def embedded():
    _, state, _, evaluator = program(RATES, 1)
    params = {**state.trained, **state.frozen}
    data = synthetic.evaluation_set(BATCH)
    text = evaluator.embed_captions(params, data.caption_ids)
    return evaluator, params, data, text, *evaluator.embed_videos(params, data)


def test_padding_rows_leave_no_trace(embedded):
    evaluator, params, _, text, frames, mask = embedded
    assert text.shape == (15, 16) and frames.shape == (11, 3, 16) and mask.shape == (11, 3)
    np.testing.assert_array_equal(mask, synthetic.clips(1, 11).frame_mask)
    # Other rows fill the last batch up; the same clips give the same embeddings.
    alone = synthetic.evaluation_set(BATCH, count=8)
    first = synthetic.rows(synthetic.clips(1, 11), np.arange(8))
    alone = alone._replace(batches=lambda: iter([first._replace(caption_ids=None)]))
    again, _ = evaluator.embed_videos(params, alone)
    np.testing.assert_allclose(again, frames[:8], atol=1e-6)


def test_tiles_make_the_whole_matrix(embedded, monkeypatch):
    evaluator, params, _, text, frames, mask = embedded
    monkeypatch.setattr(evaluate, "CAPTIONS_AT_ONCE", 4)
    monkeypatch.setattr(evaluate, "VIDEOS_AT_ONCE", 3)
    tiled = evaluator.similarity(params, text, frames, mask)
    scale = jnp.exp(params["clip.logit_scale"])
    whole = jax.jit(similarity)(jnp.array(text), jnp.array(frames), jnp.array(mask), scale)
    np.testing.assert_allclose(tiled, whole, atol=2e-5)


def test_more_videos_than_captions_and_the_other_way_round(embedded):
    evaluator, params, data, *_ = embedded
    few = data._replace(
        captions=data.captions[:4],
        caption_ids=data.caption_ids[:4],
        video_of_caption=data.video_of_caption[:4],
        groups=data.groups[:4],
    )
    scores, result = evaluator.evaluate(params, few)
    assert scores.shape == (4, 11)
    assert result["t2v"]["MnR"] == 1 + metrics.text_to_video(scores, few.video_of_caption).mean()
    assert evaluate.protocol(few, "x")["videos_with_captions"] == 4
    assert evaluate.protocol(data, "x")["v2t"] == "the best of each video's captions"
    assert evaluate.protocol(few, "x")["v2t"] == "the only caption of each video"
