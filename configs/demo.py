"""A few minutes of SAVE on two CPU cores, on clips that the demo makes itself.

`configs/demo.py` is SAVE; `configs/demo.py:avigate` and `configs/demo.py:clip4clip` are the
baselines. Everything is small and trains from scratch, AST included.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(model: str = "save") -> ConfigDict:
    """Returns the demo.

    Args:
        model: one of `base.MODELS`.
    """
    config = base.get_config()
    config.data.update(dataset="demo", variant="default", dir="demo_data", max_frames=4)
    config.model.clip = {  # sizes instead of the name of a variant
        "embed_dim": 64,
        "image_size": 32,
        "patch_size": 8,
        "vision_width": 64,
        "vision_layers": 2,
        "vision_heads": 4,
        "text_width": 64,
        "text_layers": 2,
        "text_heads": 4,
    }
    config.model.ast = {
        "fbank_frames": 128,
        "stride": 16,
        "width": 64,
        "layers": 2,
        "heads": 4,
    }
    config.model.fusion_layers = 2
    # The reference's 0.02 belongs to a width of 512; √(512/64) times that keeps the variance. With
    # less, the gates start closed, and a few minutes are too short for speech to be learnt.
    config.model.init_std = 0.06
    config.batch_size = 64
    config.epochs = 7
    config.checkpoint_every = 200
    # From scratch, everything learns; the reference's rates are for pretrained towers.
    config.optimizer.update(clip=1e-3, clip_stem=1e-3, ast=1e-3, ast_norm=1e-3, new=1e-3)
    base.apply_model(config, model)
    return config
