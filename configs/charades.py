"""SAVE on Charades; `configs/charades.py:avigate` and the like are the baselines."""

from ml_collections import ConfigDict

from configs import base


def get_config(model: str = "save") -> ConfigDict:
    """Returns the published setting.

    Args:
        model: one of `base.MODELS`.
    """
    config = base.get_config()
    # There is no validation split: published results are the best epoch on "test" itself. A run's
    # summary gives both the last epoch and the best, so named.
    config.data.update(dataset="charades", variant="default")
    # Clips are half a minute long, and their captions are whole scripts.
    config.data.update(max_frames=32, max_words=64)
    config.batch_size = 64
    base.apply_model(config, model)
    return config
