"""Tests run on the CPU, as eight devices, with every shape annotation of `save_jax` checked."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        # Most of a test's time is compilation, and this halves it.
        "--xla_backend_optimization_level=0",
    ]
).strip()

from jaxtyping import install_import_hook

install_import_hook("save_jax", "beartype.beartype")

# With several test processes, the longest tests start first: nobody waits for the last of them.
LONGEST = ("test_readme.py", "test_full_size.py", "test_distributed.py", "test_cache.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONGEST)
