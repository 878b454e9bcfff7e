"""Folders as they are published: models of text inside others, eight-bit floats, names without their beginning.

tests/goldens/make_wrapped.py made the golden files.
"""

import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from model import load, load_config, save
from model.families import FAMILIES
from model.families.wrapped import DEFAULTS, TEXT, text_config
from model.formats.convert import convert
from model.formats.fp8 import scaled

from .conftest import GOLDENS
from .test_families import config_of, forward

WRAPPED = GOLDENS / "wrapped"
WHOLES = {"gemma3": "vision_tower (32 tensors)", "llama4": "vision_model (25 tensors)"}
WHOLES |= {"mistral3": "vision_tower (11 tensors)"}


def difference(folder):
    """By how much our logits differ from the golden ones, in parts of the largest."""
    golden = np.load(folder / "logits.npz")
    cfg, params = load(folder, dtype="float32")
    out = forward(cfg, params, golden["tokens"].astype(np.int32)).logits
    return float(np.abs(np.asarray(out) - golden["logits"]).max() / np.abs(golden["logits"]).max())


def rewrite(folder, change, destination):
    """A copy of a folder with other tensors."""
    shutil.copytree(folder, destination)
    tensors = safetensors.numpy.load_file(destination / "model.safetensors")
    safetensors.numpy.save_file(change(tensors), destination / "model.safetensors")
    return destination


def edit(folder, **changes):
    (folder / "config.json").write_text(json.dumps(config_of(folder) | changes))
    return folder


@pytest.mark.parametrize("name", WHOLES)
def test_the_text_of_a_model_of_text_and_images_is_read(name, caplog):
    assert difference(WRAPPED / name) < 1e-5
    assert "only the text model is read; left out: multi_modal_projector" in caplog.text
    assert WHOLES[name] in caplog.text
    cfg = load_config(WRAPPED / name)
    assert cfg.family == TEXT[name] and cfg == load(WRAPPED / name)[0]


@pytest.mark.parametrize("name", WHOLES)
def test_the_text_is_read_under_the_names_inside_transformers_too(name, tmp_path):
    def rename(tensors):
        new = {}
        for key, values in tensors.items():
            key = key.replace("language_model.model.", "language_model.").replace(
                "language_model.lm_head", "lm_head"
            )
            new[key if key.startswith("lm_head") else f"model.{key}"] = values
        return new

    folder = rewrite(WRAPPED / name, rename, tmp_path / "model")
    assert difference(folder) < 1e-5


def test_the_text_is_saved_as_a_model_of_its_own(tmp_path):
    cfg, params = load(WRAPPED / "gemma3")
    save(tmp_path / "text", cfg, params, format="huggingface")
    assert config_of(tmp_path / "text")["model_type"] == "gemma3_text"
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "text")[1], params)


@pytest.mark.parametrize("text", DEFAULTS)
def test_what_a_text_config_leaves_out_has_the_default_of_transformers(text):
    """As in the published gemma-3-4b, which says neither vocabulary nor heads."""
    checkpoint = {"mistral": "mistral", "gemma3_text": "gemma3_text", "llama4_text": "llama4_text"}[text]
    theirs = json.loads((GOLDENS / "defaults.json").read_text())[checkpoint]
    assert {key: theirs[key] for key in DEFAULTS[text]} == DEFAULTS[text]
    assert FAMILIES[text].read_config(DEFAULTS[text]) == FAMILIES[text].read_config(theirs)


def test_what_is_wrong_with_a_wrapped_config_is_said(tmp_path):
    folder = shutil.copytree(WRAPPED / "mistral3", tmp_path / "model")
    with pytest.raises(ValueError, match="model_type='mistral3' needs a text_config; given None"):
        load(edit(folder, text_config=None))
    with pytest.raises(ValueError, match="text_config.model_type='qwen3' is not supported in mistral3"):
        load(edit(folder, text_config={"model_type": "qwen3"}))


PUBLISHED = json.loads((GOLDENS / "published.json").read_text())


@pytest.mark.parametrize("saved", PUBLISHED, ids=lambda saved: saved["model_type"])
def test_configs_with_the_keys_of_published_folders_are_read(saved):
    """What is strict with foreign keys must not refuse those that the folders of a family really have."""
    of_text = text_config(saved) if saved["model_type"] in TEXT else saved
    cfg = FAMILIES[of_text["model_type"]].read_config(of_text)
    assert cfg.vocab_size == of_text["vocab_size"]


@pytest.mark.parametrize("model_type", ["deepseek_v3", "kimi_k2"])
def test_weights_in_eight_bits_give_the_logits_of_transformers(model_type, tmp_path):
    folder = shutil.copytree(WRAPPED / "deepseek_v3_fp8", tmp_path / "model")
    edit(folder, model_type=model_type, auto_map={"AutoConfig": "own.Config"})
    assert difference(folder) < 1e-5
    cfg, params = load(folder)
    assert cfg.param_dtype == "bfloat16"
    save(tmp_path / "again", cfg, params, format="huggingface")
    assert "quantization_config" not in config_of(tmp_path / "again")
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "again")[1], params)


def test_eight_bits_are_scaled_block_by_block():
    """Against the definition, number by number; the last blocks are cut."""
    rng = np.random.default_rng(0)
    values = rng.integers(0, 126, (7, 10), dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
    scales = rng.uniform(0.1, 3, (3, 4)).astype(np.float32)
    wanted = np.array(
        [[float(values[i, j]) * float(scales[i // 3, j // 3]) for j in range(10)] for i in range(7)]
    )
    found = scaled(values, scales, (3, 3))
    assert found.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(found, wanted.astype(np.float32).astype(ml_dtypes.bfloat16))


FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 8]}
Q = "model.layers.1.self_attn.kv_b_proj.weight"


@pytest.mark.parametrize(
    "change, quantization, message",
    [
        (lambda t: t.pop(Q + "_scale_inv"), FP8, f"{Q}' is float8_e4m3fn; wanted one of F32"),
        (lambda t: t.pop(Q), FP8, f"{Q}_scale_inv' .* scales nothing; wanted a float8_e4m3fn matrix"),
        (lambda t: None, FP8 | {"weight_block_size": [8, 8]}, "a scale for each block of"),
        (
            lambda t: None,
            FP8 | {"weight_block_size": None},
            "fmt='e4m3' and weight_block_size=None is not supported",
        ),
        (lambda t: None, FP8 | {"fmt": "e5m2"}, "fmt='e5m2' and .* is not supported"),
        (lambda t: None, None, "is float8_e4m3fn; wanted one of|does not have: .*weight_scale_inv"),
        (lambda t: None, {"quant_method": "awq"}, "quant_method='awq' is not supported; fp8 can be read"),
    ],
)
def test_eight_bits_that_do_not_fit_together_are_refused(change, quantization, message, tmp_path):
    file = shutil.copytree(WRAPPED / "deepseek_v3_fp8", tmp_path / "model") / "model.safetensors"
    from safetensors import safe_open

    with safe_open(file, "np") as opened:
        names = list(opened.keys())
    tensors = {name: stored for name, stored in read_raw(file).items() if name in names}
    change(tensors)
    write_raw(file, tensors)
    edit(tmp_path / "model", quantization_config=quantization)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "model")


def read_raw(file):
    """name -> (dtype's name, shape, bytes)."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    data = content[8 + length :]
    return {name: (of["dtype"], of["shape"], data[slice(*of["data_offsets"])]) for name, of in header.items()}


def write_raw(file, tensors):
    header, data = {}, b""
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize(
    "name, start", [("gpt2", "transformer."), ("bloom", "transformer."), ("qwen2", "model.")]
)
def test_names_of_a_model_without_its_head_lack_their_beginning(name, start, tmp_path):
    """As the published GPT-2, BLOOM and Qwen3-Embedding have them."""
    cut = lambda tensors: {key.removeprefix(start): values for key, values in tensors.items()}
    folder = rewrite(GOLDENS / name, cut, tmp_path / "model")
    jax.tree.map(np.testing.assert_array_equal, load(folder)[1], load(GOLDENS / name)[1])


@pytest.mark.parametrize("dtype", ["bool", "uint8"])
def test_masks_of_old_checkpoints_are_passed_over(dtype, tmp_path):
    masks = {f"transformer.h.{i}.attn.bias": np.tril(np.ones((1, 1, 9, 9), dtype)) for i in range(4)}
    folder = rewrite(GOLDENS / "gpt2", lambda tensors: tensors | masks, tmp_path / "model")
    jax.tree.map(np.testing.assert_array_equal, load(folder)[1], load(GOLDENS / "gpt2")[1])


def test_an_index_may_name_a_tied_head_that_no_shard_has(tmp_path):
    cfg, params = load(GOLDENS / "llama_tied")
    from model.formats import huggingface

    huggingface.save(tmp_path / "model", cfg, params, {}, max_shard_bytes=40_000)
    file = tmp_path / "model" / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    shard = next(iter(index["weight_map"].values()))
    file.write_text(json.dumps({"weight_map": index["weight_map"] | {"lm_head.weight": shard}}))
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "model")[1], params)
    edit(tmp_path / "model", tie_word_embeddings=False)
    with pytest.raises(ValueError, match="lacks 1 tensors that config.json requires: lm_head.weight"):
        load(tmp_path / "model")


@pytest.mark.parametrize(
    "files",
    [
        ("vocab.json", "merges.txt"),
        ("spiece.model",),
        ("vocab.txt", "special_tokens_map.json"),
        ("sentencepiece.bpe.model", "tokenizer_config.json", "chat_template.jinja"),
        ("tokenizer.json", "chat_templates/tool_use.jinja"),
    ],
)
def test_converting_keeps_every_file_of_the_tokenizer(files, tmp_path):
    source = shutil.copytree(GOLDENS / "llama_tied", tmp_path / "source")
    for name in files:
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(f"content of {name}".encode())
    convert(source, tmp_path / "copy", dtype="bfloat16")
    for name in files:
        assert (tmp_path / "copy" / name).read_bytes() == (source / name).read_bytes()
    assert json.loads((tmp_path / "copy" / "generation_config.json").read_text())["eos_token_id"] == 2
