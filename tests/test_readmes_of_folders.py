"""The folders' READMEs: flags of their commands exist, links and quoted lines lead somewhere.

And the README's Python snippet prints what stands below it. Its commands: test_readme.py.
"""

import functools
import os
import pathlib
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest

from configs import base
from tests.support import programs

ROOT = pathlib.Path(__file__).parents[1]
FOLDERS = ("save_jax", "data_pipelines", "configs", "launch", "tests")
READMES = [ROOT / folder / "README.md" for folder in FOLDERS]
PAGES = [
    ROOT / "README.md",
    *READMES,
    ROOT / ".github/CONTRIBUTING.md",
    ROOT / "save_jax/SPEC.md",
    ROOT / "save_jax/BASELINES.md",
]


def blocks(path: pathlib.Path, language: str) -> list[str]:
    text = path.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(path: pathlib.Path) -> list[list[str]]:
    """Reads the commands of a page's console blocks, each as a list of words."""
    text = "".join(blocks(path, "console")).replace("\\\n", " ")
    return [shlex.split(line, comments=True) for line in text.splitlines() if line.strip()]


@functools.cache
def source(where: str) -> str:
    """The text of all Python files of a package, or of a script."""
    files = sorted((ROOT / where).rglob("*.py")) if (ROOT / where).is_dir() else [ROOT / where]
    return "\n".join(file.read_text(encoding="utf-8") for file in files)


@functools.cache
def config_keys() -> frozenset[str]:
    def names(prefix, config):
        for key, value in config.items():
            yield prefix + key
            if isinstance(value, dict):
                yield from names(f"{prefix}{key}.", value)

    return frozenset(names("", base.get_config().to_dict()))


def mistakes(words: list[str]) -> list[str]:
    """Returns the parts of a command of this project that do not exist."""
    if "-m" in words and words[words.index("-m") + 1].split(".")[0] in FOLDERS:
        module = words[words.index("-m") + 1]
        file = ROOT / module.replace(".", "/")
        found = [] if file.is_dir() or file.with_suffix(".py").exists() else [module]
        text = source(module.split(".")[0])
        known = functools.partial(_is_defined, text)
    elif script := next((word for word in words if word.endswith((".sh", ".sbatch"))), None):
        found = [] if (ROOT / script).exists() else [script]
        # slurm.sbatch hands its flags to save_jax.main, as the pod script does those after "--".
        text = source(script) + source("save_jax")
        known = functools.partial(_is_in_script, text)
    else:
        return []
    for word in words:
        name, _, value = word.partition("=")
        if name.startswith("--config."):
            if name.removeprefix("--config.") not in config_keys():
                found.append(word)
        elif name == "--config":
            if not (ROOT / value.partition(":")[0]).exists():
                found.append(word)
        elif name.startswith("--") and len(name) > 2 and not known(name[2:]):
            found.append(word)
    return found


def _is_defined(text: str, flag: str) -> bool:
    """Whether a package defines a flag: argparse's "--flag" or absl's "flag"."""
    return re.search(rf'"(--)?{re.escape(flag)}"', text) is not None


def _is_in_script(text: str, flag: str) -> bool:
    return f"--{flag}" in text or _is_defined(text, flag)


def test_the_commands_of_the_folders_exist():
    pages = [ROOT / "README.md", *READMES]
    found = [(path, words) for path in pages for words in commands(path)]
    ours = [words for _, words in found if {"-m"} & set(words)]
    assert len(ours) >= 15, "are the commands still in console blocks?"
    for path, words in found:
        assert not mistakes(words), f"{path.relative_to(ROOT)}: {' '.join(words)}"


@pytest.mark.parametrize(
    ("command", "wrong"),
    [
        ("python -m save_jax.main --workdr=RUN", "--workdr=RUN"),
        ("python -m save_jax.main --config.optimizer.knew=1", "--config.optimizer.knew=1"),
        ("python -m save_jax.main --config=configs/nope.py:save", "--config=configs/nope.py:save"),
        ("python -m launch.nothing", "launch.nothing"),
        ("launch/tpu_pod.sh --nmae=save create", "--nmae=save"),
    ],
)
def test_a_command_that_does_not_exist_is_found(command, wrong):
    assert mistakes(shlex.split(command)) == [wrong]


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), f"{target}: no such file"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in map(slug, headings), f"{target}: no such heading"


def test_the_readme_is_read_in_one_go():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 140


def test_each_equation_is_where_the_table_says():
    text = (ROOT / "save_jax/README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| [^|]+ \| \d+ \| `([^`]+)` \| `([^`]+)` \|$", text, re.MULTILINE)
    assert len(rows) == 8
    for file, code in rows:
        assert code in (ROOT / file).read_text(encoding="utf-8"), f"{file} has no {code}"


def test_the_snippet_prints_what_the_readme_says():
    (snippet,) = blocks(ROOT / "README.md", "python")
    below = (ROOT / "README.md").read_text(encoding="utf-8").partition(snippet)[2]
    expected = re.search(r"^(\[\[.*?\]\])$", below, re.DOTALL | re.MULTILINE)[1]
    environment = {**os.environ, "XLA_FLAGS": programs.flags()}
    done = subprocess.run(
        [sys.executable, "-c", snippet],
        cwd=ROOT,
        env=environment,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr

    def numbers(text: str) -> np.ndarray:
        return np.array([float(number) for number in re.findall(r"-?\d+\.\d+", text)])

    assert numbers(expected).shape == (4,)
    # Other processors differ in the last digits.
    np.testing.assert_allclose(numbers(done.stdout), numbers(expected), atol=1e-4)
