"""Quantized tensors of a GGUF file as weights that keep its values: what they stand for is what the file decodes to."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import model
from model.formats import dequantize
from model.formats.dequantize import UNPACKERS, block_sizes
from model.formats.gguf import container, reading
from model.kernels import native
from model.packed import Packed
from model.quantization import packed_for_decoding
from model.weights import Quantized, is_quantized
from serve import Engine, Request, SamplingParams

CFG = model.decoder(
    vocab_size=64,
    width=256,
    layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    ffn_width=256,
    tied_head=True,
)


def file_of(tmp_path, kind: str, cfg=CFG):
    """A file like that of a saved model, with random blocks of `kind` for its matrices."""
    path = tmp_path / "model.gguf"
    model.save(path, cfg, model.init(cfg, jax.random.key(0)), "gguf")
    saved, rng, raw, tensors = container.read(path), np.random.default_rng(1), {}, {}
    elements, nbytes = block_sizes(kind)
    halves = {"Q8_0": [0], "Q4_0": [0], "Q4_1": [0, 2], "Q4_K": [0, 2], "Q6_K": [208]}[kind]
    for name, tensor in saved.tensors.items():
        tensors[name], raw[name] = tensor, saved.raw(name)
        if len(tensor.shape) == 2:
            blocks = rng.integers(
                0, 256, (tensor.shape[0] * tensor.shape[1] // elements, nbytes), dtype=np.uint8
            )
            for place in halves:
                scales = rng.normal(size=(len(blocks), 1)).astype("<f2") / 500
                blocks[:, place : place + 2] = scales.view(np.uint8)
            tensors[name] = dataclasses.replace(tensor, type=kind)
            raw[name] = blocks.reshape(-1)
    return SimpleNamespace(path=path, metadata=saved.metadata, tensors=tensors, raw=raw.__getitem__)


@pytest.mark.parametrize("kind", UNPACKERS)
def test_packed_weights_stand_for_what_the_file_decodes_to(kind, tmp_path, monkeypatch):
    file = file_of(tmp_path, kind)
    monkeypatch.setattr(reading.container, "read", lambda path: file)
    path = file.path
    cfg, wanted = model.load(path)
    _, packed = model.load(path, packed=True)
    matrices = [leaf for leaf in jax.tree.leaves(packed, is_leaf=is_quantized) if is_quantized(leaf)]
    assert len(matrices) == 1 + 2 * 7 and all(isinstance(leaf, Quantized) for leaf in matrices)
    assert matrices[0].block == (16 if kind == "Q6_K" else 32)
    for (where, ours), theirs in zip(
        jax.tree.leaves_with_path(model.dequantize(packed)), jax.tree.leaves(wanted), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs, err_msg=jax.tree_util.keystr(where))
    if native.missing() is None:
        _, decoding = packed_for_decoding(cfg, packed)
        assert isinstance(decoding["embedding"], Packed) and isinstance(
            decoding["block_1"]["mixer"]["o"], Packed
        )
    outputs = [
        Engine(cfg, params, None, max_rows=2, max_length=32, page_size=4).generate(
            [Request([3 + i, 5, 8], SamplingParams(max_tokens=6, temperature=0.0)) for i in range(2)]
        )
        for params in (packed, wanted)
    ]
    for ours, theirs in zip(*outputs, strict=True):
        assert ours.tokens == theirs.tokens
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=2e-4)


def test_a_block_over_two_heads_is_widened_instead(tmp_path, monkeypatch):
    heads = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 48}
    narrow = model.decoder(vocab_size=64, width=96, layers=1, **heads, ffn_width=256, tied_head=True)
    file = file_of(tmp_path, "Q8_0", narrow)
    monkeypatch.setattr(reading.container, "read", lambda path: file)
    _, packed = model.load(file.path, packed=True)
    o, q = packed["block_0"]["mixer"]["o"], packed["block_0"]["mixer"]["q"]
    assert isinstance(q, Quantized) and not is_quantized(o)
    wanted = dequantize.dequantize(file.raw("blk.0.attn_output.weight"), "Q8_0", (96, 96)).T
    np.testing.assert_array_equal(jnp.reshape(o, (96, 96)), wanted)
