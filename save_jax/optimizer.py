"""Parameter groups, BertAdam and its schedule (spec section 7)."""

import collections
import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from save_jax.parameters import Parameters

BETA_1, BETA_2, EPSILON = 0.9, 0.98, 1e-6
MAX_NORM, NORM_EPSILON = 1.0, 1e-6
WARMUP = 0.1  # of all steps
MAX_LOGIT_SCALE = math.log(100)

Number = float | np.floating | jax.Array

GROUPS = ("clip", "clip_stem", "ast", "ast_norm", "new", "query_tokens")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Peak learning rate of each group; 0 freezes a group, and then it costs no memory.

    Attributes:
        clip: all transformer blocks of both CLIP towers, `ln_final`, `text_projection`,
            `ln_post`, `proj`, `logit_scale`.
        clip_stem: CLIP's embeddings, positions, patch convolution and `ln_pre`.
        ast: AST without its final LayerNorm.
        ast_norm: AST's final LayerNorm.
        new: what SAVE adds: audio projection, resampler, fusion blocks, positions.
        query_tokens: the resampler's queries.
        weight_decay: of every trained group; biases are not decayed.
        total_steps: length of the schedule.
        ema: decay of the average of the trained parameters; 0 = there is none.
    """

    clip: float = 1e-7
    clip_stem: float = 0.0
    ast: float = 0.0
    ast_norm: float = 1e-7
    new: float = 1e-4
    query_tokens: float = 1e-2
    weight_decay: float = 0.2
    total_steps: int = 1
    ema: float = 0.0

    def rate(self, group: str) -> float:
        return getattr(self, group)


ALL_FROZEN = OptimizerConfig(
    clip=0.0, clip_stem=0.0, ast=0.0, ast_norm=0.0, new=0.0, query_tokens=0.0
)  # for evaluation: no optimiser state at all


def group_of(name: str) -> str:
    """Returns the group of a parameter, by its name (`save_jax.parameters`)."""
    if name == "audio_resampler.query_tokens":
        return "query_tokens"
    if name.startswith("ast."):
        return "ast_norm" if name.startswith("ast.norm.") else "ast"
    if name.startswith("clip."):
        stem = (
            "clip.visual.conv1.",
            "clip.visual.class_embedding",
            "clip.visual.ln_pre.",
            "clip.visual.positional_embedding",
            "clip.text.token_embedding",
            "clip.text.positional_embedding",
        )
        return "clip_stem" if name.startswith(stem) else "clip"
    return "new"


def partition(parameters: Parameters, config: OptimizerConfig) -> tuple[Parameters, Parameters]:
    """Splits parameters into those that train and those that are frozen."""
    trained = {k: v for k, v in parameters.items() if config.rate(group_of(k))}
    return trained, {k: v for k, v in parameters.items() if k not in trained}


class Pace(NamedTuple):
    """The schedule's numbers, float32 scalars.

    Attributes:
        warmup: steps of the warm-up, perhaps not a whole number.
        rise: what each step of the warm-up adds, as a share of the peak.
        angle: radians of the cosine that each step goes on.
    """

    warmup: Number
    rise: Number
    angle: Number

    @classmethod
    def of(cls, total_steps: int) -> "Pace":
        """Returns the numbers of a schedule of so many steps."""
        # A step multiplies by what is divided here, in float32: what a device's compiler makes of a
        # division is its own affair, and at x = 0.1 that would matter.
        step = 1 / np.float32(total_steps)
        rise, angle = step * (1 / np.float32(WARMUP)), np.float32(np.pi) * step
        return cls(np.float32(WARMUP * total_steps), rise, angle)


class Hyperparameters(NamedTuple):
    """The optimiser's numbers, float32 scalars: arguments of the compiled step.

    Runs that differ in nothing else share one program, as those of a sweep do. Which groups train
    is part of the program.

    Attributes:
        peaks: peak learning rate by group, of the groups that train.
        weight_decay: of every trained group.
        pace: of the schedule.
        ema: decay of the average; None = there is none.
    """

    peaks: Mapping[str, Number]
    weight_decay: Number
    pace: Pace
    ema: Number | None = None

    @classmethod
    def of(cls, config: OptimizerConfig) -> "Hyperparameters":
        """Returns a config's numbers, in host memory."""
        peaks = {name: np.float32(config.rate(name)) for name in GROUPS if config.rate(name)}
        ema = np.float32(config.ema) if config.ema else None
        return cls(peaks, np.float32(config.weight_decay), Pace.of(config.total_steps), ema)


def _rate(step: Any, peak: Number, pace: Pace, library: Any) -> Any:
    """Returns the learning rate at a step, computed by `jax.numpy` or by `numpy`."""
    cosine = (1 + library.cos(step * pace.angle)) / 2
    return peak * library.where(step < pace.warmup, step * pace.rise, cosine)


def schedule(peak: Number, pace: Pace) -> optax.Schedule:
    """Makes the schedule: linear warm-up over the first tenth, then half a cosine over *all* steps.

    With x = step/total: peak·x/0.1 while x < 0.1, else peak·(1 + cos πx)/2. Steps count from 0, so
    the first update has rate 0 (its moments still advance).
    """

    def rate(step: jax.Array | int) -> jax.Array:
        return _rate(step, peak, pace, jnp)

    return cast(optax.Schedule, rate)  # of integers; its type would have it take complex numbers


def global_norm(tree: optax.Updates) -> jax.Array:
    """Returns the Euclidean norm of all entries together, in float32."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(tree)))


def clip_by_global_norm() -> optax.GradientTransformation:
    """Multiplies by min(1, 1/(norm + 1e-6)); optax's own has no epsilon."""

    def update(updates, state, params=None):
        del params
        factor = jnp.minimum(1.0, MAX_NORM / (global_norm(updates) + NORM_EPSILON))
        return jax.tree.map(lambda g: g * factor, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def clip_by_tensor_norm(stacked: Collection[str]) -> optax.GradientTransformation:
    """Multiplies by the same factor per tensor; a stacked tensor counts as one per layer.

    Args:
        stacked: names of the parameters that have a leading layer axis.
    """

    def clip(name: str, g: jax.Array) -> jax.Array:
        axes = tuple(range(1 if name in stacked else 0, g.ndim))
        norm = jnp.sqrt(jnp.sum(jnp.square(g), axis=axes, keepdims=True))
        return g * jnp.minimum(1.0, MAX_NORM / (norm + NORM_EPSILON))

    def update(updates, state, params=None):
        del params
        return {name: clip(name, g) for name, g in updates.items()}, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


class BertAdamState(NamedTuple):
    """First and second moments, shaped like the parameters."""

    m: optax.Updates
    v: optax.Updates


def scale_by_bert_adam() -> optax.GradientTransformation:
    """Scales to m/(√v + ε) without bias correction; `optax.scale_by_adam` always corrects."""

    def init(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return BertAdamState(zeros, jax.tree.map(jnp.copy, zeros))

    def update(updates, state, params=None):
        del params
        m = jax.tree.map(lambda m, g: BETA_1 * m + (1 - BETA_1) * g, state.m, updates)
        v = jax.tree.map(lambda v, g: BETA_2 * v + (1 - BETA_2) * g * g, state.v, updates)
        return jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + EPSILON), m, v), BertAdamState(m, v)

    return optax.GradientTransformation(init, update)


def is_decayed(name: str) -> bool:
    """Says whether a parameter decays: all but biases, LayerNorm scales too (spec section 7)."""
    return not name.endswith(".bias")


def make_optimizer(
    config: OptimizerConfig,
    stacked: Collection[str],
    numbers: Hyperparameters | None = None,
) -> optax.GradientTransformation:
    """Makes the optimiser of the trained parameters (see `partition`), a flat dictionary by name.

    Args:
        config: which groups train, and the numbers where `numbers` gives none.
        stacked: names of the parameters that have a leading layer axis.
        numbers: in a compiled function, arguments of it; None = the config's, as constants.
    """
    peaks, weight_decay, pace, _ = Hyperparameters.of(config) if numbers is None else numbers

    def decayed(tree: Any) -> dict[str, bool]:
        return {name: is_decayed(name) for name in tree}

    def group(peak: Number) -> optax.GradientTransformation:
        return optax.chain(
            scale_by_bert_adam(),
            optax.add_decayed_weights(cast(jax.Array, weight_decay), mask=decayed),
            optax.scale_by_learning_rate(schedule(peak, pace)),
        )

    return optax.chain(
        clip_by_global_norm(),
        clip_by_tensor_norm(stacked),
        optax.multi_transform(
            {name: group(peaks[name]) for name in GROUPS if config.rate(name)},
            lambda tree: {name: group_of(name) for name in tree},
        ),
    )


def learning_rates(config: OptimizerConfig, step: int) -> dict[str, float]:
    """Returns the rate of each trained group at the update that follows `step` updates.

    It is computed by the host: a device would do it after the steps that it was given before.
    """
    peaks, _, pace, _ = Hyperparameters.of(config)
    return {name: float(_rate(np.int32(step), peak, pace, np)) for name, peak in peaks.items()}


def describe(parameters: Parameters, config: OptimizerConfig) -> str:
    """Formats the table printed at the start of a run: each group's size, rate and decay."""
    sizes, biases = collections.Counter(), collections.Counter()
    for name, value in parameters.items():
        sizes[group_of(name)] += value.size
        biases[group_of(name)] += 0 if is_decayed(name) else value.size
    rows = [f"{'group':<14}{'parameters':>14}{'peak rate':>12}{'decay':>8}{'undecayed biases':>18}"]
    for name in GROUPS:
        if sizes[name]:
            rate = config.rate(name)
            rows.append(
                f"{name:<14}{sizes[name]:>14,}"
                + (
                    f"{rate:>12.1e}{config.weight_decay:>8.2f}{biases[name]:>18,}"
                    if rate
                    else f"{'frozen':>12}{'–':>8}{'–':>18}"
                )
            )
    trained = sum(n for name, n in sizes.items() if config.rate(name))
    rows.append(f"{'total':<14}{sum(sizes.values()):>14,}  of which {trained:,} train")
    return "\n".join(rows)
