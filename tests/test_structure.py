"""What may import what: the house keeps its shape."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = ("save_jax", "data_pipelines", "launch", "configs", "tests")

# Of each package: what it may import from the others, and of that what only inside functions.
ALWAYS = {
    "save_jax": ("configs",),
    "configs": ("save_jax", "data_pipelines"),
    "data_pipelines": tuple(
        f"save_jax.{name}"
        for name in (
            "arguments",
            "batch",
            "errors",
            "files",
            "hub_ids",
            "locks",
            "messages",
            "tokenizer",
        )
    ),
    "launch": ("save_jax", "data_pipelines", "configs"),
}
INSIDE = {
    "save_jax/data.py": ("data_pipelines",),
    "data_pipelines/sidecars.py": ("save_jax.models.imagebind", "save_jax.weights.names.imagebind"),
}
HEAVY = ("tensorflow", "tensorflow_datasets", "torch", "av", "transformers")
# A longer module has more than one idea; this one is a table of words.
MOST_LINES, LONG = 400, {"data_pipelines/demo_corpus/topics.py"}
MOST_ENTRIES = 16  # at the top of a folder, so that it can be read at a glance


def imports(source: str) -> list[tuple[str, bool]]:
    """Every module that a file imports, and whether only inside a function."""
    found = []

    def visit(node: ast.AST, inside: bool) -> None:
        inside |= isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(node, ast.Import):
            found.extend((alias.name, inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.extend((f"{node.module}.{alias.name}", inside) for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(ast.parse(source), False)
    return found


def below(name: str, allowed: tuple[str, ...]) -> bool:
    return any(f"{name}.".startswith(f"{prefix}.") for prefix in allowed)


def violations(path: str, source: str) -> list[str]:
    package, found = path.split("/")[0], []
    for name, inside in imports(source):
        top = name.split(".")[0]
        if top in PACKAGES and top != package:
            allowed = ALWAYS[package] + (INSIDE.get(path, ()) if inside else ())
            if not below(name, allowed):
                found.append(f"{path} imports {name}")
        if package == "save_jax" and top in HEAVY and not inside and path not in HEAVY_ALLOWED:
            found.append(f"{path} imports {name} at its top")
        if top in PACKAGES and below(name, ENTRY_POINTS):
            found.append(f"{path} imports the entry point {name}")
    return found


# The byte pairs come from transformers; only the data pipelines' side of a run imports it.
HEAVY_ALLOWED = ("save_jax/tokenizer.py",)
FILES = sorted(
    path.relative_to(ROOT).as_posix()
    for package in PACKAGES[:-1]
    for path in (ROOT / package).rglob("*.py")
)
# What is run as a program is imported by nothing; save_jax.main alone offers `run` to others.
ENTRY_POINTS = tuple(
    path.removesuffix(".py").replace("/", ".")
    for path in FILES
    if 'if __name__ == "__main__":' in (ROOT / path).read_text() and path != "save_jax/main.py"
)


def entries(folder: str) -> list[str]:
    """What one sees of a folder, but for what every folder has."""
    plain = ("__init__.py", "__pycache__", "README.md")
    return sorted(path.name for path in (ROOT / folder).iterdir() if path.name not in plain)


# Writing atomically, renaming and locking have their pitfalls, and one place.
FILES_ALONE = ("save_jax/files.py", "save_jax/locks.py")
ALONE = ("os.replace", "os.rename", "os.renames", "os.fsync", "shutil.move", "tempfile.mkstemp")
ALONE += ("tempfile.NamedTemporaryFile",)


def own_ways(path: str, source: str) -> list[str]:
    """What a file does itself that only FILES_ALONE should do."""
    found = [name for name, _ in imports(source) if name.split(".")[0] == "fcntl" or name in ALONE]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ALONE:
            found.append(ast.unparse(node))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            name, one = node.func.attr, len(node.args) == 1 and not node.keywords
            module = isinstance(node.func.value, ast.Name) and node.func.value.id in ("os", "files")
            if name in ("rename", "replace") and one and not module:  # of a path; str's takes two
                found.append(f"{ast.unparse(node.func)} of a path")
    return [f"{path} has {name}" for name in found if path not in FILES_ALONE]


def test_files_are_replaced_and_locked_in_one_place():
    found = [line for path in FILES for line in own_ways(path, (ROOT / path).read_text())]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "source",
    [
        "import os\nos.replace(a, b)",
        "import os\nmove = os.rename",
        "from os import replace",
        "import fcntl",
        "from fcntl import flock",
        "import tempfile\ntempfile.mkstemp()",
        "from tempfile import NamedTemporaryFile",
        "path.with_suffix('.tmp').rename(path)",
        "partial.replace(path)",
    ],
)
def test_that_rule_can_be_broken(source):
    assert own_ways("launch/new.py", source)
    assert not own_ways(FILES_ALONE[0], source)
    assert not own_ways("launch/new.py", "name.replace('a', 'b'); dataclasses.replace(x, y=1)")


def test_only_what_may_be_imported_is():
    assert len(FILES) > 100
    found = [line for path in FILES for line in violations(path, (ROOT / path).read_text())]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("data_pipelines/input.py", "from save_jax.models import clip"),
        ("save_jax/train.py", "def f():\n    from data_pipelines import input"),
        ("save_jax/data.py", "from data_pipelines import input"),
        ("save_jax/data.py", "import tensorflow as tf"),
        ("launch/benchmark/train.py", "def f():\n    from tests.support import reference"),
        ("launch/compare.py", "from save_jax.cache import __main__ as command"),
        ("save_jax/data.py", "def f():\n    from data_pipelines.prepare import prepare"),
    ],
)
def test_the_rules_can_be_broken(path, source):
    assert violations(path, source)


def test_no_module_is_too_long():
    lengths = {path: len((ROOT / path).read_text().splitlines()) for path in FILES}
    assert {path for path, lines in lengths.items() if lines > MOST_LINES} == LONG


def test_the_entry_point_is_read_in_one_sitting():
    assert len((ROOT / "save_jax/main.py").read_text().splitlines()) <= 200


@pytest.mark.parametrize("folder", ["data_pipelines", "launch"])
def test_folders_can_be_read_at_a_glance(folder):
    assert len(entries(folder)) <= MOST_ENTRIES, entries(folder)


def test_docstrings_of_functions_begin_with_a_verb():
    """In the third person: "Returns", "Writes", "Says whether"."""
    found = [
        f"{path}:{node.lineno} {node.name}: {words.splitlines()[0]}"
        for path in FILES
        for node in ast.walk(ast.parse((ROOT / path).read_text()))
        if isinstance(node, ast.FunctionDef)
        and (words := ast.get_docstring(node))
        and not re.match(r"[A-Z][a-z-]+s\b", words)
        and not any(ast.unparse(name) == "property" for name in node.decorator_list)
    ]
    assert not found, "\n".join(found)
