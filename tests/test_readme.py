"""The README's commands, run as they stand there: on the demo, and on a miniature of MSR-VTT.

Only places are filled in (MSRVTT, PREPARED, RUN), flags added that make the runs short and, but
for the soak, the model of MSR-VTT small, and the published weights left out.
"""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from tests.support import caching, miniatures, programs

ROOT = pathlib.Path(__file__).parents[1]
SHORT = {
    "configs/demo.py": ["--config.steps=2"],
    "configs/msrvtt.py": [
        "--config.steps=2",
        "--config.batch_size=2",
        "--config.eval_batch_size=2",
    ],
}
PREPARED_SMALL = " --image_size=32 --max_frames=4 --fbank_frames=64"
# configs/msrvtt.py at the sizes of tests/test_cache.py; a named variant has sizes of its own.
SMALL = f"""from configs import msrvtt


def get_config(variant="9k"):
    config = msrvtt.get_config(variant)
    config.model.clip, config.model.ast, config.data.max_frames = {{}}, {{}}, 4
    changes = {caching.CHANGES!r}
    sizes = {{key: value for key, value in changes.items() if key.startswith("model.")}}
    for key, value in sizes.items():
        *parts, name = key.split(".")
        table = config
        for part in parts:
            table = table[part]
        table[name] = value
    return config
"""
TRAIN = {"small": "of which ", "full size": "of which 195,419,649 train"}


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


@pytest.fixture(scope="module", params=["small", pytest.param("full size", marks=pytest.mark.soak)])
def run(request, tmp_path_factory):
    """Runs one command of the README in a shell; its Python is the one of these tests.

    Of full size are ViT-B/32, AST base and 12 frames.
    """
    full_size = request.param == "full size"
    folder = tmp_path_factory.mktemp("readme")
    miniatures.msrvtt(folder / "msrvtt", n_train=3, n_test=2)
    (folder / "small.py").write_text(SMALL)
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
        for part, flags in SHORT.items():
            if part in command:
                command = " ".join([command, *flags])
        if not full_size:
            command = command.replace("configs/msrvtt.py", str(folder / "small.py"))
            command += PREPARED_SMALL * ("data_pipelines.prepare msrvtt" in command)
        if "configs/demo.py" in command:
            command += f" --config.data.dir={folder / 'demo_data'}"
        # One device, as a user's run has, whatever conftest.py wants of the tests in this process.
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

    run.folder, run.trains = folder, TRAIN[request.param]
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
    assert any(run.trains in out for out in full)

    # The run keeps the command-line contract.
    workdir = run.folder / "run"
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    result = json.loads((workdir / "evaluation/2/metrics.json").read_text())
    assert set(result) >= {"t2v", "v2t", "groups", "protocol"}
    assert result["protocol"]["videos"] == 2
