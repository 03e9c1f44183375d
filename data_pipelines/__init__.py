"""Files in, batches out: everything that reads media, text and prepared data sets."""

import os

# TensorFlow reads these when it is imported. It only decodes images here, so that its faster matrix
# products are of no use; announcing them, and its other greetings, would take up the screen.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
