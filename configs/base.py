"""Every config key, with the reference's values (SAVE on MSR-VTT); experiments change what differs.

Rates, sizes and constants are those of the paper's released code; see each comment for what a key
means and `python -m save_jax.main --help` for how to set one from the command line.
"""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from save_jax import batch
from save_jax.errors import UserError
from save_jax.models.save import SAVEConfig
from save_jax.objectives import LossConfig
from save_jax.optimizer import OptimizerConfig

# The baselines are settings of the one model, not code of their own.
MODELS = {
    "save": {},
    "avigate": {
        "model.vision_weight": 0.95,
        "model.sound_weight": 0.05,
        "model.speech_weight": 0.0,
        "loss.soft_albef_weight": 0.0,
    },
    "clip4clip": {
        "model.sound_weight": 0.0,
        "model.speech_weight": 0.0,
        "model.frame_positions": False,
        "loss.margin_delta": 0.0,
        "loss.soft_albef_weight": 0.0,
        "loss.local_weight": 0.0,  # mean pooling: one vector a video
    },
}


class Model(ConfigDict):
    """The keys of the model: an encoder's value may change from a name to sizes, and back."""

    def __setitem__(self, key: str, value: Any) -> None:
        if key in ("clip", "ast") and isinstance(value, str | dict | ConfigDict):
            value = ConfigDict(value) if isinstance(value, dict) else value
            with self.ignore_type():
                super().__setitem__(key, value)
        else:
            super().__setitem__(key, value)


def apply_model(config: ConfigDict, name: str) -> None:
    """Turns a config of SAVE into one of the models above, in place.

    Raises:
        UserError: no such model.
    """
    if name not in MODELS:
        raise UserError(
            f"unknown model {name!r} after the config file's name: expected one of "
            f"{', '.join(MODELS)}"
        )
    config.update_from_flattened_dict(MODELS[name])


def get_config() -> ConfigDict:
    """Returns SAVE at full size, without a data set."""
    config = ConfigDict()
    # "train" resumes what the workdir holds. "evaluate" takes model, loss, words and frames from
    # the config.json of the run that it evaluates. "follow" evaluates the checkpoints of a run
    # that another job trains in the same workdir, so that the trainer need not stand still.
    config.mode = "train"
    config.seed = 0
    config.init_from = ""  # a run, or PyTorch weights (see save_jax/README.md); "" starts at random
    # Compute dtype: "float32" or "bfloat16" (NVIDIA: since Ampere); parameters stay float32.
    config.dtype = "float32"

    # Compiled programs, for the next start: a directory that other users may not write to, or a
    # bucket; "" compiles each time. JAX_COMPILATION_CACHE_DIR, if set, is used instead.
    config.compilation_cache = "~/.cache/save_jax/compiled"

    config.batch_size = 128  # global: over all devices of all hosts
    # Clips encoded at once, over all devices; 0: the whole batch. The same result in less memory,
    # plus the outputs of frozen encoders: 3.7 MB per clip in float32, 1.9 MB in bfloat16.
    config.micro_batch = 0
    # The most clips, and captions, of an evaluation's batch; a smaller split has smaller batches.
    config.eval_batch_size = 64
    config.eval_caption_batch_size = 512
    # similarity.npy is written up to so many entries, captions × videos; ranks.npz always is.
    config.eval_matrix_entries = 20_000_000
    config.epochs = 5
    config.steps = 0  # 0: from epochs
    config.eval_every = 1  # epochs between evaluations; the last step is always evaluated
    config.checkpoint_every = 500  # steps; evaluated steps are always kept
    # Checkpoints that are kept because they are still to be evaluated: more than that, and the
    # oldest is dropped. Only a follower that cannot keep up leaves so many.
    config.follow_keep = 5
    config.log_every = 20  # steps; runs of up to 100 steps log each
    # "10:20" writes a trace of steps 10 to 19, counted from 1, to WORKDIR/profile; "": none.
    config.profile = ""
    # Decay of a moving average of the trained parameters, say 0.999, which is evaluated beside
    # them: evaluation/STEP/ema. 0: none.
    config.ema = 0.0
    # Devices along each axis; -1: all that remain. Batches are sharded over both axes, parameters
    # and optimiser state along fsdp too: for models that are too large for one device. Any pair
    # whose product is the number of devices; of several TPU slices, fsdp is of one slice's.
    config.mesh = ConfigDict({"data": -1, "fsdp": 1})

    config.data = ConfigDict(
        {
            "dataset": "",
            "variant": "",
            "dir": "",  # a directory made by `python -m data_pipelines.prepare`
            "train_split": "train",
            "eval_split": "test",  # chooses the best checkpoint
            "test_split": "",  # reports it, at the end: evaluation/STEP/test; "": eval_split does
            "max_frames": batch.MAX_FRAMES,  # F
            "max_words": batch.MAX_WORDS,  # L, tokens of a caption and of a transcript
            "tokenizer": "",  # directory or hub id[@revision] of a CLIP tokenizer; "": the packaged
        }
    )

    # Outputs of frozen encoders, read instead of computed: the --out of `python -m save_jax.cache`,
    # on a disk that all processes see or in a bucket. AST is frozen as it is; with
    # optimizer.clip=0, which is close to the reference (its float16 CLIP hardly moves), CLIP is
    # too, and a step is many times as fast.
    config.cache = ConfigDict({"dir": ""})

    # The branches' weights (one of weight 0 does not exist), sizes, and what is recomputed in the
    # backward pass: save_jax/models/save.py says what each key means.
    config.model = Model(
        {
            **_defaults(SAVEConfig, "dtype"),
            "clip": "ViT-B/32",  # a name, or sizes: see save_jax/models/clip.py
            "ast": "base",  # likewise: save_jax/models/ast.py
            "attention": "auto",  # kernel: "xla"; "cudnn" (NVIDIA, bfloat16); "auto" chooses
        }
    )

    # The margin, soft-ALBEF and the similarity's parts: save_jax/objectives.py.
    config.loss = ConfigDict(_defaults(LossConfig))

    # Peak learning rates; a group of rate 0 is frozen, and costs no optimiser memory. What belongs
    # to which group: save_jax/optimizer.py. clip=0 freezes all of CLIP, temperature included.
    config.optimizer = ConfigDict(_defaults(OptimizerConfig, "total_steps", "ema"))
    return config


def _defaults(
    cls: type[SAVEConfig] | type[LossConfig] | type[OptimizerConfig], *without: str
) -> dict[str, Any]:
    """Returns the defaults of a dataclass of the code, the only place of each constant."""
    return {f.name: f.default for f in dataclasses.fields(cls) if f.name not in without}
