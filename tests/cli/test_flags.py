"""The command line is made of the settings' structs: nothing is said twice, and help answers at once."""

import json
import subprocess
import sys
from typing import get_type_hints

import pytest

from dsd_p2p.errors import ConfigError
from node.cli.flags import settings_of
from node.cli.main import main, overview, parse
from node.cli.table import COMMANDS, GROUPS, Command
from node.config import FlagError, GenerateConfig, UpConfig, read_config
from node.lab.config import WanConfig


def leaves(commands: dict[str, Command], above: tuple[str, ...] = ()):
    for name, command in commands.items():
        if command.parts:
            yield from leaves(command.parts, (*above, name))
        else:
            yield (*above, name), command


LEAVES = dict(leaves(COMMANDS))


@pytest.mark.parametrize("words", LEAVES, ids=" ".join)
def test_every_command_takes_its_settings_and_every_setting_has_help(words):
    command = LEAVES[words]
    hints = get_type_hints(command.load_run())
    assert hints.pop("return") is int
    assert tuple(hints.values()) == command.load_settings()
    for setting in settings_of(command.load_settings()):
        assert setting.help, setting.name
        assert not setting.help.endswith(".")


def test_help_imports_nothing_slow():
    """What takes time: numpy, torch, trio. Every command's help is made without them."""
    code = f"""
import contextlib, io, json, sys
from node.cli.main import overview, parse
overview()
for words in {[list(words) for words in LEAVES]!r}:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        parse([*words, "--help"])
print(json.dumps([name for name in ("numpy", "torch", "trio", "transformers", "libp2p", "rich") if name in sys.modules]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stdout) == []


def test_the_overview_groups_every_command_by_what_people_do():
    shown = overview()
    assert len(GROUPS) >= 5
    for group, commands in GROUPS.items():
        assert f"\n{group}:\n" in shown
        for name, command in commands.items():
            assert f"  {name:<12}{command.help}" in shown


def test_flags_become_settings():
    words, _command, given = parse(["generate", "--connect", "a,b", "--max-tokens", "7", "--json", "--mode", "sync"])
    assert words == ["generate"]
    assert given == {"connect": ["a", "b"], "max_tokens": 7, "json": True, "mode": "sync"}
    config = read_config(GenerateConfig, None, given)
    assert (config.connect, config.max_tokens, config.json, config.mode) == (("a", "b"), 7, True, "sync")
    assert read_config(GenerateConfig, None, {}) == GenerateConfig()
    _, _, off = parse(["join", "--no-lan", "dsd1x"])
    assert off == {"lan": False, "invite": "dsd1x"}
    _, _, swept = parse(["sim", "sweep", "x.toml", "--grid", "a=1,2", "--grid", "b=3"])
    assert swept["grid"] == ["a=1,2", "b=3"]


def test_the_old_names_of_the_policy_still_work():
    _, _, given = parse(["up", "--window", "analytic"])
    assert read_config(UpConfig, None, given).policy == "analytic"
    assert read_config(UpConfig, None, {"window": "awc"}).policy == "learned"
    assert read_config(WanConfig, None, {"policies": ["awc", "analytic"]}).policies == ("learned", "analytic")


def test_a_file_is_read_and_flags_beat_it(tmp_path):
    file = tmp_path / "dsd.toml"
    file.write_text("max_tokens = 5\ndepth = 3\n")
    config = read_config(GenerateConfig, str(file), {"max_tokens": 9})
    assert (config.max_tokens, config.depth) == (9, 3)
    file.write_text("max_token = 5\n")
    with pytest.raises(FlagError, match="max_token"):
        read_config(GenerateConfig, str(file), {})
    with pytest.raises(ConfigError, match="config file"):
        read_config(GenerateConfig, str(tmp_path / "none.toml"), {})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "--prompt", "x", "--top-p", "0"], "--top-p is 0.0"),
        (["bench", "users", "--sessions", "0"], "--sessions is 0"),
        (["node", "--swarm", "x", "--span", "0:2"], "--span applies only to a stage started by hand"),
    ],
)
def test_a_value_out_of_range_is_named_by_its_flag(arguments, words, capsys):
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert words in line
    assert "--help`" in line


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_shells_get_a_script_with_every_command(shell, capsys):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for words in LEAVES:
        assert words[-1] in script
