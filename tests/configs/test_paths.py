"""Every way to name a model, and what is said when there is none."""

import json

import pytest

from configs import ConfigError
from configs.paths import MARKER, ModelPath, complete_steps, installed_file, resolve_model


def checkpoint(folder, tokenizer=False, marker=None):
    (folder / "params").mkdir(parents=True)
    (folder / MARKER).parent.mkdir()
    (folder / MARKER).write_text(json.dumps(marker or {"format": "crucible", "version": 1}))
    if tokenizer:
        (folder / "tokenizer").mkdir()
        (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    return folder


def test_a_run_folder_means_its_newest_complete_checkpoint(tmp_path):
    steps = tmp_path / "run" / "checkpoints"
    for step in (9, 10, 2):
        checkpoint(steps / str(step), tokenizer=True)
    checkpoint(steps / "11.orbax-checkpoint-tmp")
    (steps / "12" / "params").mkdir(parents=True)  # no marker: not complete
    checkpoint(steps / "notes")
    assert complete_steps(steps) == [2, 9, 10]
    found = ModelPath("native", steps / "10", steps / "10" / "tokenizer", 10)
    assert (
        resolve_model(tmp_path / "run") == resolve_model(str(steps)) == resolve_model(steps / "10") == found
    )
    assert resolve_model(steps / "9").step == 9


def test_the_runs_tokenizer_serves_a_checkpoint_without_its_own(tmp_path):
    folder = checkpoint(tmp_path / "checkpoints" / "0")
    assert resolve_model(tmp_path) == ModelPath("native", folder, None, 0)
    (tmp_path / "tokenizer").mkdir()
    assert resolve_model(tmp_path).tokenizer is None  # an empty folder is no tokenizer
    (tmp_path / "tokenizer" / "tokenizer.model").write_bytes(b"x")
    assert resolve_model(tmp_path).tokenizer == tmp_path / "tokenizer"


def test_a_native_save_has_no_step(tmp_path):
    folder = checkpoint(tmp_path / "saved", tokenizer=True)
    assert resolve_model(folder) == ModelPath("native", folder, folder / "tokenizer", None)


def test_a_hugging_face_folder_is_known_by_its_model_type(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert resolve_model(tmp_path) == ModelPath("huggingface", tmp_path, None, None)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert resolve_model(tmp_path).tokenizer == tmp_path


def test_a_gguf_file_is_weights_and_tokenizer(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF....")
    assert resolve_model(path) == ModelPath("gguf", path, path, None)
    path.write_bytes(b"PK\3\4")
    with pytest.raises(ConfigError, match="begins with b'PK"):
        resolve_model(path)


def test_a_run_without_a_complete_checkpoint_says_what_is_there(tmp_path):
    checkpoint(tmp_path / "checkpoints" / "3.orbax-checkpoint-tmp")
    with pytest.raises(ConfigError, match=r"no complete checkpoint.*3\.orbax-checkpoint-tmp/"):
        resolve_model(tmp_path)


def test_a_folder_without_a_model_says_what_was_looked_for_and_what_is_there(tmp_path):
    (tmp_path / "config.json").write_text('{"steps": 3}')
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(ConfigError) as error:
        resolve_model(tmp_path)
    for part in (
        "checkpoints/<step>/",
        "model_type",
        "config.json, m.gguf",
        f"give the file itself, e.g. {tmp_path}",
    ):
        assert part in str(error.value)


def test_a_missing_path_names_its_neighbours(tmp_path):
    (tmp_path / "run-1b").mkdir()
    with pytest.raises(ConfigError, match=r"run-1c: no such file or folder\. Did you mean .*run-1b\?"):
        resolve_model(tmp_path / "run-1c")
    with pytest.raises(ConfigError, match="In .* there is: run-1b/"):
        resolve_model(tmp_path / "elsewhere" / "x")


def test_a_marker_of_another_format_is_refused(tmp_path):
    for marker in ({"format": "other"}, ["crucible"]):
        with pytest.raises(ConfigError, match="wanted 'crucible'"):
            resolve_model(checkpoint(tmp_path / str(marker)[:5], marker=marker))


def test_a_file_of_an_installed_package_is_found_without_importing_it():
    assert installed_file("json", "decoder.py").name == "decoder.py"
    assert installed_file("json", "*.gguf") is None
    assert installed_file("no_such_package_at_all", "*") is None
