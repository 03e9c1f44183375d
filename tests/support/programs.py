"""How XLA compiles what tests run: most of a test's time is compilation.

These flags take it from 40 to 11 s of processor time for the smallest training step: optimise
nothing, and emit kernels the short way. The same flags everywhere, or one process could not use
what another has compiled.
"""

FAST = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"


def flags(devices: int = 1) -> str:
    """Returns XLA_FLAGS for a process that sees the CPU as so many devices."""
    return f"--xla_force_host_platform_device_count={devices} {FAST}"
