"""The README's commands, run as they stand there: on the demo, and on a miniature of MSR-VTT.

Only places are filled in (MSRVTT, PREPARED, RUN), flags added that make the runs short, and the
published weights left out.
"""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from tests.support import miniatures, programs

ROOT = pathlib.Path(__file__).parents[1]
SHORT = {
    "configs/demo.py": "--config.steps=2",
    # The full-size model: ViT-B/32, AST base, 12 frames.
    "configs/msrvtt.py": "--config.steps=2 --config.batch_size=2 --config.eval_batch_size=2",
}


def readme_commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line]


def test_the_readme_has_the_commands_that_matter():
    commands = "\n".join(readme_commands())
    for wanted in (
        "make demo",
        "make test",
        "data_pipelines.prepare msrvtt",
        "--config=configs/msrvtt.py",
        "--config.mode=evaluate",
    ):
        assert wanted in commands


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs one command of the README in a shell; its Python is the one of these tests."""
    folder = tmp_path_factory.mktemp("readme")
    miniatures.msrvtt(folder / "msrvtt", n_train=3, n_test=2)
    environment = dict(os.environ)
    environment["PATH"] = f"{pathlib.Path(sys.executable).parent}:{environment['PATH']}"
    places = {
        "MSRVTT": folder / "msrvtt",
        "PREPARED": folder / "prepared",
        "RUN": folder / "run",
        "runs/demo": folder / "demo",
    }

    def run(command: str) -> str:
        for place, path in places.items():
            command = re.sub(rf"\b{place}\b", str(path), command)
        # Published weights are not to be had here; tests/weights has files of their form.
        command = re.sub(r" --config\.init_from=clip=\S+", "", command)
        if command.startswith("make demo"):
            # Its set-up is that of the environment these tests run in already.
            (pathlib.Path(sys.prefix) / ".prepare").touch()
            command += (
                f" VENV={sys.prefix} DEMO={folder / 'demo'}"
                f" FLAGS='--config.steps=2 --config.data.dir={folder / 'demo_data'}'"
            )
        elif command.startswith("make test"):
            command += " --dry-run"  # it is what runs this
        for config, flags in SHORT.items():
            if config in command:
                command += f" {flags}"
        if "configs/demo.py" in command:
            command += f" --config.data.dir={folder / 'demo_data'}"
        # One device, as a user's run has, whatever conftest.py wants of the tests in this process.
        full_size = "configs/msrvtt.py" in command
        done = subprocess.run(
            command,
            shell=True,
            cwd=ROOT,
            env=environment | {"XLA_FLAGS": programs.FULL_SIZE if full_size else programs.FAST},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}"
        return done.stdout

    run.folder = folder
    yield run
    shutil.rmtree(folder, ignore_errors=True)


def test_the_readmes_commands_run(run):
    printed = {command: run(command) for command in readme_commands()}
    demo = next(out for command, out in printed.items() if command.startswith("make demo"))
    for model in ("clip4clip", "avigate", "save"):
        assert re.search(rf"^{model} +\d", demo, re.MULTILINE), demo[-2000:]
    tests = next(out for command, out in printed.items() if command.startswith("make test"))
    assert "pytest tests" in tests and "ruff check" in tests
    full = [out for command, out in printed.items() if "configs/msrvtt.py" in command]
    assert any("step 2/2" in out and "text → video" in out for out in full)
    assert any("of which 195,419,649 train" in out for out in full)

    # The full-size run keeps the command-line contract.
    workdir = run.folder / "run"
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    result = json.loads((workdir / "evaluation/2/metrics.json").read_text())
    assert set(result) >= {"t2v", "v2t", "groups", "protocol"}
    assert result["protocol"]["videos"] == 2
