"""Loads weights of other implementations into our model: what `config.init_from` does."""

import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from save_jax.errors import UserError
from save_jax.models.save import FROM_TEXT_BLOCKS, STACKS_FROM_TEXT, SAVEConfig
from save_jax.weights import positions
from save_jax.weights import table as tables
from save_jax.weights.files.recognise import OURS, SAVE, Source, open_source
from save_jax.weights.files.tensor import Tensor, Tensors

PARTS = ("clip", "ast")  # that a source can be named for: "clip=A,ast=B"
_TEXT = "clip.text.blocks.layer."


class Loaded(NamedTuple):
    """What sources gave.

    Attributes:
        parameters: float32 arrays by our names, in host memory, some or all of the model's.
        absent: names of the model's parameters that no source gave and none is copied into.
        notes: what happened, line by line, for the user.
        names: PyTorch's name, as the (last) file spelled it -> dtype there.
    """

    parameters: dict[str, np.ndarray]
    absent: tuple[str, ...]
    notes: tuple[str, ...]
    names: Mapping[str, str]


def load(
    source: str | Mapping[str, str] | Sequence[str],
    config: SAVEConfig,
    expected: Mapping[str, Any],
    *,
    trust_archive: bool = False,
) -> Loaded:
    """Reads sources of whatever format (see `files.recognise`) into a model of ours.

    A source of CLIP gives `clip.*`, one of AST `ast.*`; one of SAVE, AVIGATE or CLIP4Clip what it
    has. Tables of positions are fitted to the config's grid. If CLIP's text tower came in and a
    fusion stack, the resampler or the frame positions did not, those start from it (spec section
    7). Nothing is read before all names and shapes are known to fit.

    Args:
        source: a path or hub id; several as a list or separated by commas; "clip=A,ast=B" (or a
            mapping) takes only that part of each.
        config: sizes of the model.
        expected: the model's parameters (abstract or not), by name.
        trust_archive: read a TorchScript archive that is none of OpenAI's.

    Raises:
        UserError: a source is absent, damaged, foreign, or does not fit the model.
    """
    loaded = read(source, config, expected, trust_archive=trust_archive)
    parameters, notes = dict(loaded.parameters), list(loaded.notes)
    if copied := _start_from_clip(parameters, expected):
        notes.append(f"from CLIP's text tower: the start of {_tops(copied)}")
    absent = tuple(name for name in expected if name not in parameters)
    if absent:
        notes.append(f"in no source, so as initialised: {len(absent)} arrays of {_tops(absent)}")
    return Loaded(parameters, absent, tuple(notes), loaded.names)


def read(
    source: str | Mapping[str, str] | Sequence[str],
    config: SAVEConfig | None = None,
    expected: Mapping[str, Any] | None = None,
    *,
    trust_archive: bool = False,
) -> Loaded:
    """Reads what sources hold, and no more; arguments and errors as `load`.

    Without `config` and `expected` the sizes are the sources' own.
    """
    opened = []
    for part, where in parse(source):
        one = open_source(where, trust_archive=trust_archive)
        opened.append(one.restricted(f"{part}.") if part else one)
    plans = [_plan(one, config, expected) for one in opened]
    for n, (one, shapes, _) in enumerate(plans):
        for other, others, _ in plans[:n]:
            if twice := sorted(set(shapes) & set(others)):
                raise UserError(
                    f"{one.where} and {other.where} both hold {len(twice)} of the model's "
                    f"parameters: {tables.listing(twice)}. Name the part to take from each: "
                    "clip=…,ast=…"
                )
    parameters: dict[str, np.ndarray] = {}
    notes: list[str] = []
    names: dict[str, str] = {}
    for one, shapes, fitted in plans:
        table = one.format.table
        _check_kinds(one)
        parameters |= tables.from_torch(table, one.tensors, shapes, one.where)
        spare = [name for name in one.tensors if table.ignores(table.canonical(name))]
        tensors = len(one.tensors) - len(spare)
        notes.append(f"{one.where} ({one.format.name}): {tensors} tensors into {_tops(shapes)}")
        if spare:
            notes.append(f"  not used by the model: {tables.listing(spare)}")
        notes.extend(f"  {note}" for note in fitted)
        names |= dict(one.names) or _spelled(one, shapes)
    return Loaded(parameters, (), tuple(notes), names)


def parse(source: str | Mapping[str, str] | Sequence[str]) -> list[tuple[str, str]]:
    """Returns the parts ("" for all of it) and places that a source names.

    Raises:
        UserError: nothing, or a part twice.
    """
    if isinstance(source, Mapping):
        pairs = [(part, where) for part, where in source.items() if where]
    else:
        if isinstance(source, str):
            # A comma may be part of a path.
            source = [source] if pathlib.Path(source).exists() else source.split(",")
        pairs = []
        for entry in (entry.strip() for entry in source):
            part, equals, where = entry.partition("=")
            pairs.append((part, where) if equals and part in PARTS else ("", entry))
    named = [part for part, _ in pairs if part]
    if not pairs or not all(where for _, where in pairs) or len(set(named)) < len(named):
        raise UserError(
            f"cannot make sense of the source {source!r}: expected PATH_OR_ID, or "
            "clip=PATH_OR_ID,ast=PATH_OR_ID"
        )
    return pairs


def _unit(name: str) -> str:
    """Returns a parameter's unit: checkpoints have or lack a unit as a whole."""
    top = name.split(".")[0]
    return "sound" if top.startswith("audio_") else top


def _plan(
    source: Source, config: SAVEConfig | None, expected: Mapping[str, Any] | None
) -> tuple[Source, dict[str, tables.Shape], list[str]]:
    """Plans which parameters to take from a source, with positions fitted to the config."""
    table = source.format.table
    held = table.holders(map(table.canonical, source.tensors)).values()
    tops = {row.ours.split(".")[0] for row in held}
    units = set(map(_unit, tops))
    if "sound" in units:
        units |= {"ast", "frame_positions"}
    if "speech_fusion" in units:
        units.add("frame_positions")
    rows = {row.ours for row in table.rows if _unit(row.ours) in units}
    own = tables.shapes(table, source.tensors)
    if expected is None:
        shapes = {name: own[name] for name in own if name in rows}
        if "frame_positions" not in tops:
            shapes.pop("frame_positions", None)
    else:
        shapes = {name: tuple(expected[name].shape) for name in expected if name in rows}
        if not shapes:
            raise UserError(
                f"{source.where} holds {', '.join(sorted(tops))} ({source.format.name}'s names), "
                "which the config's model does not have"
            )
    notes: list[str] = []
    if config is not None:
        source = source._replace(tensors=_fit_positions(source, own, shapes, config, notes))
    return source, shapes, notes


def _check_kinds(source: Source) -> None:
    """Raises UserError where tensors are not of real numbers."""
    table = source.format.table
    for name, tensor in source.tensors.items():
        used = not table.ignores(table.canonical(name))
        if used and not jnp.issubdtype(tensor.dtype, jnp.floating):
            raise UserError(
                f"{source.where} holds {name} as {tensor.dtype}: expected floating-point weights, "
                "not quantised ones"
            )


def _tops(names: Iterable[str]) -> str:
    return ", ".join(sorted({name.split(".")[0] for name in names}))


def _fit_positions(
    source: Source,
    own: Mapping[str, tables.Shape],
    shapes: Mapping[str, tables.Shape],
    config: SAVEConfig,
    notes: list[str],
) -> Tensors:
    """Returns the source's tensors, with tables of positions resized to the config's sizes."""
    side = config.clip.image_size // config.clip.patch_size
    tensors, table = dict(source.tensors), source.format.table
    for ours, fit, grid in (
        ("clip.visual.positional_embedding", lambda x: positions.fit_clip(x, side), (side, side)),
        ("ast.pos_embed", lambda x: positions.fit_ast(x, config.ast.grid), config.ast.grid),
    ):
        old, new = own.get(ours, ()), shapes.get(ours, ())
        if len(old) != 2 or len(new) != 2 or old[0] == new[0] or old[1] != new[1]:
            continue
        row = table.row(ours)
        name = next(name for name in tensors if table.canonical(name) in row.names)
        there = np.asarray(tensors[name], np.float32)
        try:
            fitted = row.transform.to_torch(fit(row.transform.from_torch(there)))
        except ValueError as error:
            raise UserError(f"{source.where}: {name} cannot be fitted: {error}") from error
        tensors[name] = Tensor(fitted.shape, fitted.dtype, lambda fitted=fitted: fitted)
        notes.append(f"{ours}: {old[0]} positions fitted to {grid[0]}×{grid[1]} patches")
    return tensors


def _spelled(source: Source, shapes: Mapping[str, tables.Shape]) -> dict[str, str]:
    """Returns names of these parameters in a PyTorch file of SAVE -> dtypes found here."""
    if source.format is OURS:  # float32 whatever they came from
        return {}
    table, result = source.format.table, {}
    found = {table.canonical(name): name for name in source.tensors}
    for ours, shape in shapes.items():
        theirs = tables.torch_names(table, ours, shape)
        reference = tables.torch_names(SAVE.table, ours, shape)
        for (there, *_), (name,) in zip(theirs, reference, strict=True):
            spelled = found[there].removeprefix("module.") if source.format is SAVE else name
            result[spelled] = str(source.tensors[found[there]].dtype)
    return result


def _start_from_clip(parameters: dict[str, np.ndarray], expected: Mapping[str, Any]) -> list[str]:
    """Copies CLIP's text tower into the new parts that no source gave; see spec section 7."""
    if "clip.text.positional_embedding" not in parameters:
        return []
    new = {}
    for name, value in expected.items():
        if name in parameters:
            continue
        if name == "frame_positions":
            new[name] = "clip.text.positional_embedding"
        for stack in STACKS_FROM_TEXT:
            inner = name.removeprefix(f"{stack}.blocks.layer.")
            if inner != name and inner.split(".")[0] in FROM_TEXT_BLOCKS:
                new[name] = _TEXT + inner
        if name in new:
            there, here = list(parameters[new[name]].shape), list(value.shape)
            if here[0] > there[0] or here[1:] != there[1:]:
                raise UserError(
                    f"{name} {here} starts from CLIP's {new[name]} {there}: make "
                    "config.model.fusion_layers no larger than the text tower is deep, and their "
                    "widths equal"
                )
    for name, text in new.items():
        parameters[name] = parameters[text][: expected[name].shape[0]]
    return list(new)
