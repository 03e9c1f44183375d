"""The splits of a config: what lacks labels of soft-ALBEF, and the batches of an evaluation."""

import jax
import numpy as np
import pytest

from data_pipelines.prepare import prepare
from data_pipelines.recipe import Recipe
from save_jax.data import Splits
from save_jax.errors import UserError
from tests.support import caching, miniatures


@pytest.mark.parametrize(
    ("lacking", "told", "refused"),
    [
        (0, "soft-ALBEF aligns 4 of 5 clips, and leaves out 1 without an audio track\n", ""),
        (
            1,
            "soft-ALBEF aligns 3 of 5 clips, and leaves out 1 without an audio track and 1 with "
            "sound but without the teacher's vectors\n",
            "",
        ),
        (
            3,
            "",
            "soft-ALBEF: it compares clips that have sound and the teacher's vectors, and has 1 (1 "
            "without an audio track and 3 with sound but without the teacher's vectors). ",
        ),
        (4, "", "and has 0 (1 without an audio track and 4 with sound but without the teacher's"),
    ],
)
def test_training_says_for_how_many_clips_there_are_labels(
    tmp_path, capsys, lacking, told, refused
):
    root, out = tmp_path / "miniature", tmp_path / "prepared"
    miniatures.msrvtt(root, n_train=5, n_test=3)  # the fourth clip is silent
    for video in ("video0", "video1", "video2", "video4")[:lacking]:
        (root / f"FeatureData/ImageBind/VideoFeature/{video}.pt").unlink()
    recipe = Recipe(image_size=32, fbank_frames=64, max_frames=4)
    prepare("msrvtt", root=str(root), out=str(out), recipe=recipe, workers=1)
    capsys.readouterr()

    if refused:
        with pytest.raises(UserError) as refusal:
            Splits(caching.config(out)).training()
        assert refused in str(refusal.value)
        assert "--imagebind=imagebind_huge.pth" in str(refusal.value)
        assert "--config.loss.soft_albef_weight=0" in str(refusal.value)
    else:
        Splits(caching.config(out)).training()
        assert told in capsys.readouterr().out

    capsys.readouterr()
    Splits(caching.config(out, loss__soft_albef_weight=0.0)).training()
    assert "soft-ALBEF" not in "".join(capsys.readouterr())


def test_a_small_split_is_evaluated_in_a_small_batch(tmp_path):
    """Eight clips were once computed as 64."""
    root, out = tmp_path / "miniature", tmp_path / "prepared"
    miniatures.msrvtt(root, n_train=1, n_test=3)
    recipe = Recipe(image_size=32, fbank_frames=64, max_frames=4)
    prepare("msrvtt", root=str(root), out=str(out), recipe=recipe, workers=1)
    [batch] = Splits(caching.config(out, eval_batch_size=64)).evaluation().batches()
    assert len(batch.index) == jax.device_count()
    np.testing.assert_array_equal(batch.index, [0, 1, 2, *[-1] * (jax.device_count() - 3)])
