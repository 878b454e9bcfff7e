"""Hugging Face folders: what configs may say, strict files, shards, atomic saves."""

import dataclasses
import json
import shutil
import struct
import tracemalloc

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict
from hypothesis import given, settings
from hypothesis import strategies as st

from model import (
    Attention,
    Block,
    Llama3Scaling,
    RMSNorm,
    Rope,
    ScalarHead,
    SwiGLU,
    load,
    load_config,
    param_shapes,
    save,
)
from model.blocks.residual import Residual
from model.formats import huggingface
from model.formats.convert import convert
from model.formats.safetensors_file import SafetensorsError, read_header
from model.layout import relayout

from .conftest import GOLDENS, random_params, tiny

CONFIG = json.loads((GOLDENS / "llama_tied" / "config.json").read_text())


def read_config(folder, remove=(), **changes):
    saved = {key: value for key, value in (CONFIG | changes).items() if key not in remove}
    (folder / "config.json").write_text(json.dumps(saved))
    return load_config(folder)


def test_a_config_means_what_transformers_means_by_it(tmp_path):
    cfg = read_config(tmp_path)
    mixer = Attention(6, 2, 6, Rope(10_000.0))
    assert cfg.blocks == (Block(mixer, SwiGLU(52), RMSNorm(1e-5)),) * 4
    assert (cfg.vocab_size, cfg.width, cfg.max_length, cfg.tied_head) == (83, 36, 1024, True)
    absent = (
        "tie_word_embeddings",
        "rms_norm_eps",
        "num_key_value_heads",
        "head_dim",
        "rope_parameters",
        "dtype",
    )
    cfg = read_config(tmp_path, remove=absent)
    assert cfg.blocks[0] == Block(Attention(6, 6, 6, Rope(10_000.0)), SwiGLU(52), RMSNorm(1e-6))
    assert (cfg.tied_head, cfg.dtype) == (False, "float32")


def test_rotary_settings_are_read_in_the_old_place_and_in_the_new(tmp_path):
    scaling = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    wanted = Rope(500_000.0, Llama3Scaling(8.0, 1.0, 4.0, 8192))
    new = {"rope_parameters": scaling | {"rope_type": "llama3", "rope_theta": 500_000.0}}
    assert read_config(tmp_path, **new).blocks[0].mixer.rope == wanted
    for kind in ("rope_type", "type"):
        old = {"rope_theta": 500_000.0, "rope_scaling": scaling | {kind: "llama3"}}
        assert read_config(tmp_path, remove=["rope_parameters"], **old).blocks[0].mixer.rope == wanted
    plain = read_config(tmp_path, remove=["rope_parameters"], rope_theta=250, rope_scaling=None)
    assert plain.blocks[0].mixer.rope == Rope(250.0)


UNSUPPORTED = [
    (
        {"model_type": "gpt_bigcode"},
        "model_type='gpt_bigcode' is not known. Known: llama, qwen2, qwen3, mistral",
    ),
    ({"hidden_act": "prelu"}, "hidden_act='prelu' is not supported; 'silu' and"),
    ({"pretraining_tp": 2}, "pretraining_tp='2' is not supported"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    (
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}},
        "rope_type='dynamic' is not supported",
    ),
    ({"rope_scaling": {"type": "ntk", "factor": 2}, "rope_parameters": None}, "rope_type='ntk'"),
    ({"rope_scaling": {"type": "linear"}, "rope_parameters": None}, "factor is missing"),
    ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rope_parameters.factor is missing"),
    ({"rope_theta": 500.0}, "disagrees with rope_parameters.rope_theta"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "for each kind of layer"),
    ({"partial_rotary_factor": 1.5}, "partial_rotary_factor=1.5 is more than the whole head"),
    ({"hidden_size": None}, "hidden_size is missing"),
    ({"hidden_size": "36"}, "hidden_size='36' is not an integer"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000 is not an integer from 1 to 4096"),
    ({"num_attention_heads": -6}, "num_attention_heads=-6"),
    ({"num_key_value_heads": 4}, "num_heads=6 is not a multiple of num_kv_heads=4"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan"),
    ({"dtype": "float8_e4m3fn"}, "dtype='float8_e4m3fn' is not one of"),
    ({"model_type": "mistral", "sliding_window": 0}, "sliding_window=0 is not an integer from 1"),
    ({"model_type": "qwen3", "layer_types": ["sliding_attention"] * 4}, "no sliding_window is set"),
    ({"model_type": "qwen3", "layer_types": ["full_attention"] * 3}, "one entry for each of 4 layers"),
    (
        {"model_type": "qwen3", "layer_types": ["chunked_attention"] * 4},
        "layer_types has {'chunked_attention'}",
    ),
    ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": "2"}, "max_window_layers='2'"),
]


@pytest.mark.parametrize(
    "changes, message", UNSUPPORTED, ids=[str(changes)[:60] for changes, _ in UNSUPPORTED]
)
def test_what_would_change_the_numbers_is_an_error(changes, message, tmp_path):
    with pytest.raises(ValueError) as caught:
        read_config(tmp_path, **changes)
    assert message in str(caught.value)
    assert str(tmp_path / "config.json") in str(caught.value)


MIXED = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
USED = {"model_type": "qwen2", "use_sliding_window": True}


@pytest.mark.parametrize(
    "changes, windows",
    [
        ({"model_type": "mistral", "sliding_window": 256}, [256] * 4),
        ({"model_type": "mistral", "sliding_window": None}, [None] * 4),
        ({"model_type": "mistral"}, [None] * 4),  # 4096 by default, longer than any text that the model takes
        (USED | {"sliding_window": 99, "max_window_layers": 1}, [None, 99, 99, 99]),
        (USED | {"sliding_window": 99}, [None] * 4),  # from layer 28 on, by default
        (USED | {"sliding_window": 99, "layer_types": MIXED}, [None, 99, None, 99]),
        ({"model_type": "qwen3", "use_sliding_window": False, "sliding_window": 99}, [None] * 4),
    ],
)
def test_windows_are_read_layer_by_layer(changes, windows, tmp_path):
    assert [block.mixer.window for block in read_config(tmp_path, **changes).blocks] == windows


def test_code_that_a_config_names_is_not_run(tmp_path, caplog):
    (tmp_path / "evil.py").write_text("raise SystemExit('run')")
    read_config(tmp_path, auto_map={"AutoModelForCausalLM": "evil.Model"})
    assert "which is not run" in caplog.text


def copy_of(name, tmp_path):
    return shutil.copytree(GOLDENS / name, tmp_path / name)


def test_pickles_are_refused_with_the_mend(tmp_path):
    folder = copy_of("llama_tied", tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pickled weights \(pytorch_model.bin\).*save_pretrained"):
        load(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match="neither model.safetensors nor model.safetensors.index.json"):
        load(folder)


def rewrite(folder, change):
    file = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    change(tensors)
    safetensors.numpy.save_file(tensors, file)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda t: t.pop("model.norm.weight"),
            "lacks 1 tensors that config.json requires: model.norm.weight",
        ),
        (
            lambda t: t.update({"model.visual.weight": np.zeros(3, "f4")}),
            "does not have: model.visual.weight",
        ),
        (lambda t: t.update({"model.norm.weight": np.zeros(37, "f4")}), r"'model.norm.weight' is \(37,\)"),
        (
            lambda t: t.update({"lm_head.weight": np.zeros((83, 36), "f4")}),
            "tie_word_embeddings is true, yet",
        ),
        (
            lambda t: t.update({"model.norm.weight": np.zeros(36, "f8")}),
            "'model.norm.weight' is F64; only F32",
        ),
        (
            lambda t: t.update({"model.norm.weight": np.zeros(36, "i8")}),
            "'model.norm.weight' is int64; wanted one of",
        ),
    ],
    ids=["missing", "unknown", "misshapen", "untied", "float64", "integers"],
)
def test_tensors_that_disagree_with_the_config_are_errors(change, message, tmp_path):
    folder = copy_of("llama_tied", tmp_path)
    rewrite(folder, change)
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_tensors_that_only_repeat_others_are_passed_over(tmp_path):
    folder = copy_of("llama_tied", tmp_path)

    def add(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(3, "f4")

    rewrite(folder, add)
    jax.tree.map(np.testing.assert_array_equal, load(folder)[1], load(GOLDENS / "llama_tied")[1])


def test_an_index_that_lies_is_an_error(tmp_path):
    folder = copy_of("llama_untied_sharded", tmp_path)
    index = json.loads((folder / "model.safetensors.index.json").read_text())

    def with_map(change):
        weight_map = dict(index["weight_map"])
        change(weight_map)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        load(folder)

    first, other = "model-00001-of-00005.safetensors", "model-00002-of-00005.safetensors"
    for change, message in [
        (lambda m: m.update({"lm_head.weight": "../../etc/passwd"}), "wanted a .safetensors file beside it"),
        (lambda m: m.update({"lm_head.weight": "lost.safetensors"}), "lost.safetensors, which is not there"),
        (lambda m: m.update({"ghost": first}), "names 1 tensors that no shard has: ghost"),
        (
            lambda m: m.update({"lm_head.weight": other if m["lm_head.weight"] == first else first}),
            "which the index",
        ),
        (lambda m: m.clear(), "has no weight_map"),
    ]:
        with pytest.raises(ValueError, match=message):
            with_map(change)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_parameters_keep_their_dtype_and_can_be_cast(dtype, tmp_path):
    cfg = tiny(param_dtype=dtype, dtype=dtype, tied_head=False)
    params = random_params(cfg)
    save(tmp_path / "model", cfg, params, format="huggingface")
    loaded_cfg, loaded = load(tmp_path / "model")
    assert loaded_cfg == cfg
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(loaded)} == {dtype}
    cast_cfg, cast = load(tmp_path / "model", dtype="bfloat16")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(cast)} == {cast_cfg.dtype} == {"bfloat16"}


def test_a_folder_in_shards_is_the_folder_in_one(tmp_path, small):
    cfg, params = small
    huggingface.save(tmp_path / "one", cfg, params, {})
    huggingface.save(tmp_path / "many", cfg, params, {}, max_shard_bytes=9000)
    shards = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 5 and not (tmp_path / "many" / "model.safetensors").exists()
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    tensors = {}
    for shard in shards:
        held = safetensors.numpy.load_file(shard)
        assert sum(array.nbytes for array in held.values()) <= 9000 or len(held) == 1
        assert {index["weight_map"][name] for name in held} == {shard.name}
        tensors |= held
    whole = safetensors.numpy.load_file(tmp_path / "one" / "model.safetensors")
    assert tensors.keys() == whole.keys() == index["weight_map"].keys()
    assert all(np.array_equal(tensors[name], whole[name]) for name in whole)
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in whole.values())
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "many")[1], params)


def test_a_scanned_model_saves_and_loads_in_either_layout(tmp_path, small):
    scanned_cfg, scanned = relayout(*small, scan=True)
    save(tmp_path / "model", scanned_cfg, scanned, format="huggingface")
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "model")[1], small[1])
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "model", cfg=scanned_cfg)[1], scanned)


def test_the_first_family_that_can_hold_a_model_is_taken(tmp_path):
    base = tiny()
    mixer, ffn, norm = base.blocks[0].mixer, base.blocks[0].ffn, base.final_norm

    def family(width=24, **parts):
        block = Block(Attention(4, 2, 6, Rope(100.0), **parts), ffn, norm)
        cfg = base.replace(blocks=(block,) * 2, width=width)
        save(tmp_path / "model", cfg, random_params(cfg), format="huggingface")
        assert load_config(tmp_path / "model") == cfg
        return json.loads((tmp_path / "model" / "config.json").read_text())["model_type"]

    assert mixer.qk_norm is None
    assert family() == "llama"
    assert family(qkv_bias=True, out_bias=True) == "llama"
    assert family(qkv_bias=True) == "qwen2"
    assert family(qk_norm=norm) == "qwen3"
    assert family(width=26) == "mistral"  # transformers' Llama wants a multiple of the heads


def test_a_model_that_no_family_holds_is_refused(tmp_path, small):
    cfg, params = small
    with pytest.raises(ValueError, match='cannot hold the heads value.*Save with format="native"'):
        save(tmp_path / "model", cfg.replace(heads=(ScalarHead("value"),)), params, format="huggingface")
    halved = cfg.replace(blocks=(cfg.blocks[0], dataclasses.replace(cfg.blocks[0], residual=Residual(0.5))))
    message = r"llama would have blocks\[1\].residual.scale=1.0 where this model has 0.5"
    with pytest.raises(ValueError, match=message):
        save(tmp_path / "model", halved, params, format="huggingface")
    assert not list(tmp_path.iterdir())


def test_a_save_replaces_a_model_but_nothing_else(tmp_path, small, monkeypatch):
    save(tmp_path / "model", *small, format="huggingface", tokenizer={"tokenizer.json": b"{}"})
    old = (tmp_path / "model" / "model.safetensors").read_bytes()

    def fail(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="disk full"):
        patched.setattr(huggingface.safetensors_file, "write", fail)
        save(tmp_path / "model", *small, format="huggingface")
    assert [item.name for item in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == old
    save(tmp_path / "model", *small, format="huggingface")
    assert not (tmp_path / "model" / "tokenizer.json").exists()
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("keep me")
    with pytest.raises(ValueError, match="has no config.json; it is not replaced"):
        save(tmp_path / "letters", *small, format="huggingface")


def test_stop_tokens_of_the_tokenizer_are_in_the_config(tmp_path, small):
    generation = json.dumps({"bos_token_id": 1, "eos_token_id": [2, 5], "temperature": 0.7}).encode()
    save(tmp_path / "model", *small, format="huggingface", tokenizer={"generation_config.json": generation})
    saved = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (saved["bos_token_id"], saved["eos_token_id"], saved["pad_token_id"]) == (1, [2, 5], None)


# The container.


def file_of(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


GOOD = {"a": entry(), "b": entry("BF16", (2, 1), (8, 12))}
BROKEN = [
    (b"", "has 0 bytes"),
    (file_of({}, length=2**63), "the header claims 9223372036854775808 bytes"),
    (file_of(b"[1]"), "the header is a list"),
    (file_of(b"{"), "is not JSON"),
    (file_of(b"\xff"), "is not JSON"),
    (file_of(b'{"a":1' + b"0" * 5000 + b"}"), "is not JSON"),
    (file_of(b"[" * 100_000), "is not JSON"),
    (
        file_of(
            b'{"a":' + json.dumps(entry()).encode() + b',"a":' + json.dumps(entry()).encode() + b"}", bytes(8)
        ),
        "twice",
    ),
    (file_of({"a": 5}), "has the entry 5"),
    (file_of({"a": entry("I32")}, bytes(8)), "is I32; only F32, F16, BF16"),
    (file_of({"a": entry(shape=(-2,))}, bytes(8)), r"the shape \[-2\]"),
    (file_of({"a": entry(shape=(True, 2))}, bytes(8)), "the shape"),
    (file_of({"a": entry(shape=(2**62, 4))}, bytes(8)), "has 73786976294838206464 bytes, but lies at"),
    (file_of({"a": entry(offsets=(0, 12))}, bytes(12)), "has 8 bytes, but lies at"),
    (file_of({"a": entry(offsets=(0, 8))}, bytes(7)), "of the 7 bytes of data"),
    (file_of({"a": entry(offsets=(8, 0))}, bytes(8)), "has 8 bytes, but lies at"),
    (
        file_of({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)),
        "'b' at byte .* overlaps the tensor before it",
    ),
    (
        file_of({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20)),
        "'b' at byte .* leaves a gap before it",
    ),
    (file_of({"a": entry()}, bytes(9)), "the tensors end at byte"),
]


@pytest.mark.parametrize("content, message", BROKEN, ids=[message[:40] for _, message in BROKEN])
def test_a_broken_file_is_an_error_that_names_the_lie(content, message, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(SafetensorsError, match=message):
        read_header(path)


def test_numbers_that_the_file_does_not_align_are_read(tmp_path):
    header = json.dumps({"a": entry("BF16", (1,), (0, 2)), "b": entry("F32", (2,), (2, 10))}).encode()
    values = np.array([1.5, -2.0], "<f4")
    path = tmp_path / "odd.safetensors"
    path.write_bytes(
        struct.pack("<Q", len(header)) + header + np.array(3, ml_dtypes.bfloat16).tobytes() + values.tobytes()
    )
    tensors = read_header(path)
    np.testing.assert_array_equal(tensors["b"].read(), values)
    assert float(tensors["a"].read()[0]) == 3.0


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_damaged_file_gives_an_error_or_arrays_that_lie_within_it(data, tmp_path_factory):
    content = bytearray(file_of(GOOD, bytes(range(12))))
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))]
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        arrays = [tensor.read() for tensor in read_header(path).values()]
        assert sum(array.nbytes for array in arrays) <= len(content)
    except SafetensorsError as error:
        assert str(path) in str(error)
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 1_000_000


def test_a_choice_bias_and_other_float32_tensors_keep_their_bits_in_a_bfloat16_model(tmp_path):
    """DeepSeek-V3's folder has both dtypes. Near 12 the steps of bfloat16 are 1/16: enough to change the experts."""
    bias_path, norm_path = ("block_1", "ffn", "choice_bias"), ("final_norm", "scale")
    cfg, params = load(GOLDENS / "deepseek_v3")
    flat = {path: np.asarray(x).astype(ml_dtypes.bfloat16) for path, x in flatten_dict(params).items()}
    for path in flat:
        if path[-1] == "choice_bias" or path == norm_path:
            flat[path] = (12 + np.linspace(0.001, 0.1, flat[path].size)).astype(np.float32)
    cfg = cfg.replace(dtype="bfloat16", param_dtype="bfloat16")
    save(tmp_path / "hf", cfg, unflatten_dict(flat), format="huggingface")
    as_stored = load(tmp_path / "hf")
    save(tmp_path / "native", *as_stored)
    convert(tmp_path / "hf", tmp_path / "converted", dtype="bfloat16")
    convert(tmp_path / "native", tmp_path / "native_again", "native")

    def same_bits(found, path):
        assert found[path].dtype == np.float32
        np.testing.assert_array_equal(np.asarray(found[path]), flat[path])

    for name in ("hf", "native", "converted", "native_again"):
        for dtype in (None, "bfloat16"):
            found = flatten_dict(load(tmp_path / name, dtype=dtype)[1])
            same_bits(found, bias_path)
            if dtype is None and name != "converted":
                same_bits(found, norm_path)
            assert {x.dtype.name for path, x in found.items() if x.ndim > 2} == {"bfloat16"}
            assert dtype is None or found[norm_path].dtype == ml_dtypes.bfloat16
    assert param_shapes(cfg)["block_1"]["ffn"]["choice_bias"].dtype == np.float32
