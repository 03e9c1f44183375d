"""How XLA compiles what tests run: most of a test's time is compilation.

These flags take it from 40 to 11 s of processor time for the smallest training step: optimise
nothing, and emit kernels the short way. The same flags everywhere (but at full size), or one
process could not use what another has compiled.
"""

FAST = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"

# At full size it is the computation that takes long: 124 s of processor time instead of 224 s for
# two steps and an evaluation.
FULL_SIZE = "--xla_backend_optimization_level=1"


def flags(devices: int = 1) -> str:
    """Returns XLA_FLAGS for a process that sees the CPU as so many devices."""
    return f"--xla_force_host_platform_device_count={devices} {FAST}"
