"""Mistakes on the command lines that argparse reads: one line each."""

import importlib

import pytest

PREPARE = "data_pipelines.prepare"
WEIGHTS = "save_jax.weights.__main__"
SWEEP = "launch.sweep.__main__"
COMPILE = "launch.compile.command"
REPORT = "launch.report.__main__"


@pytest.mark.parametrize(
    ("command", "line", "found"),
    [
        (PREPARE, "folder --roto=X", "unrecognized arguments: --roto=X. Did you mean --root?"),
        (PREPARE, "folder --root=X --workers=two", "argument --workers: invalid int value: 'two'"),
        (PREPARE, "folder --root=X --transcripts=nein", "(choose from 'file', 'whisper', 'none')"),
        (PREPARE, "folder --root=X --encoding=jpg", "Did you mean jpeg?"),
        (PREPARE, "", "the following arguments are required: dataset"),
        (WEIGHTS, "imprt x --out=y", "Did you mean import?"),
        (WEIGHTS, "import x --ouput=y", "required: --out. --ouput is unknown. Did you mean --out?"),
        (WEIGHTS, "import x --out=y --overwite", "Did you mean --overwrite?"),
        (SWEEP, "--confg=x --workdir=y", "--config. --confg is unknown. Did you mean --config?"),
        (SWEEP, "--config=x --workdir=y --dry_rn", "Did you mean --dry_run?"),
        (COMPILE, "--config=x --topology=cpu:1 --bacth=2", "Did you mean --batch?"),
        (REPORT, "RUNS --metrc=R1", "Did you mean --metric?"),
        ("launch.compare", "", "the following arguments are required: WORKDIR"),
        ("launch.benchmark.__main__", "cache --dta=x", "--help shows all flags"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_in_one_line(command, line, found, capsys):
    assert importlib.import_module(command).main(line.split()) == 2
    printed = capsys.readouterr()
    assert found in printed.err and printed.err.startswith("error: ") and not printed.out
    assert printed.err.endswith(" --help shows all flags\n") and printed.err.count("\n") == 1


def test_what_belongs_to_the_config_is_no_misspelt_flag(capsys):
    line = ["--config=x", "--topolgy=cpu:1", "--config.seed=1"]
    assert importlib.import_module(COMPILE).main(line) == 2
    assert "--config.seed" not in capsys.readouterr().err
