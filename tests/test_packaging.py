"""What installing and importing brings, and what it must not."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STAGES = ["configs", "model", "data", "train", "serve", "rl", "evals", "launch"]
# other frameworks, and what a stage takes up only where it is used
HEAVY = (
    "tensorflow",
    "torch",
    "seqio",
    "keras",
    "transformers",
    "jax.experimental.pallas",
    "datasets",
    "daft",
)


def pinned():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split(" ;")[0].split("==") for line in lines if line and not line.startswith("#"))


def metadata():
    """setup.py's own arguments, as setuptools would get them."""
    import setuptools

    given = {}
    real, setuptools.setup = setuptools.setup, lambda **arguments: given.update(arguments)
    cwd = os.getcwd()
    os.chdir(ROOT)
    try:
        exec(compile((ROOT / "setup.py").read_text(), "setup.py", "exec"), {"__name__": "__main__"})
    finally:
        setuptools.setup = real
        os.chdir(cwd)
    return given


@pytest.mark.parametrize("stage", STAGES)
def test_importing_a_stage_brings_nothing_that_takes_long_to_import(stage):
    if not (ROOT / stage / "__init__.py").exists():
        pytest.skip(f"{stage}/ is not here")
    script = f"import sys, {stage}\nprint([name for name in {HEAVY} if name in sys.modules])"
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[]"


def test_every_stage_and_its_folders_are_packaged_and_typed():
    packages = metadata()["packages"]
    present = [stage for stage in STAGES if list((ROOT / stage).glob("*.py"))]
    for stage in present:
        assert stage in packages and (ROOT / stage / "py.typed").exists(), stage
        for file in (ROOT / stage).rglob("*.py"):
            assert ".".join(file.parent.relative_to(ROOT).parts) in packages, file
    assert {name.split(".")[0] for name in packages} <= set(STAGES)


def test_every_requirement_is_pinned_to_a_version_that_satisfies_it():
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    pins = {canonicalize_name(name.strip()): version for name, version in pinned().items()}
    given = metadata()
    wanted = list(given["install_requires"])
    wanted += [item for extra, items in given["extras_require"].items() if extra != "gpu" for item in items]
    for text in wanted:
        requirement = Requirement(text)
        version = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version, prereleases=True), f"{text}: pinned {version}"


def test_constraints_hold_neither_torch_nor_a_path():
    assert len(pinned()) > 100
    for name, version in pinned().items():
        assert not re.match("torch|nvidia|triton|jax-cuda", name), name
        assert re.fullmatch(r"[0-9][0-9a-z.+!]*", version.strip()), (name, version)


def test_a_requirement_of_the_product_is_no_torch():
    given = metadata()
    for text in [*given["install_requires"], *sum(given["extras_require"].values(), [])]:
        assert not re.match("torch|tensorflow($|[^-])", text), text


def test_make_lists_its_targets():
    run = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    listed = re.findall(r"^make ([a-z-]+) ", run.stdout, re.MULTILINE)
    assert {"demo", "test", "test-all", "chat", "lint", "clean"} <= set(listed)


def test_make_without_a_new_enough_python_says_so(tmp_path):
    for name in ("Makefile", "setup.py", "constraints.txt"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    run = subprocess.run(
        ["make", "install", "PYTHON="], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert run.returncode != 0
    assert "no Python 3.11 or newer was found" in run.stderr and "Traceback" not in run.stderr


def test_ci_runs_the_readmes_test_command():
    assert "make test" in (ROOT / "README.md").read_text()
    assert (ROOT / ".ci" / "run").read_text().rstrip().endswith("make test")
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
