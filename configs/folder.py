"""SAVE on your own videos, prepared by `python -m data_pipelines.prepare folder --root=VIDEOS`.

`configs/folder.py:avigate` and `configs/folder.py:clip4clip` are the baselines.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(model: str = "save") -> ConfigDict:
    """Returns MSR-VTT's setting, on the splits that captions.csv names.

    Args:
        model: one of `base.MODELS`.
    """
    config = base.get_config()
    # Training reads "train". Evaluation ranks all clips of "test", those without a caption too, for
    # each of its captions; clips of which captions.csv does not say a split are in "test".
    config.data.update(dataset="folder", variant="default")
    base.apply_model(config, model)
    return config
