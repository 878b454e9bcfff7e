"""Every key of every family's config.json means what transformers means by it, or is refused by name.

tests/goldens/make_keys.py made the golden file: what transformers makes of a golden checkpoint whose config has one key
changed.
"""

import functools
import json
import shutil

import numpy as np
import pytest

from model import load, save
from model.families import FAMILIES
from model.families.common import IGNORED_KEYS

from .conftest import GOLDENS
from .test_families import config_of, forward, inputs_of

KEYS = json.loads((GOLDENS / "keys.json").read_text())
# Passed over, and not set in the golden file: what a model and its labels are called, its dtype, how it is run.
NAMES = {
    "architectures",
    "model_type",
    "transformers_version",
    "id2label",
    "label2id",
    "dtype",
    "torch_dtype",
}
NAMES |= {"_name_or_path", "_attn_implementation"}
REFUSED, ABSENT = "refused", {"absent": True}  # the second in place of a value: the key is not there
# What an error calls a key where a block finds that numbers do not fit together.
NAMES_OF_FIELDS = {
    "num_key_value_heads": "num_kv_heads",
    "num_attention_heads": "num_heads",
    "expand": "intermediate_size",
}


def edited(saved, edits):
    changed = json.loads(json.dumps(saved))
    for path, value in edits:
        node = changed
        for key in path[:-1]:
            node = node[key]
        if value == ABSENT:
            node.pop(path[-1], None)
        else:
            node[path[-1]] = value
    return changed


def read(name, edits, named=True):
    """The model of a golden checkpoint's config with these changes; REFUSED if an error names one of the keys."""
    saved = edited(config_of(GOLDENS / name), edits)
    try:
        return FAMILIES[saved["model_type"]].read_config(saved).replace(max_length=1024)
    except ValueError as error:
        if not named:
            return REFUSED
        keys = {key for path, value in edits for key in (*path, *(value if isinstance(value, dict) else ()))}
        keys |= {NAMES_OF_FIELDS[key] for key in keys & NAMES_OF_FIELDS.keys()}
        assert any(key in str(error) for key in keys) or "rope" in str(error), (edits, str(error))
        return REFUSED


@functools.cache
def plain(name):
    return read(name, ())


def picked(name, logits):
    """The numbers of a golden file's outputs that make_keys.py picks."""
    golden = np.load(GOLDENS / name / "logits.npz")
    if "classes" in golden:
        return np.asarray(logits)[:2].ravel()
    values = np.asarray(logits)
    return np.concatenate([values[0, 12], values[1, 8], values[1, 1]])


def ours(name, edits, folder):
    """Of the golden checkpoint with its config changed."""
    shutil.copytree(GOLDENS / name, folder, dirs_exist_ok=True)
    (folder / "config.json").write_text(json.dumps(edited(config_of(GOLDENS / name), edits)))
    cfg, params = load(folder, dtype="float32")
    golden = np.load(GOLDENS / name / "logits.npz")
    out = forward(cfg, params, golden["tokens"], **inputs_of(golden))
    if "classes" in golden:
        return picked(name, out.heads["class"][:, 0])
    return picked(name, getattr(out, "logits" if "logits" in golden else "hidden"))


def theirs(name):
    """Of transformers, with the config unchanged."""
    golden = np.load(GOLDENS / name / "logits.npz")
    return picked(name, golden[next(key for key in ("classes", "logits", "hidden") if key in golden)])


def few(values):
    return values[:: max(1, len(values) // 9)]


@pytest.mark.parametrize("name", sorted(KEYS))
def test_a_changed_key_is_read_as_transformers_reads_it_or_refused(name):
    """Without a look at numbers: what changes transformers' model changes ours, and foreign keys change nothing."""
    kept = [edits for edits, *_ in KEYS[name]["logits"] if read(name, edits) == plain(name)]
    kept += [edits for (edits,) in sizes(name) if read(name, edits, named=False) == plain(name)]
    assert not kept, "passed over, but not by transformers"
    changed = [edits for (edits,) in KEYS[name]["foreign"] if read(name, edits) not in (REFUSED, plain(name))]
    assert not changed, "read, but not by transformers"


def sizes(name):
    """Changes with which the tensors do not fit; but for a key in another place, which transformers reads too late."""
    return [case for case in KEYS[name]["weights"] if all(value != ABSENT for _, value in case[0])]


def worth_a_look(name):
    """(edits, transformers' numbers) where our model is another."""
    known = theirs(name)
    for edits, *numbers in KEYS[name]["logits"] + KEYS[name]["same"]:
        # transformers 5.23 forgets DBRX's attn_config.rope_theta, which the published folder has
        forgotten = name == "dbrx" and [["rope_parameters"], None] in edits and len(edits) == 2
        if not forgotten and read(name, edits) not in (REFUSED, plain(name)):
            yield edits, numbers[0] if numbers else few(known)


def test_every_key_that_is_passed_over_everywhere_is_shown_to_change_nothing():
    keys = lambda *kinds: {
        path[-1]
        for cases in KEYS.values()
        for kind in kinds
        for edits, *_ in cases[kind]
        for path, _ in edits
    }
    assert IGNORED_KEYS <= keys("same", "foreign") | NAMES
    assert IGNORED_KEYS & keys("logits") <= {"is_decoder"}  # of BERT, which reads it


FOREIGN = [
    {"logit_scale": 0.3},
    {"residual_multiplier": 0.7},
    {"sliding_window": 256},
    {"layer_types": ["sliding_attention"] * 4},
    {"partial_rotary_factor": 0.5},
    {"rope_interleaved": True},
    {"attn_logit_softcapping": 30.0},
    {"num_local_experts": 8},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 1]}},
    {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0, "beta_fast": 4.0}},
    {"rope_parameters": {"rope_theta": 1e4, "factor": 2.0}},
    {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
]


@pytest.mark.parametrize("edits", FOREIGN, ids=str)
def test_what_would_be_lost_is_refused(edits):
    saved = config_of(GOLDENS / "llama_tied") | edits
    with pytest.raises(ValueError, match="|".join([*edits, *edits.get("rope_parameters", ())])):
        FAMILIES["llama"].read_config(saved)


SAYS_NOTHING = [
    {"logit_scale": 1.0},
    {"logit_scale": None},
    {"sliding_window": 1024},  # as long as any text
    {"sliding_window": None},
    {"layer_types": ["full_attention"] * 4},
    {"partial_rotary_factor": 1},
    {"rope_interleaved": False},
    {"is_causal": True},
    {"use_sliding_window": False},
    {"rope_scaling": {"rope_type": "default", "rope_theta": 10000.0}},
]


@pytest.mark.parametrize("edits", SAYS_NOTHING, ids=str)
def test_a_foreign_key_that_says_nothing_is_passed_over(edits, caplog):
    saved = config_of(GOLDENS / "llama_tied")
    assert FAMILIES["llama"].read_config(saved | edits) == FAMILIES["llama"].read_config(saved)
    assert not caplog.records


def test_a_key_that_nobody_knows_is_passed_over_with_a_line_in_the_log(caplog):
    saved = config_of(GOLDENS / "llama_tied")
    FAMILIES["llama"].read_config(saved | {"trained_by": "somebody", "is_llama_config": True})
    assert "keys that llama does not know; ignored: is_llama_config, trained_by" in caplog.text


@pytest.mark.parametrize("name", ["llama_tied", "qwen3", "falcon_rw"])
def test_a_decoder_that_is_not_causal_is_read_and_saved_so(name, tmp_path):
    """As embedding models have it; transformers' numbers."""
    edits = [[["is_causal"], False]]
    (numbers,) = [numbers for case, numbers in KEYS[name]["logits"] if case == edits]
    assert np.abs(few(ours(name, edits, tmp_path / "model")) - numbers).max() < 1e-4
    cfg, params = load(tmp_path / "model")
    assert not cfg.causal and cfg.family == plain(name).family
    save(tmp_path / "again", cfg, params, format="huggingface")
    assert config_of(tmp_path / "again")["is_causal"] is False
    assert load(tmp_path / "again")[0] == cfg


def test_a_decoder_of_states_or_windows_cannot_be_other_than_causal():
    for name in ("mamba", "mistral_windowed", "t5", "qwen3_next"):
        saved = config_of(GOLDENS / name) | {"is_causal": False}
        with pytest.raises(ValueError, match="is_causal may differ"):
            FAMILIES[saved["model_type"]].read_config(saved)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(KEYS))
def test_a_changed_key_gives_the_logits_of_transformers(name, tmp_path):
    wrong = []
    for edits, numbers in worth_a_look(name):
        try:
            difference = np.abs(few(ours(name, edits, tmp_path)) - numbers).max()
        except ValueError as error:  # the tensors of this checkpoint are not those of a tied head
            assert "tie_word_embeddings is true, yet" in str(error) or "lacks 1 tensors" in str(error)
            continue
        if not difference < 2e-4 * max(1, np.abs(numbers).max()):
            wrong.append((edits, float(difference)))
    assert not wrong
