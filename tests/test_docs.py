"""What the documentation shows is true: its examples run, its commands parse, its files are there."""

import importlib
import re
import shlex

import pytest

import configs
from tests.conftest import ROOT

PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"]
RUNNABLE = re.compile(r"<!-- runnable -->\n```python\n(.*?)```", re.DOTALL)
SHELL = re.compile(r"```(?:sh|bash)?\n(.*?)```", re.DOTALL)
# The module behind each command, and the dataclass of its config.
CONFIGURED = {
    "data": ("data.corpus", "CorpusConfig"),
    "data.dialogues": ("data.dialogues", "DialogueConfig"),
    "train": ("train.config", "TrainConfig"),
    "rl": ("rl.config", "RLConfig"),
    "evals": ("evals.config", "EvalConfig"),
    "launch.lifecycle": ("launch.lifecycle", "LifecycleConfig"),
}


def commands():
    """(page, command) of every `python -m` and `make` line in a shell block, backslashes joined."""
    for page in PAGES:
        for block in SHELL.findall(page.read_text()):
            for line in block.replace("\\\n", " ").splitlines():
                if line.startswith(("python -m ", "make ")):
                    yield pytest.param(page, line, id=f"{page.name}:{line[:60]}")


@pytest.mark.parametrize("page, line", commands())
def test_a_command_of_the_documentation_is_one_that_the_stage_takes(page, line, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(line, comments=True)
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words[1] in targets
        return
    module, arguments = words[2], words[3:]
    if module in CONFIGURED:
        where, name = CONFIGURED[module]
        cls = getattr(importlib.import_module(where), name)
        if "--help" in arguments:
            with pytest.raises(SystemExit):
                configs.parse(cls, arguments)
        else:  # raises for a config file that is not there, an unknown key or flag, an ill-typed value
            configs.parse(cls, arguments, workdir_required=module != "evals")
    else:
        main = importlib.import_module(f"{module}.__main__")
        parser = main._parser() if hasattr(main, "_parser") else main._options()
        parser.parse_args(arguments)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if RUNNABLE.search(page.read_text())], ids=lambda p: p.name
)
def test_the_examples_of_a_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "example"}
    for example in RUNNABLE.findall(page.read_text()):
        exec(compile(example, str(page), "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_are_there(page):
    named = re.findall(
        r"`((?:configs|model|data|train|serve|rl|evals|launch|tests|notebooks|docs)/[\w./-]*)`",
        page.read_text(),
    )
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing


def test_every_stage_has_a_page():
    stages = {"configs", "model", "data", "train", "serve", "rl", "evals"}
    assert stages <= {page.stem for page in PAGES}
