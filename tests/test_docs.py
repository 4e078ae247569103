"""Documentation that can go stale is generated or checked."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from quantcli.cli.app import COMMANDS, parse
from quantcli.cli.configuration.keys import Variants
from quantcli.cli.configuration.passes import PASSES

ROOT = Path(__file__).resolve().parents[1]
GENERATOR = ROOT / "scripts" / "make_cli_docs.py"
CONFIGURATIONS = ROOT / "scripts" / "make_configuration_docs.py"


def generator(path=GENERATOR):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_cli_page_is_what_the_help_says():
    assert (ROOT / "docs" / "cli.md").read_text() == generator().page(), "run `python scripts/make_cli_docs.py`"


def test_configurations_page_is_what_the_table_says():
    page = (ROOT / "docs" / "configurations.md").read_text()
    assert page == generator(CONFIGURATIONS).page(), "run `python scripts/make_configuration_docs.py`"
    for name, spec in PASSES.items():
        assert f"### {name}\n" in page
        passes = spec.passes.values() if isinstance(spec, Variants) else [spec]
        assert all(f"| `{key}` |" in page for found in passes for key in found.keys)


@pytest.mark.parametrize("path", [GENERATOR, CONFIGURATIONS])
def test_check_fails_on_a_stale_page(path, tmp_path, monkeypatch):
    module = generator(path)
    monkeypatch.setattr(module, "TARGET", tmp_path / "docs" / "cli.md")
    monkeypatch.setattr(sys, "argv", ["make_cli_docs.py", "--check"])
    with pytest.raises(SystemExit, match="stale"):
        module.main()
    monkeypatch.setattr(sys, "argv", ["make_cli_docs.py"])
    module.main()
    monkeypatch.setattr(sys, "argv", ["make_cli_docs.py", "--check"])
    module.main()
    module.TARGET.write_text("old")
    with pytest.raises(SystemExit, match="stale"):
        module.main()


def test_the_page_does_not_depend_on_the_terminal():
    for columns in ("60", "200"):
        env = {"COLUMNS": columns, "TERM": "xterm-256color", "PATH": "/usr/bin:/bin"}
        subprocess.run([sys.executable, str(GENERATOR), "--check"], check=True, env=env)


@pytest.mark.parametrize("example", [e for c in COMMANDS.values() for e in c.examples])
def test_examples_in_the_help_parse(example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("gptq_pass.json").write_text('{"type": "GptqQuantizer"}')
    words = subprocess.run(
        ["sh", "-c", f'quantcli() {{ printf "%s\\0" "$@"; }}\n{example}'], capture_output=True, text=True, check=True
    ).stdout.split("\0")[:-1]
    assert parse(words).command.name == words[0]


def test_every_command_and_exit_code_is_documented():
    page = (ROOT / "docs" / "cli.md").read_text()
    assert re.findall(r"^## quantcli (\S+)$", page, re.M) == list(COMMANDS)
    assert re.findall(r"^\| (\d+) \|", page, re.M) == ["0", "1", "2", "3", "4", "5", "130"]


def commands_in(path):
    """Command lines of the shell blocks of a Markdown file, continuations joined."""
    for block in re.findall(r"```(?:bash|sh|console)\n(.*?)```", path.read_text(), re.S):
        for line in block.replace("\\\n", " ").splitlines():
            words = line.strip().removeprefix("$ ").split(" # ")[0]
            if words.startswith("quantcli ") and not re.search(r"[|<>]|\.\.\.|…", words):
                yield words


def documented_commands():
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return [(p.name, words) for p in pages if p.is_file() for words in commands_in(p)]


@pytest.mark.parametrize(("page", "words"), documented_commands())
def test_commands_in_the_documentation_parse(page, words):
    assert parse(subprocess.run(
        ["sh", "-c", f'quantcli() {{ printf "%s\\0" "$@"; }}\n{words}'], capture_output=True, text=True, check=True
    ).stdout.split("\0")[:-1]) is not None  # fmt: skip
