"""What --help of each command says."""

import importlib
import re

import pytest

COMMANDS = {
    "launch.sweep": "launch.sweep.__main__",
    "launch.report": "launch.report.__main__",
    "launch.compare": "launch.compare",
    "launch.chaos": "launch.chaos.__main__",
    "launch.compile": "launch.compile.command",
    "launch.benchmark": "launch.benchmark.__main__",
    "launch.benchmark input": "launch.benchmark.__main__",
    "launch.benchmark train": "launch.benchmark.__main__",
    "launch.benchmark cache": "launch.benchmark.__main__",
    "launch.benchmark storage": "launch.benchmark.__main__",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_the_command_as_it_is_typed_and_its_exit_codes(command, capsys):
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(COMMANDS[command]).main([*command.split()[1:], "--help"])
    said = capsys.readouterr().out
    assert ended.value.code == 0 and said.startswith(f"usage: python -m {command} ")
    _, _, codes = said.partition("\nexit codes: 0 ")
    assert all(
        re.search(rf"\b{code}", codes) for code in ("2 a mistake", "75 interrupted", "1 ")
    ), said
