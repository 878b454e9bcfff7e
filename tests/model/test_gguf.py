"""GGUF models: blocks against scalar loops from the format's definition, saving and loading, and lies."""

import dataclasses
import struct

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import load_tokenizer, train_tokenizer
from model import (
    Attention,
    Block,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    ModelConfig,
    RMSNorm,
    Rope,
    ScalarHead,
    SwiGLU,
    load,
    save,
)
from model.formats.dequantize import DECODERS, dequantize
from model.formats.gguf import container
from model.formats.gguf.container_writer import write
from model.formats.gguf.reading import halves_to_pairs, pairs_to_halves

from .conftest import random_params, tiny


def half(data, at):
    return struct.unpack_from("<e", data, at)[0]


def signed(byte):
    return byte - 256 if byte > 127 else byte


def scalar_q8_0(b):
    return [half(b, 0) * signed(b[2 + i]) for i in range(32)]


def scalar_q4_0(b):
    return [half(b, 0) * ((b[2 + i % 16] >> (4 * (i // 16)) & 15) - 8) for i in range(32)]


def scalar_q4_1(b):
    return [half(b, 0) * (b[4 + i % 16] >> (4 * (i // 16)) & 15) + half(b, 2) for i in range(32)]


def scalar_q4_k(b):
    """ggml's `dequantize_row_q4_K` and `get_scale_min_k4`, element by element."""
    scales = b[4:16]
    values = []
    for i in range(256):
        group = i // 32
        if group < 4:
            scale, minimum = scales[group] & 63, scales[group + 4] & 63
        else:
            scale = scales[group + 4] & 15 | scales[group - 4] >> 6 << 4
            minimum = scales[group + 4] >> 4 | scales[group] >> 6 << 4
        byte = b[16 + 32 * (group // 2) + i % 32]
        quant = byte & 15 if group % 2 == 0 else byte >> 4
        values.append(half(b, 0) * scale * quant - half(b, 2) * minimum)
    return values


def scalar_q6_k(b):
    """ggml's `dequantize_row_q6_K`, element by element."""
    values = []
    for i in range(256):
        part, row, column = i // 128, i % 128 // 32, i % 32
        low = b[64 * part + 32 * (row % 2) + column]
        nibble = low & 15 if row < 2 else low >> 4
        pair = b[128 + 32 * part + column] >> (2 * row) & 3
        scale = signed(b[192 + 8 * part + 2 * row + column // 16])
        values.append(half(b, 208) * scale * ((nibble | pair << 4) - 32))
    return values


def scalar_f32(b):
    return [struct.unpack("<f", b)[0]]


def scalar_f16(b):
    return [half(b, 0)]


def scalar_bf16(b):
    return [struct.unpack("<f", b"\0\0" + b)[0]]


SCALAR = {
    "Q8_0": (scalar_q8_0, [0]),
    "Q4_0": (scalar_q4_0, [0]),
    "Q4_1": (scalar_q4_1, [0, 2]),
    "Q4_K": (scalar_q4_k, [0, 2]),
    "Q6_K": (scalar_q6_k, [208]),
    "F32": (scalar_f32, []),
    "F16": (scalar_f16, []),
    "BF16": (scalar_bf16, []),
}
SIZES = {name: (elements, nbytes) for name, elements, nbytes in container.BLOCKS.values()}


@pytest.mark.parametrize("kind", sorted(DECODERS))
def test_blocks_decode_as_the_formats_definition_says(kind):
    reference, halves = SCALAR[kind]
    elements, nbytes = SIZES[kind]
    rng = np.random.default_rng(3)
    raw = rng.integers(0, 256, (6, nbytes), dtype=np.uint8)
    for place in halves:
        raw[:, place : place + 2] = rng.normal(size=(6, 1)).astype("<f2").view(np.uint8)
    if kind in ("F32", "F16", "BF16"):
        raw[:, -1] &= 0xBF  # a small exponent: neither infinite nor NaN
    wanted = np.array([reference(bytes(block)) for block in raw], np.float32).reshape(2, 3 * elements)
    got = dequantize(raw.reshape(-1), kind, wanted.shape)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, wanted, rtol=2e-6, atol=2e-6)


def test_bytes_that_do_not_make_up_the_shape_are_refused():
    with pytest.raises(ValueError, match=r"17 bytes of Q4_0 are no tensor of shape \(1, 32\), which has 18"):
        dequantize(np.zeros(17, np.uint8), "Q4_0", (1, 32))
    with pytest.raises(ValueError, match="Q2_K is not read; only F32"):
        dequantize(np.zeros(84, np.uint8), "Q2_K", (1, 256))


def test_rotary_pairs_and_halves_are_each_others_inverse():
    rows = np.arange(2 * 6 * 3).reshape(12, 3)
    pairs = halves_to_pairs(rows, 2)
    assert pairs[:6, 0].tolist() == [0, 9, 3, 12, 6, 15]  # (c, c + 3) become neighbours
    np.testing.assert_array_equal(pairs_to_halves(pairs, 2), rows)


def model_of(dtype="float32", **changes):
    """A model of every kind of part that GGUF has, and its parameters."""
    norm = RMSNorm(1e-6)
    parts = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "rope": Rope(500.0)} | changes
    ffn = SwiGLU(40, bias=parts.pop("ffn_bias", False))
    tied = parts.pop("tied_head", True)
    block = Block(Attention(**parts), ffn, norm)
    cfg = ModelConfig(
        61, 24, (block,) * 3, norm, tied_head=tied, max_length=512, dtype=dtype, param_dtype=dtype
    )
    return cfg, random_params(cfg, 1)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tied_head": False, "qkv_bias": True, "out_bias": True, "ffn_bias": True},
        {"rope": Rope(100.0, Llama3Scaling(8.0, 1.0, 4.0, 256))},
        {"qkv_bias": True},
        {"qk_norm": RMSNorm(1e-6), "tied_head": False},
    ],
    ids=["llama", "llama with biases", "llama3 scaling", "qwen2", "qwen3"],
)
def test_a_saved_model_loads_as_it_was(changes, tmp_path):
    cfg, params = model_of(**changes)
    save(tmp_path / "model.gguf", cfg, params, format="gguf")
    loaded_cfg, loaded = load(tmp_path / "model.gguf")
    assert loaded_cfg == cfg
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_matrices_keep_their_dtype_in_the_file(dtype, tmp_path):
    cfg, params = model_of(dtype)
    save(tmp_path / "model.gguf", cfg, params, format="gguf")
    types = {tensor.type for tensor in container.read(tmp_path / "model.gguf").tensors.values()}
    assert types == {{"bfloat16": "BF16", "float16": "F16"}[dtype], "F32"}
    loaded_cfg, loaded = load(tmp_path / "model.gguf", dtype=dtype)
    assert loaded_cfg == cfg
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


SCALINGS = [
    LinearScaling(2.5),
    Llama3Scaling(8.0, 1.0, 4.0, 128),
    Llama3Scaling(3.0, 1.5, 3.5, 100),  # others than Llama's own: read as what they do to each frequency
    Llama3Scaling(8.0, 1.0, 4.0, 1000),
    LongRopeScaling((1.0, 2.0, 3.0), (1.0, 2.0, 3.0), 64),
]


@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
def test_a_scaling_that_is_written_is_read_back(scaling, tmp_path):
    rope = Rope(100.0, scaling)
    base = tiny()
    mixer = dataclasses.replace(base.blocks[0].mixer, rope=rope)
    cfg = base.replace(blocks=(dataclasses.replace(base.blocks[0], mixer=mixer),) * 3)
    save(tmp_path / "model.gguf", cfg, random_params(cfg), format="gguf")
    again = load(tmp_path / "model.gguf")[0].blocks[0].mixer.rope
    for long in (False, True):
        np.testing.assert_allclose(again.frequencies(6, long), rope.frequencies(6, long), rtol=1e-6)
    save(tmp_path / "again.gguf", *load(tmp_path / "model.gguf"), format="gguf")
    assert load(tmp_path / "again.gguf")[0].blocks[0].mixer.rope == again


def test_a_scaling_of_magnitudes_or_two_lengths_has_no_place(tmp_path):
    base = tiny()
    for scaling in (
        LongRopeScaling((1.0,) * 3, (2.0,) * 3, 64),
        LongRopeScaling((2.0,) * 3, (2.0,) * 3, 64, 1.2),
    ):
        mixer = dataclasses.replace(base.blocks[0].mixer, rope=Rope(100.0, scaling))
        cfg = base.replace(blocks=(dataclasses.replace(base.blocks[0], mixer=mixer),) * 3)
        with pytest.raises(ValueError, match="rope.scaling=None where this model has LongRopeScaling"):
            save(tmp_path / "model.gguf", cfg, random_params(cfg), format="gguf")


def test_a_scanned_model_saves_the_same_file(tmp_path, small):
    from model.layout import relayout

    cfg, params = small
    save(tmp_path / "unrolled.gguf", cfg, params, format="gguf")
    save(tmp_path / "scanned.gguf", *relayout(cfg, params, scan=True), format="gguf")
    assert (tmp_path / "unrolled.gguf").read_bytes() == (tmp_path / "scanned.gguf").read_bytes()


def test_a_model_that_gguf_cannot_say_is_refused(tmp_path):
    cfg, params = model_of()
    odd = cfg.replace(blocks=(*cfg.blocks[:2], Block(cfg.blocks[0].mixer, SwiGLU(44), RMSNorm(1e-6))))
    for wrong, reason in [
        (cfg.replace(heads=(ScalarHead("value"),)), "would have heads="),
        (odd, "would have blocks\\[2\\].ffn.width=40 where this model has 44"),
        (cfg.replace(final_norm=RMSNorm(1e-5)), "would have blocks\\[0\\].norm.eps"),
    ]:
        with pytest.raises(ValueError, match=reason):
            save(tmp_path / "model.gguf", wrong, params, format="gguf")
    assert not list(tmp_path.iterdir())


def trained_tokenizer(kind, digits=1):
    texts = ["the cat sat on the mat, 1234 times; grün и кот"] * 20
    return train_tokenizer(kind, texts, 288, digits=digits)


def files_of(tokenizer, folder):
    tokenizer.save(folder)
    return {item.name: item.read_bytes() for item in folder.iterdir()}


@pytest.mark.parametrize("kind, digits", [("bpe", 3), ("bpe", 1), ("sentencepiece_bpe", 1)])
def test_the_tokenizer_in_a_saved_file_gives_the_same_ids(kind, digits, tmp_path):
    tokenizer = trained_tokenizer(kind, digits)
    cfg = tiny().replace(vocab_size=384)
    files = files_of(tokenizer, tmp_path / "tokenizer")
    save(tmp_path / "model.gguf", cfg, random_params(cfg), format="gguf", tokenizer=files)
    inside = load_tokenizer(tmp_path / "model.gguf")
    for text in ["the cat", " 12345  sat\n\n", "grün <|end|> и", "unseen: ☃ 日本"]:
        assert inside.encode(text) == tokenizer.encode(text)
        assert inside.decode(inside.encode(text)) == text
    assert inside.eos_ids == tokenizer.eos_ids
    assert inside.chat_template == tokenizer.chat_template
    assert load(tmp_path / "model.gguf")[0].vocab_size == 384


def test_a_tokenizer_that_gguf_has_no_name_for_is_refused(tmp_path):
    files = files_of(trained_tokenizer("bpe", digits=2), tmp_path / "tokenizer")
    cfg = tiny().replace(vocab_size=384)
    with pytest.raises(ValueError, match="GGUF has no name for this tokenizer's pre-tokenizer"):
        save(tmp_path / "model.gguf", cfg, random_params(cfg), format="gguf", tokenizer=files)


def saved_parts(tmp_path, small):
    """The metadata and tensors of a good file, to lie with."""
    save(tmp_path / "good.gguf", *small, format="gguf")
    file = container.read(tmp_path / "good.gguf")
    tensors = {
        name: file.raw(name).view("<f4").reshape(tensor.shape) for name, tensor in file.tensors.items()
    }
    return dict(file.metadata), tensors


def write_parts(path, metadata, tensors):
    write(
        path, metadata, {name: ("F32", array.shape) for name, array in tensors.items()}, tensors.__getitem__
    )
    return path


LIES = [
    ({"general.architecture": "mamba"}, "general.architecture is 'mamba'; known are llama, qwen2, qwen3"),
    ({"llama.block_count": None}, "llama.block_count is missing"),
    ({"llama.block_count": 2**31 - 1}, "llama.block_count is 2147483647, but the file has 29 tensors"),
    ({"llama.block_count": 0}, "llama.block_count is 0; wanted a positive int"),
    ({"llama.block_count": 4}, "lacks 9 tensors that its metadata requires: blk.3"),
    ({"llama.block_count": 2}, "has 9 tensors that its model does not have: blk.2"),
    ({"llama.embedding_length": 12}, r"'token_embd.weight' is \(61, 24\); wanted \(vocabulary, 12\)"),
    ({"llama.feed_forward_length": 44}, r"'blk.0.ffn_down.weight' is \(24, 40\), but by the metadata"),
    ({"llama.feed_forward_length": 40.0}, "llama.feed_forward_length is 40.0; wanted a positive int"),
    ({"llama.attention.head_count": 3}, "num_heads=3 is not a multiple of num_kv_heads=2"),
    ({"llama.attention.key_length": 5}, "attention.value_length is 6; wanted 5"),
    ({"llama.attention.layer_norm_rms_epsilon": "small"}, "wanted a positive number"),
    ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "is nan; wanted a positive number"),
    ({"llama.attention.sliding_window": 64}, "sliding_window is 64; windows are not supported"),
    ({"llama.rope.scaling.type": "yarn"}, "rope.scaling.type is 'yarn'"),
    ({"llama.rope.scaling.factor": "2"}, "rope.scaling.factor is '2'"),
    ({"llama.rope.scaling.factor": -2.0}, "rope.scaling.factor is -2.0; wanted a positive number"),
    (
        {"llama.rope.scale_linear": np.array([2.0, 3.0], "f4")},
        "rope.scale_linear is .*; wanted a positive number",
    ),
    ({"llama.rope.scaling.attn_factor": 0.7}, "rope.scaling.attn_factor is 0.69.*; only a model without it"),
    (
        {"llama.rope.dimension_sections": np.array([1, 1, 1, 0], "i4")},
        "rope.dimension_sections is .*; only a model without it",
    ),
    ({"llama.attention.causal": False}, "attention.causal is False; only a model without it is read"),
    ({"llama.logit_scale": 0.3}, "logit_scale is 0.3.*; only a model without it"),
    ({"llama.residual_scale": 0.3}, "residual_scale is 0.3.*; only a model without it"),
    ({"llama.final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0; only a model without it"),
    ({"llama.rope.dimension_count": 4}, "rope.dimension_count is 4; wanted 6"),
    ({"llama.expert_count": 8}, "expert_count is 8; wanted 0"),
    ({"llama.vocab_size": 62}, "vocab_size is 62; wanted 61"),
    ({"tokenizer.ggml.tokens": ["a"] * 62}, "has 62 tokens for 61 embedding rows"),
]


@pytest.mark.parametrize(
    "lie, message", LIES, ids=[next(iter(lie)) + f" {i}" for i, (lie, _) in enumerate(LIES)]
)
def test_metadata_that_lies_is_an_error_that_says_what_does_not_hold(lie, message, tmp_path, small):
    metadata, tensors = saved_parts(tmp_path, small)
    metadata = {key: value for key, value in (metadata | lie).items() if value is not None}
    path = write_parts(tmp_path / "lie.gguf", metadata, tensors)
    with pytest.raises(container.GGUFError, match=message):
        load(path)


def test_tensors_that_are_missing_strange_or_of_another_type_are_errors(tmp_path, small):
    metadata, tensors = saved_parts(tmp_path, small)
    without = {name: array for name, array in tensors.items() if name != "blk.1.ffn_up.weight"}
    with pytest.raises(container.GGUFError, match="lacks 1 tensors .* blk.1.ffn_up.weight"):
        load(write_parts(tmp_path / "a.gguf", metadata, without))
    strange = tensors | {"blk.0.ssm.weight": np.zeros((3, 3), np.float32)}
    with pytest.raises(container.GGUFError, match="does not have: blk.0.ssm.weight"):
        load(write_parts(tmp_path / "b.gguf", metadata, strange))
    scaled = tensors | {"rope_freqs.weight": np.array([1, 3, np.nan], np.float32)}
    with pytest.raises(container.GGUFError, match="wanted positive numbers"):
        load(write_parts(tmp_path / "c.gguf", metadata, scaled))
    content = (tmp_path / "good.gguf").read_bytes()
    key = b"blk.0.attn_q.weight" + struct.pack("<IQQ", 2, 24, 24)
    at = content.index(key) + len(key)
    (tmp_path / "d.gguf").write_bytes(content[:at] + struct.pack("<I", 13) + content[at + 4 :])  # Q5_K
    with pytest.raises(container.GGUFError, match="'blk.0.attn_q.weight' is Q5_K; only F32"):
        load(tmp_path / "d.gguf")


@pytest.fixture(scope="module")
def good_file(tmp_path_factory):
    cfg = tiny()
    path = tmp_path_factory.mktemp("gguf") / "good.gguf"
    save(path, cfg, random_params(cfg), format="gguf")
    return path


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_flipped_byte_in_the_header_never_crashes_the_loader(data, good_file):
    content = bytearray(good_file.read_bytes())
    header = min(tensor.offset for tensor in container.read(good_file).tensors.values())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    path = good_file.with_name("flipped.gguf")
    path.write_bytes(content)
    try:
        cfg, params = load(path)
    except ValueError as error:
        assert str(path) in str(error)
    else:
        assert params["embedding"].shape == (cfg.vocab_size, cfg.width)
