"""What the documentation shows is true: its examples run, its commands parse, its files are there."""

import importlib
import os
import re
import shlex
import subprocess
import sys

import pytest

import configs
from tests.conftest import ROOT

PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"]
RUNNABLE = re.compile(r"<!-- runnable -->\n```python\n(.*?)```", re.DOTALL)
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
# The module behind each command, and the dataclass of its config.
CONFIGURED = {
    "data": ("data.corpus", "CorpusConfig"),
    "data.dialogues": ("data.dialogues", "DialogueConfig"),
    "data.conversations": ("data.conversations", "ConversationConfig"),
    "data.plan": ("data.plan", "PlanConfig"),
    "data.synthetic": ("data.synthetic.config", "SyntheticConfig"),
    "data.related": ("data.related", "RelatedConfig"),
    "train": ("train.config", "TrainConfig"),
    "train.teacher": ("train.teacher", "TeacherConfig"),
    "rl": ("rl.config", "RLConfig"),
    "rl.rounds": ("rl.rounds", "RoundsConfig"),
    "rl.alignment.revise": ("rl.alignment.revise", "ReviseConfig"),
    "rl.alignment.judge": ("rl.alignment.judge", "JudgeConfig"),
    "rl.alignment.deliberate": ("rl.alignment.deliberate", "DeliberateConfig"),
    "evals": ("evals.config", "EvalConfig"),
    "launch.lifecycle": ("launch.lifecycle", "LifecycleConfig"),
}


def commands():
    """(page, command) of every `python -m` and `make` line in a shell block, backslashes joined."""
    for page in PAGES:
        blocks = FENCED.findall(page.read_text())
        for block in (text for language, text in blocks if language in ("", "sh", "bash")):
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
            configs.parse(cls, arguments, workdir_required=module not in ("evals", "data.plan"))
    else:
        main = importlib.import_module(f"{module}.__main__")
        if hasattr(main, "_commands"):
            main._commands().parse(arguments)
        else:
            parser = main._parser() if hasattr(main, "_parser") else main._options()
            parser.parse_args(arguments)


def test_the_examples_run_one_page_after_the_other(tmp_path):
    """In one fresh process with one device, as a reader would; each page in its own folder."""
    program = ["import os"]
    for page in PAGES:
        folder = tmp_path / page.stem
        folder.mkdir()
        program.append(f"os.chdir({str(folder)!r})\nprint({page.name!r}, flush=True)")
        for example in RUNNABLE.findall(page.read_text()):
            program.append(f"exec(compile({example!r}, {page.name!r}, 'exec'), names := {{}})")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(program)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    pages = [page.stem for page in PAGES if RUNNABLE.search(page.read_text())]
    assert {"configs", "data", "model", "train", "serve", "rl", "evals"} <= set(pages)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_are_there(page):
    named = re.findall(
        r"`((?:configs|model|data|train|serve|rl|evals|launch|tests|notebooks|docs)/[\w./-]*)`",
        page.read_text(),
    )
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing


def test_every_stage_has_a_page():
    stages = {"configs", "model", "data", "train", "serve", "rl", "evals", "launch"}
    assert stages <= {page.stem for page in PAGES}
