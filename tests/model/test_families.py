"""Every family of models in parity with transformers, both ways; tests/goldens/make.py made the golden files."""

import dataclasses
import json
import logging
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from model import init_cache, load, save
from model.families import FAMILIES

from .conftest import GOLDENS, applied, compiled_fast

CHECKPOINTS = sorted(path.parent.name for path in GOLDENS.glob("*/logits.npz"))
ENCODERS = ("bert", "bert_bare", "bert_classes", "modernbert", "modernbert_bare")
DEFAULTS = json.loads((GOLDENS / "defaults.json").read_text())
ELSEWHERE = ["rwkv7"]  # transformers has no such class; make_rwkv7.py asked another implementation
ENCODER_INPUTS = {"encoder_tokens": "encoder_tokens", "encoder_mask": "encoder_segment_ids"}
UNUSABLE = {
    "deepseek_v2": {"num_experts_per_tok": 6},
    "glm4_moe": {"head_dim": 128},
}  # defaults that make no model
OTHER_PYTHON = GOLDENS.parents[1] / ".venvs" / "goldens" / "bin" / "python"

forward = compiled_fast(applied, static_argnums=0)


def all_tensors(folder):
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= safetensors.numpy.load_file(file)
    return tensors


def form(tensors):
    return {name: (array.dtype, array.shape) for name, array in tensors.items()}


def inputs_of(golden):
    """What `apply` takes beside the tokens."""
    names = {"token_types": "token_types", **ENCODER_INPUTS}
    others = {ours: golden[key] for key, ours in names.items() if key in golden}
    return {"positions": golden["positions"], "segment_ids": golden["mask"], **others}


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def test_every_family_has_a_golden_checkpoint():
    assert {config_of(GOLDENS / name)["model_type"] for name in CHECKPOINTS} | {"kimi_k2"} == set(FAMILIES)


@pytest.mark.parametrize("name", ["bloom", "falcon_7b"])
def test_the_width_has_another_name_in_old_folders(name, caplog):
    saved = config_of(GOLDENS / name)
    family = FAMILIES[saved["model_type"]]
    old = {"n_embed" if key == "hidden_size" else key: value for key, value in saved.items()}
    assert family.read_config(old) == family.read_config(saved) and not caplog.records
    with pytest.raises(ValueError, match="hidden_size and n_embed mean the same, and disagree"):
        family.read_config(saved | {"n_embed": saved["hidden_size"] + 6})


def test_kimi_k2_is_a_deepseek_v3_with_code_of_its_own(tmp_path, caplog):
    cfg, params = load(GOLDENS / "deepseek_v3")
    saved = config_of(GOLDENS / "deepseek_v3") | {
        "model_type": "kimi_k2",
        "auto_map": {"AutoModel": "evil.Kimi"},
    }
    save(tmp_path / "model", cfg, params, format="huggingface")
    (tmp_path / "model" / "config.json").write_text(json.dumps(saved))
    again, _ = load(tmp_path / "model")
    assert (again, again.family) == (cfg, "kimi_k2") and "which is not run" in caplog.text
    save(tmp_path / "again", again, params, format="huggingface")
    assert config_of(tmp_path / "again")["model_type"] == "kimi_k2"


@pytest.mark.parametrize("name", ["deepseek_v2_yarn", "deepseek_v3"])
@pytest.mark.parametrize("mscale, all_dim", [(0.7, 0.9), (0.707, 0.707), (1.0, 0.5), (1.0, 1.0)])
def test_a_saved_deepseek_has_the_magnitudes_of_yarn_for_readers_without_attention_factor(
    name, mscale, all_dim
):
    saved = config_of(GOLDENS / name)
    family = FAMILIES[saved["model_type"]]
    saved["rope_parameters"] |= {"mscale": mscale, "mscale_all_dim": all_dim}
    written = family.write_config(family.read_config(saved))["rope_scaling"]
    assert written["mscale_all_dim"] == pytest.approx(all_dim, rel=1e-6)
    assert written.get("mscale", 1.0) == pytest.approx(mscale, rel=1e-6)  # DeepSeek's and vLLM's default
    assert ("mscale" in written) == (mscale != 1)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_logits_equal_those_of_transformers(name):
    golden = np.load(GOLDENS / name / "logits.npz")
    cfg, params = load(GOLDENS / name, dtype="float32")
    out, real = forward(cfg, params, golden["tokens"], **inputs_of(golden)), golden["mask"] == 1
    pairs = [(getattr(out, key)[real], golden[key][real]) for key in ("logits", "hidden") if key in golden]
    if "classes" in golden:  # of the first token, where that is none of the padding
        pairs.append((out.heads["class"][real[:, 0], 0], golden["classes"][real[:, 0]]))
    ahead = {int(key.removeprefix("future_")): golden[key] for key in golden if key.startswith("future_")}
    assert len(out.mtp_logits) == len(ahead)
    for k, theirs in ahead.items():  # where token i + k is real too
        there = real[:, :-k] & real[:, k:]
        pairs.append((out.mtp_logits[k - 1][:, :-k][there], theirs[:, :-k][there]))
    for ours, theirs in pairs:
        assert np.abs(theirs).max() > 1
        errors = np.abs(ours - theirs)  # of float32 sums in two orders
        assert np.quantile(errors, 0.99) < 1e-4 and errors.max() < 2e-5 * np.abs(theirs).max()
        assert np.sqrt(np.mean(np.square(errors))) < 2e-5
    assert pairs


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_saving_back_gives_the_same_tensors_bit_for_bit(name, tmp_path, caplog):
    cfg, params = load(GOLDENS / name)
    caplog.clear()
    save(tmp_path / "copy", cfg, params, format="huggingface")
    assert "does not know" not in caplog.text  # every key that a family writes it reads
    before, after = all_tensors(GOLDENS / name), all_tensors(tmp_path / "copy")
    assert form(before) == form(after)
    assert all(before[key].tobytes() == after[key].tobytes() for key in before)
    assert load(tmp_path / "copy")[0] == cfg
    saved, wanted = config_of(tmp_path / "copy"), config_of(GOLDENS / name)
    assert [saved[key] for key in ("model_type", "architectures")] == [
        wanted[key] for key in ("model_type", "architectures")
    ]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_changed_model_is_saved_in_the_same_form(name, tmp_path):
    """As after a training step: no parameter is what it was."""
    cfg, params = load(GOLDENS / name)
    moved = jax.tree.map(lambda x: x + jnp.asarray(0.25, x.dtype), params)
    save(tmp_path / "moved", cfg, moved, format="huggingface")
    before, after = all_tensors(GOLDENS / name), all_tensors(tmp_path / "moved")
    assert form(before) == form(after)
    assert all((before[key] != after[key]).any() for key in before)
    again = load(tmp_path / "moved")[1]
    jax.tree.map(np.testing.assert_array_equal, again, moved)


@pytest.mark.parametrize("name", sorted(DEFAULTS))
def test_a_key_that_is_absent_has_the_default_of_transformers(name, caplog):
    saved = DEFAULTS[name] | UNUSABLE.get(DEFAULTS[name]["model_type"], {})
    family = FAMILIES[saved["model_type"]]
    with caplog.at_level(logging.WARNING):
        whole = family.read_config(saved)
    assert not caplog.records  # every key of transformers' class is read, or known to change nothing
    for key in saved:
        rest = {other: value for other, value in saved.items() if other != key}
        try:
            assert family.read_config(rest) == whole, key
        except ValueError as error:
            assert str(error) == f"{key} is missing." or key in UNUSABLE.get(saved["model_type"], {})


def tokens_of(name):
    """Its golden file's tokens, and what an encoder reads beside them."""
    golden = np.load(GOLDENS / name / "logits.npz")
    others = {ours: golden[key] for key, ours in ENCODER_INPUTS.items() if key in golden}
    return golden["tokens"].astype(np.int32), others


def decoded(cfg, params, tokens, prompt, encoder):
    """Logits of a prompt at once, then of one token after the other."""
    length = encoder["encoder_tokens"].shape[1] + 2 if encoder else None
    cache = init_cache(cfg, len(tokens), tokens.shape[1] + 1, encoder_length=length)
    out = forward(cfg, params, tokens[:, :prompt], cache=cache, **encoder)
    logits = [out.logits]
    for t in range(prompt, tokens.shape[1]):
        out = forward(cfg, params, tokens[:, t : t + 1], cache=out.cache)
        logits.append(out.logits)
    return jnp.concatenate(logits, axis=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CHECKPOINTS if name not in ENCODERS])
def test_decoding_token_by_token_equals_the_whole_text_at_once(name):
    cfg, params = load(GOLDENS / name, dtype="float32")
    tokens, encoder = tokens_of(name)
    whole = forward(cfg, params, tokens, **encoder).logits
    np.testing.assert_allclose(decoded(cfg, params, tokens, 8, encoder), whole, atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_scanned_model_computes_the_same(name):
    cfg, params = load(GOLDENS / name, dtype="float32")
    scanned_cfg, scanned = load(GOLDENS / name, cfg=cfg.replace(scan=True), dtype="float32")
    tokens, encoder = tokens_of(name)
    whole = forward(cfg, params, tokens, **encoder).logits
    np.testing.assert_allclose(forward(scanned_cfg, scanned, tokens, **encoder).logits, whole, atol=2e-4)


@pytest.mark.slow
@pytest.mark.skipif(
    not OTHER_PYTHON.is_file(), reason="no .venvs/goldens with transformers; see tests/goldens/make.py"
)
def test_transformers_computes_the_same_from_what_we_save(tmp_path):
    names = [name for name in CHECKPOINTS if name not in ELSEWHERE]
    for name in names:
        cfg, params = load(GOLDENS / name, dtype="float32")
        save(tmp_path / name, cfg, params, format="huggingface")
    program = GOLDENS / "make.py"
    command = [str(OTHER_PYTHON), str(program), "--check", str(tmp_path), *names]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    differences = json.loads(run.stdout.splitlines()[-1])
    assert set(differences) == set(names)
    # the golden files were made on another processor, which sums in another order
    assert {name: value for name, value in differences.items() if not value < 1e-4} == {}


def test_a_model_without_a_family_of_its_own_is_saved_as_the_first_that_can_hold_it(tmp_path):
    cfg, params = load(GOLDENS / "gpt2")
    save(tmp_path / "model", dataclasses.replace(cfg, family=None), params, format="huggingface")
    assert config_of(tmp_path / "model")["model_type"] == "gpt2"
