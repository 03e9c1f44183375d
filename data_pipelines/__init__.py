"""Files in, batches out: everything that reads media, text and prepared data sets."""

import os

from save_jax import errors as errors  # first: with it, Ctrl-C ends a start with one message

# TensorFlow reads these when it is imported. It only decodes images here: its faster matrix
# products are of no use, and announcing them, with its other start-up messages, fills the screen.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

# etils.epath reads this once: gs:// and s3:// are opened by fsspec even where there is TensorFlow,
# which cannot read s3:// and must not be imported by the processes that read media.
os.environ.setdefault("EPATH_USE_TF", "0")

# Otherwise transformers, used for its tokenizer and its Mel filters alone, asks for PyTorch.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
