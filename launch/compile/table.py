"""Formats the requirements of a config's compiled programs, as a table and as JSON."""

import json
import math
from typing import Any

from launch.compile import hlo, roofline
from launch.compile.program import Measured, Target
from launch.compile.roofline import GIB
from save_jax import sharding
from save_jax.messages import counted


def table(config: dict[str, Any], target: Target, measured: dict[str, Measured]) -> str:
    """Formats one row per quantity and one column per program; all figures are per chip."""
    room = f" of {target.chip.memory / GIB:g}" if target.chip else ""
    mesh = ", ".join(f"{name} {n}" for name, n in _mesh(config, target).items())
    lines = [
        f"{target.name}: {counted(len(target.devices), 'device')} "
        f"({target.devices[0].device_kind}; {mesh}), {config['dtype']}, "
        f"{counted(config['batch_size'], 'clip')} per training step, "
        f"{config['eval_batch_size']} per evaluation batch",
        "",
        f"{'per device':28}" + "".join(f"{name:>20}" for name in measured),
    ]

    def row(label: str, text: Any) -> None:
        cells = [text(m) for m in measured.values()]
        if any(cells):
            lines.append(f"{label:28}" + "".join(f"{cell:>20}" for cell in cells))

    row("memory, GiB: arguments", lambda m: number(m.arguments / GIB))
    row("  output, not aliased", lambda m: number(m.output / GIB))
    row("  temporaries", lambda m: number(m.temporaries / GIB))
    row("  program", lambda m: number(m.code / GIB))
    row(f"  total{room}", lambda m: number(m.needed / GIB) + ("" if m.fits else " NO"))
    row("matrix products, TFLOP", lambda m: number(m.flops / 1e12))
    row("HBM traffic, GB (estimate)", lambda m: number(m.hbm_bytes / 1e9))
    kinds = sorted({kind for m in measured.values() for kind in m.collectives})
    for kind in kinds:
        row(f"{kind}, MB received", lambda m, kind=kind: _collective(m.collectives.get(kind)))
    if target.chip:
        for name in roofline.Roofline._fields:
            row(
                f"least time by {name}, ms",
                lambda m, name=name: number(getattr(m.limits, name) * 1e3) if m.limits else "",
            )
        row(
            "roofline, ms",
            lambda m: f"{m.limits.bound} {number(m.limits.seconds * 1e3)}" if m.limits else "",
        )
    row("compile time, s", lambda m: f"{m.seconds:.1f}")
    loops = sum(m.unknown_loops for m in measured.values())
    if loops:
        verb = "is" if loops == 1 else "are"
        lines.append(f"{counted(loops, 'loop')} of unknown length {verb} counted once")
    return "\n".join(lines)


# The columns of `summary`.
HEAD = ("topology", "batch", "GiB a chip", "TFLOP a chip", "HBM GB", "sent MB")
HEAD += ("least step", "bound", "clips/s at most", "compiled in")


def summary(config: dict[str, Any], target: Target, step: Measured) -> tuple[str, ...]:
    """Formats the training step's row in a table of topologies."""
    room = f" of {target.chip.memory / GIB:g}" if target.chip else ""
    limits = step.limits
    return (
        target.name,
        str(config["batch_size"]),
        number(step.needed / GIB) + room + ("" if step.fits else " NO"),
        number(step.flops / 1e12),
        number(step.hbm_bytes / 1e9),
        number(sum(c.bytes for c in step.collectives.values()) / 1e6),
        f"{number(limits.seconds * 1e3)} ms" if limits else "",
        limits.bound if limits else "",
        f"{config['batch_size'] / limits.seconds:,.0f}" if limits else "",
        f"{step.seconds:.0f} s",
    )


def as_json(config: dict[str, Any], target: Target, measured: dict[str, Measured]) -> str:
    """Formats the same numbers as one line of JSON; an unknown number is null."""

    def plain(value: Any) -> Any:
        if isinstance(value, float) and not math.isfinite(value):
            return None
        if isinstance(value, roofline.Roofline):
            return {**value._asdict(), "seconds": value.seconds, "bound": value.bound}
        if hasattr(value, "_asdict"):
            return {name: plain(each) for name, each in value._asdict().items()}
        return {k: plain(v) for k, v in value.items()} if isinstance(value, dict) else value

    return json.dumps(
        {
            "topology": target.name,
            "devices": len(target.devices),
            "device_kind": target.devices[0].device_kind,
            "device_memory": target.chip.memory if target.chip else None,
            "mesh": _mesh(config, target),
            **{k: config[k] for k in ("batch_size", "micro_batch", "eval_batch_size", "dtype")},
            "remat": config["model"]["remat"],
            "fits": all(m.fits for m in measured.values()),
            "programs": {name: plain(m) for name, m in measured.items()},
        }
    )


def _mesh(config: dict[str, Any], target: Target) -> dict[str, int]:
    return dict(sharding.make_mesh(config["mesh"], target.devices).shape)


def number(value: float) -> str:
    """Formats a number with three significant digits; "?" if it is not finite."""
    if not math.isfinite(value):
        return "?"
    if abs(value) < 1e-3:
        return f"{value:.3g}"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def _collective(found: hlo.Collective | None) -> str:
    return f"{found.count} × = {number(found.bytes / 1e6)}" if found else "none"
