"""SAVE on MSR-VTT: `configs/msrvtt.py` is 9k; `:7k`, `:7k-1ka`, and `:9k,avigate` and the like."""

from ml_collections import ConfigDict

from configs import base
from save_jax.errors import UserError

SPLITS = ("9k", "7k", "7k-1ka")


def get_config(options: str = "9k") -> ConfigDict:
    """Returns the published setting.

    Args:
        options: a split ("9k", "7k", "7k-1ka") and a model (`base.MODELS`), comma-separated.
    """
    config = base.get_config()
    # 9k and 7k-1ka have no validation split: published results are the best epoch on "test" itself,
    # JSFusion's 1,000 clips with a caption each. A run's summary gives both the last epoch and the
    # best, so named. 7k has a "val"; its "test" is 2,990 clips with 20 captions each.
    config.data.dataset, config.data.variant = "msrvtt", "9k"
    for option in options.split(","):
        if option in SPLITS:
            config.data.variant = option
        elif option in base.MODELS:
            base.apply_model(config, option)
        else:
            raise UserError(
                f"unknown model {option!r} after the config file's name: expected one of "
                f"{', '.join(base.MODELS)}, or a split: {', '.join(SPLITS)}"
            )
    return config
