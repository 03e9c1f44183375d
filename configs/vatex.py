"""SAVE on VATEX; `configs/vatex.py:avigate` and `configs/vatex.py:clip4clip` are the baselines."""

from ml_collections import ConfigDict

from configs import base


def get_config(model: str = "save") -> ConfigDict:
    """Returns the published setting.

    Args:
        model: one of `base.MODELS`.
    """
    config = base.get_config()
    # Evaluated on "test", 1,500 clips and all their captions, as published results are. To choose
    # an epoch without a look at it, train with --config.data.eval_split=val.
    config.data.update(dataset="vatex", variant="default")
    config.loss.margin_delta = 0.05
    base.apply_model(config, model)
    return config
