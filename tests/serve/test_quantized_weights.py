"""The engine over quantized weights says what it says over the arrays that they stand for."""

import jax
import pytest

from model import dequantize, quantize
from model.kernels import native
from model.packed import Packed
from model.quantization import packed_for_decoding
from model.weights import is_quantized
from serve import Request, SamplingParams


@pytest.mark.parametrize("kind", ["int8", pytest.param("nf4", marks=pytest.mark.slow)])
def test_tokens_are_those_of_the_widened_weights(cfg, params, make_engine, kind):
    quantized = quantize(cfg, params, kind, 16)
    assert is_quantized(quantized["head"]) and is_quantized(quantized["block_1"]["mixer"]["o"])
    sampling = SamplingParams(max_tokens=8, ignore_eos=True, temperature=0.0)
    requests = lambda: [Request([3 + i, 5, 8], sampling) for i in range(3)]
    found, wanted = (
        make_engine(params=tree).generate(requests()) for tree in (quantized, dequantize(quantized))
    )
    assert [out.tokens for out in found] == [out.tokens for out in wanted]
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)


def test_new_quantized_weights_take_the_place_of_old_ones(cfg, params, make_engine):
    old, new = (quantize(cfg, jax.tree.map(lambda x, s=s: x * s, params), "int8", 16) for s in (1.0, 1.1))
    engine = make_engine(params=old)
    request = lambda: Request([3, 5, 8], SamplingParams(max_tokens=8, ignore_eos=True, temperature=0.0))
    engine.generate([request()])
    engine.update_params(new, version=1)
    assert engine.generate([request()])[0].tokens == make_engine(params=new).generate([request()])[0].tokens
    with pytest.raises(ValueError):
        engine.update_params(params, version=2)


@pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))
def test_bfloat16_weights_stay_so_and_are_computed_in_float32(cfg, params, make_engine):
    assert cfg.dtype == "float32"
    halves = jax.tree.map(lambda x: x.astype("bfloat16"), params)
    packed = packed_for_decoding(cfg, halves)[1]
    assert isinstance(packed["embedding"], Packed) and isinstance(packed["block_1"]["mixer"]["o"], Packed)
    sampling = SamplingParams(max_tokens=8, ignore_eos=True, temperature=0.0)
    requests = lambda: [Request([3 + i, 5, 8], sampling) for i in range(3)]
    wide = jax.tree.map(lambda x: x.astype("float32"), halves)
    found, wanted = (make_engine(params=tree).generate(requests()) for tree in (halves, wide))
    assert [out.tokens for out in found] == [out.tokens for out in wanted]
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)
