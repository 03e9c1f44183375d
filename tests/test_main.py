"""The command line: mistakes end in one message and exit code 2, before any work is lost."""

import contextlib
import errno
import io
import json
import os
import re
import signal
import subprocess
import sys

import pytest

from save_jax import cli, errors, main, results, resume
from save_jax.cache import __main__ as cache
from save_jax.errors import OutageError, UserError


def command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "save_jax.main", *arguments],
        check=False,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.nokey=3"], "unknown config key 'nokey'"),
        (["--config.optimizer.nw=3"], "'optimizer.nw': did you mean 'optimizer.new'?"),
        (["--config.model.clip.imagesize=64"], "did you mean 'model.clip.image_size'?"),
        (["--config.seed=1", "--noconfig.model.frameposition"], "'model.frame_positions'?"),
        (["--config.batchsize", "8"], "unknown config key 'batchsize': did you mean 'batch_size'?"),
        (["--config.epochs=many"], "--config.epochs=many: expected a whole number"),
        (["--config.batch_size=1.5"], "--config.batch_size=1.5: expected a whole number"),
        (["--config.optimizer.new=low"], "--config.optimizer.new=low: expected a number"),
        (["--config.model.frame_positions=perhaps"], "=perhaps: expected true or false"),
        (["--num_processes=two"], "--num_processes=two: expected a whole number"),
        (["--config=configs/nope.py"], "configs/nope.py"),
        (["--config=configs/demo.py:nope"], "unknown model 'nope'"),
        (["--nope=1"], "Unknown command line flag 'nope'"),
        (["stray"], "unexpected arguments: stray"),
        (["--config.mode=dream"], "expected 'train', 'evaluate' or 'follow'"),
        (["--config.log_every=0"], "config.log_every = 0: expected at least 1"),
        (["--config.dtype=float8"], "expected one of float32, bfloat16"),
        (["--config.model.attention=cudnn"], "needs an NVIDIA GPU and config.dtype = 'bfloat16'"),
        (["--config.mesh.data=3"], "does not fit the 8 devices"),
        (["--config.batch_size=12"], "multiple of 8, say 16"),
        (["--config.eval_batch_size=0"], "config.eval_batch_size = 0: expected at least 1 (clips"),
        (["--config.batch_size=-1"], "config.batch_size = -1: expected at least 1 (clips of a"),
        (["--config.micro_batch=-8"], "config.micro_batch = -8: expected at least 0 (clips"),
        (["--config.micro_batch=24"], "24: expected a divisor of config.batch_size = 64, or 0"),
        (["--config.epochs=-1"], "config.epochs = -1: expected at least 1 (passes over"),
        (["--config.steps=-5"], "config.steps = -5: expected at least 0 (training steps"),
        (["--config.data.max_words=78"], "expected 1 to 77"),
        (["--config.model.clip.patch_size=7"], "not a multiple of patch_size 7"),
        (["--config.model.speech_weight=0", "--config.model.sound_weight=0"], "needs sound"),
        (["--config.optimizer.new=-1"], "expected a number of at least 0"),
        (["--config.ema=1"], "config.ema = 1.0: expected a decay of at least 0 and below 1"),
        (["--config.profile=20:10"], "config.profile = '20:10': expected FIRST:END, say 10:20"),
        (["--config.profile=0:10"], "config.profile = '0:10': expected FIRST:END"),
        (["--config.profile=10"], "config.profile = '10': expected FIRST:END"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(tmp_path, capfd, arguments, message):
    if not any(argument.startswith("--config=") for argument in arguments):
        arguments = ["--config=configs/demo.py", *arguments]
    code = main.main(["save_jax.main", f"--workdir={tmp_path / 'run'}", *arguments])
    said = capfd.readouterr().err
    assert code == 2, said
    assert message in said
    assert said.startswith("error: ") and "Traceback" not in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=configs/demo.py", "--config.nokey=3"], "unknown config key 'nokey'"),
        (["--config=configs/msrvtt.py"], "python -m data_pipelines.prepare msrvtt"),
        (
            ["--config=configs/msrvtt.py", "--config.data.dir=/nowhere"],
            "did not find /nowhere/msrvtt/9k",
        ),
    ],
)
def test_a_mistake_ends_the_command_with_exit_code_2(tmp_path, arguments, message):
    done = command(f"--workdir={tmp_path / 'run'}", *arguments)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


MSRVTT = "--config=configs/msrvtt.py"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            [MSRVTT, "--config.model.clip.image_size=128"],
            "config.model.clip is a named variant here, which fixes all sizes. Choose a variant "
            "(ViT-B/32, ViT-B/16, ViT-L/14, ViT-L/14@336px)",
        ),
        ([MSRVTT, "--config.model.ast.width", "128"], "config.model.ast is a named variant here"),
        (["--config.model.clip=ViT-B/32"], "--config.model.clip: expected a dictionary of sizes"),
        (["--config.seed.x=1"], "unknown config key 'seed.x'"),
        (["--config.mesh[0]=1"], "error: "),  # an index into what has none
        (["--config=configs"], "--config=configs: expected a config file, found no such file in"),
        (["--config="], "--config=: expected a config file, found no such file in"),
    ],
)
def test_an_override_that_does_not_fit_the_config(capsys, tmp_path, arguments, message):
    assert main.main(["main", *arguments, f"--workdir={tmp_path / 'run'}"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and message in said


GET = "def get_config():\n    "


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\nimport nothing_here\n", "FILE, line 2: ModuleNotFoundError: No module named 'nothing_"),
        ("def get_config(:\n", "FILE, line 1: expected Python, found SyntaxError: invalid syntax"),
        ("seed = 1\n", "FILE: expected a function get_config() that returns an ml_collections."),
        (GET + "return 3\n", "FILE: expected get_config() to return an ml_collections.ConfigDict"),
        (GET + "pass\n", "ml_collections.ConfigDict, found NoneType"),
        (
            GET + "return {}['a']\n",
            "FILE, line 2: KeyError: 'a'. Correct the file: expected a get_",
        ),
        (GET + "return int('x')\n", "FILE, line 2: ValueError: invalid literal"),
        (GET + "return open('/nowhere')\n", "FILE, line 2: FileNotFoundError: "),
        (
            f"from configs import demo\n{GET}c = demo.get_config()\n    c.seed = 'a'\n",
            "FILE, line 4: TypeError: Could not override field 'seed'",
        ),
    ],
)
def test_a_config_file_that_cannot_be_used_is_named(capsys, tmp_path, text, message):
    file = tmp_path / "mine.py"
    file.write_text(text)
    for config in ([f"--config={file}"], ["--config", str(file)]):
        assert main.main(["main", *config, f"--workdir={tmp_path / 'run'}"]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and "Traceback" not in said
        assert message.replace("FILE", str(file)) in said


@pytest.mark.parametrize(
    "name",
    ["save_jax.main", "save_jax.cache", "save_jax.weights", "data_pipelines.prepare",
     "launch.sweep", "launch.compile"],
)  # fmt: skip
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_packages_are_imported_is_one_message(tmp_path, name, number):
    stand_in = f"import os, time\nos.kill(os.getpid(), {int(number)})\ntime.sleep(60)\n"
    for package in ("numpy", "etils"):  # whichever comes first
        (tmp_path / f"{package}.py").write_text(stand_in)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", name, "--help"],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert done.returncode == os.EX_TEMPFAIL, done.stderr
    assert done.stderr == "interrupted: nothing was begun; run the same command again\n"


def test_importing_the_library_leaves_ctrl_c_alone():
    check = "import signal, save_jax.errors as e; print(signal.getsignal(2).__name__)"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout == "default_int_handler\n"


@pytest.mark.parametrize("kind", [PermissionError, FileExistsError])
def test_a_path_that_may_not_be_used_so_is_one_message(monkeypatch, capsys, tmp_path, kind):
    number = {PermissionError: errno.EACCES, FileExistsError: errno.EEXIST}[kind]
    path = tmp_path / "file"
    path.write_text("where a directory is to be made")

    def fail(*arguments):
        raise kind(number, os.strerror(number), str(path))

    monkeypatch.setattr(cli, "parse", fail)
    assert main.main(["command"]) == 2
    said = capsys.readouterr().err
    why = f"{path}: {os.strerror(number)}. Choose another path, or let this account use it."
    assert said == f"error: {why}\n"
    if kind is FileExistsError:  # of what is no file, it is our own mistake
        path.unlink()
        with pytest.raises(FileExistsError):
            main.main(["command"])


def test_once_a_command_runs_ctrl_c_reaches_it(monkeypatch, capsys):
    before = signal.getsignal(signal.SIGINT)
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        errors.interruptible_start()
        assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
        monkeypatch.setattr(cli, "parse", lambda *_: signal.raise_signal(signal.SIGINT))
        assert main.main(["main"]) == os.EX_TEMPFAIL
        assert "the same command resumes" in capsys.readouterr().err
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as under nohup, or in a shell's background
        errors.interruptible_start()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("run", [main.main, cache.command])
def test_an_outage_is_one_message_and_exit_code_75(monkeypatch, capsys, run):
    def fail(*arguments):
        raise OutageError("gs://bucket/a: it does not answer")

    monkeypatch.setattr(cli, "parse", fail)
    assert run(["command"]) == 75
    assert capsys.readouterr().err == "interrupted: gs://bucket/a: it does not answer\n"


@pytest.mark.parametrize("run", [main.main, cache.command])
@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (OSError(errno.EIO, "Input/output error", "/data/a"), 75, "interrupted: .*'/data/a'"),
        (OSError(errno.ENOSPC, "No space left on device", "/w/m"), 2, "error: .*'/w/m'.*Make room"),
        (TimeoutError("the store"), 75, "interrupted: the store"),
    ],
)
def test_a_machine_that_fails_is_one_message(monkeypatch, capsys, run, error, code, said):
    def fail(*arguments):
        raise error

    monkeypatch.setattr(cli, "parse", fail)
    assert run(["command"]) == code
    assert re.match(said, capsys.readouterr().err)


@pytest.mark.parametrize(
    "error", [FileNotFoundError(errno.ENOENT, "no"), OSError(errno.EBADF, "bad"), MemoryError()]
)
def test_a_fault_of_ours_keeps_its_traceback(monkeypatch, error):
    def fail(*arguments):
        raise error

    monkeypatch.setattr(cli, "parse", fail)
    with pytest.raises(type(error)):
        main.main(["command"])


@pytest.mark.parametrize("run", [main.main, cache.command])
def test_sigterm_before_the_first_step_is_code_75(monkeypatch, capsys, run):
    """A job that is preempted while it starts must be started again."""
    # Not os.kill: the system may hand that to another thread, and parsing would be over before.
    monkeypatch.setattr(cli, "parse", lambda *_: signal.raise_signal(signal.SIGTERM))
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        assert run(["command"]) == os.EX_TEMPFAIL
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "the same command resumes" in capsys.readouterr().err


def test_the_workdir_is_required():
    assert "--workdir=DIR is required" in command().stderr


def test_another_config_in_a_workdir_is_refused_by_key(tmp_path):
    config = {"seed": 0, "mode": "train", "optimizer": {"new": 1e-4, "clip": 1e-7}}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    resume.check_same_config({**config, "mode": "evaluate"}, tmp_path)
    changed = {**config, "seed": 1, "optimizer": {"new": 1e-3, "clip": 1e-7}}
    with pytest.raises(UserError) as refusal:
        resume.check_same_config(changed, tmp_path)
    assert "seed: 0 there, 1 now" in str(refusal.value)
    assert "optimizer.new: 0.0001 there, 0.001 now" in str(refusal.value)
    assert "clip" not in str(refusal.value)


def test_a_config_file_cut_short_is_named(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"seed": ')
    with pytest.raises(UserError, match=r"config\.json is not valid JSON"):
        resume.check_same_config({"seed": 0}, tmp_path)


def of_the_run(step: int) -> dict:
    """What the metrics say of a run's own evaluation."""
    return {"protocol": {"checkpoint": f"checkpoints/{step}", "split": "test"}}


def test_summary_shows_the_last_and_the_best(tmp_path):
    def evaluation(step: int, total: float) -> None:
        scores = {"R1": 1.0, "R5": 2.0, "R10": 3.0, "MdR": 4.0, "MnR": 5.0, "SumR": total}
        folder = tmp_path / "evaluation" / str(step)
        folder.mkdir(parents=True)
        result = {"step": step, "t2v": scores, "v2t": scores, "groups": {}, **of_the_run(step)}
        (folder / "metrics.json").write_text(json.dumps(result))

    evaluation(5, 60.0)
    evaluation(10, 50.0)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        results.summarise(tmp_path, "test")
    text = out.getvalue()
    assert text.index("last step (10)") < text.index("step 5; an optimistic protocol")
    assert text.index("50.0") < text.index("60.0")


def test_of_equal_evaluations_the_later_is_the_best(tmp_path, capsys):
    """It is the one whose checkpoint is kept."""
    for step in (5, 10, 15):
        scores = {"R1": 1.0, "R5": 2.0, "R10": 3.0, "MdR": 4.0, "MnR": 5.0}
        scores["SumR"] = 50.0 if step == 15 else 60.0
        folder = tmp_path / "evaluation" / str(step)
        folder.mkdir(parents=True)
        result = {"step": step, "t2v": scores, "v2t": scores, "groups": {}, **of_the_run(step)}
        (folder / "metrics.json").write_text(json.dumps(result))
    results.summarise(tmp_path, "test")
    assert "step 10; an optimistic protocol" in capsys.readouterr().out


@pytest.mark.parametrize(
    "other", [{"checkpoint": "/elsewhere/weights.safetensors"}, {"split": "val"}]
)
def test_evaluations_of_something_else_are_no_part_of_the_summary(tmp_path, capsys, other):
    """A workdir may have been used to evaluate other weights, or another split, before."""
    for step, total, protocol in ((0, 250.0, other), (5, 50.0, {})):
        scores = {"R1": 1.0, "R5": 2.0, "R10": 3.0, "MdR": 4.0, "MnR": 5.0, "SumR": total}
        result = {"step": step, "t2v": scores, "v2t": scores, "groups": {}, **of_the_run(step)}
        result["protocol"] |= protocol
        folder = tmp_path / "evaluation" / str(step)
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text(json.dumps(result))
    results.summarise(tmp_path, "test")
    said = capsys.readouterr().out
    assert "last step (5)" in said and "250.0" not in said and "best of" not in said


def test_evaluations_of_an_earlier_version_are_summarised(tmp_path, capsys):
    """They say neither their checkpoint nor, the oldest, their protocol."""
    for step, protocol in ((5, {}), (10, {"protocol": {"split": "test"}})):
        scores = {"R1": 1.0, "R5": 2.0, "R10": 3.0, "MdR": 4.0, "MnR": 5.0, "SumR": 6.0 * step}
        result = {"step": step, "t2v": scores, "v2t": scores, "groups": {}, **protocol}
        folder = tmp_path / "evaluation" / str(step)
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text(json.dumps(result))
    results.summarise(tmp_path, "test")
    assert "last step (10)" in capsys.readouterr().out
