"""Weights in and out, without training.

python -m save_jax.weights import SRC [SRC …] --out=DIR [--config=FILE | --clip=NAME --ast=NAME]
python -m save_jax.weights export DIR --format=save-pytorch|safetensors --out=FILE
"""

import argparse
import contextlib
import errno
import json
import os
import pathlib
import sys
from collections.abc import Generator, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from configs import base
from save_jax import checkpoint, config_files, files, parameters, recorded
from save_jax import config as configuration
from save_jax.arguments import ArgumentParser
from save_jax.errors import (
    EXIT_CODES,
    NO_SPACE,
    OutageError,
    UserError,
    exit_codes,
    is_outage,
)
from save_jax.models import ast, clip
from save_jax.models.save import SAVE, SAVEConfig
from save_jax.weights import export, loading
from save_jax.weights.files.recognise import FACTS, OURS, open_source, recorded_config


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m save_jax.weights",
        description=__doc__.split("\n")[0],
        epilog=EXIT_CODES,
    )
    commands = parser.add_subparsers(dest="command", required=True)

    imports = commands.add_parser(
        "import",
        help="write a checkpoint of this project, which --config.init_from reads",
        description="Reads CLIP, AST, SAVE, AVIGATE or CLIP4Clip weights of any form. The "
        "checkpoint holds what the sources hold, in float32, and no more.",
    )
    imports.add_argument(
        "source",
        nargs="+",
        help="path (gs://, s3:// too), or OWNER/NAME on the Hugging Face Hub; clip=… or ast=… "
        "takes one part",
    )
    imports.add_argument("--config", help="config file of the model that the sources must fit")
    imports.add_argument("--clip", help=f"CLIP that they must fit: {', '.join(clip.VARIANTS)}")
    imports.add_argument("--ast", help=f"AST that they must fit: {', '.join(ast.VARIANTS)}")
    imports.add_argument(
        "--trust_archive",
        action="store_true",
        help="read a TorchScript archive that is none of OpenAI's (its code never runs)",
    )

    exports = commands.add_parser(
        "export",
        help="write a checkpoint as one file",
        description="save-pytorch: torch.save of a state dictionary with the reference's names. "
        "safetensors: this project's names, float32.",
    )
    exports.add_argument("source", help="workdir or checkpoint; any other source works too")
    exports.add_argument("--format", required=True, choices=export.FORMATS)
    exports.add_argument(
        "--dtype",
        default=export.DTYPES[0],
        choices=export.DTYPES,
        help="of save-pytorch. lossless: float16 where the imported file or the reference has it "
        "and nothing is rounded; reference: float16 wherever the reference has it",
    )
    exports.add_argument("--trust_archive", action="store_true", help=argparse.SUPPRESS)
    for command in (imports, exports):
        command.add_argument("--out", required=True, type=pathlib.Path)
        command.add_argument("--overwrite", action="store_true", help="replace an earlier result")
    return parser


@contextlib.contextmanager
def _appearing_at_once(out: pathlib.Path) -> Generator[pathlib.Path, None, None]:
    """Yields a temporary path, renamed to `out` once all is written, and removed if not.

    Of a link, what it points to is replaced.
    """
    out = pathlib.Path(os.path.realpath(out))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with files.appearing(out) as temporary:
            yield temporary
    except OSError as error:
        if is_outage(error) and error.errno not in (*NO_SPACE, errno.EFBIG):
            raise OutageError(
                f"cannot write {out}: {error}. When the disk works again, run the same command "
                "again."
            ) from error
        raise UserError(f"cannot write {out}: {error}") from error


def _check_free(out: pathlib.Path, overwrite: bool) -> None:
    """Raises UserError where writing would destroy what was not asked to be destroyed."""
    if out.parts[:1] in (("gs:",), ("s3:",)):  # else it would be a folder of that name here
        raise UserError(
            f"--out={out}: expected a path on a disk; copy the result to the bucket from there"
        )
    empty = out.is_dir() and not any(out.iterdir())
    if not out.exists() or empty:
        return
    if not overwrite:
        raise UserError(f"--out={out} exists: give another --out, or --overwrite to replace it")
    if out.is_dir() and not (out / FACTS).exists():
        raise UserError(f"--out={out} is a directory that no import made: give another --out")


def _model(args: argparse.Namespace) -> SAVEConfig | None:
    if args.config:
        if args.clip or args.ast:
            raise UserError("--config gives the sizes of CLIP and AST: leave out --clip and --ast")
        return configuration.model_config(config_files.read(args.config), devices=())
    if not args.clip and not args.ast:
        return None
    for kind, variants in (("clip", clip.VARIANTS), ("ast", ast.VARIANTS)):
        if (name := getattr(args, kind)) and name not in variants:
            raise UserError(f"--{kind}={name}: expected one of {', '.join(variants)}")
    default = SAVEConfig()
    return SAVEConfig(
        clip.VARIANTS[args.clip] if args.clip else default.clip,
        ast.VARIANTS[args.ast] if args.ast else default.ast,
    )


def _import(args: argparse.Namespace) -> None:
    _check_free(args.out, args.overwrite)
    model = _model(args)
    expected = None
    if model is not None:
        _, expected = parameters.split(nnx.eval_shape(lambda: SAVE(model, nnx.Rngs(params=0))))
    loaded = loading.read(args.source, model, expected, trust_archive=args.trust_archive)
    with _appearing_at_once(args.out) as temporary:
        # One by one, because orbax would keep a second copy of all NumPy arrays.
        found = loaded.parameters
        placed = {name: jnp.asarray(found.pop(name)) for name in list(found)}
        checkpoint.write_parameters(temporary, placed)
        facts = {"sources": args.source, "torch": loaded.names}
        (temporary / FACTS).write_text(json.dumps(facts, indent=1) + "\n")
    for note in loaded.notes:
        print(note)
    count = sum(value.size for value in placed.values())
    print(f"{args.out}: {count:,} parameters; use it with --config.init_from={args.out}")


def _export(args: argparse.Namespace) -> None:
    _check_free(args.out, args.overwrite)
    if args.out.is_dir():
        raise UserError(f"--out={args.out} is a directory: expected a file's name")
    source = open_source(args.source, trust_archive=args.trust_archive)
    if source.format is OURS:
        values, names = source.tensors, source.names
    else:
        loaded = loading.read(args.source, trust_archive=args.trust_archive)
        values, names = loaded.parameters, loaded.names
    where, found = recorded_config(args.source) or ("", None)
    config = found and recorded.deciding(found, where)
    if config and recorded.PROVENANCE in found:
        config[recorded.PROVENANCE] = found[recorded.PROVENANCE]
    with _appearing_at_once(args.out) as temporary:
        kept = export.write(temporary, values, args.format, args.dtype, names, config)
    print(f"{args.out}: {len(values)} arrays as {args.format}")
    if config and args.format != "safetensors":
        differing = recorded.differences(base.get_config().to_dict(), config)
        print(
            "such a file does not say what its model was trained as, so say it when you evaluate "
            "it: " + (", ".join(f"{k} = {v!r}" for k, (_, v) in differing.items()) or "the default")
        )
    if kept:
        print(
            f"{kept} tensors are float32 where the reference has float16, which would round them; "
            "--dtype=reference rounds"
        )


@exit_codes
def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; returns the exit code: 0, 2 (a mistake) or 75 (an outage)."""
    args = _parser().parse_args(argv)
    # Nothing is computed: leave accelerators to others.
    jax.config.update("jax_platforms", "cpu")
    _import(args) if args.command == "import" else _export(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
