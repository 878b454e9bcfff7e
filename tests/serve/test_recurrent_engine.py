"""The engine serves models whose blocks keep a state of one size: hybrids, latent attention, recurrences alone, patches
of bytes."""

import jax
import numpy as np
import pytest

from model import Block, RMSNorm, init
from model.blocks.deltanet import GatedDeltaNet
from model.blocks.latent_attention import LatentAttention
from model.blocks.mamba2 import Mamba2
from model.blocks.ngrams import NGrams
from model.blocks.patch_attention import PatchAttention, PatchPool
from model.blocks.patches import StaticPatcher
from model.blocks.residual import Residual
from model.generate import generate
from model.inputs.byte_latent import ByteLatent
from serve import Engine, Request, SamplingParams

MIXERS = {
    "recurrent": (Mamba2(4, 6, 5), GatedDeltaNet(4, 2, 5, 6)),
    "hybrid": (Mamba2(4, 6, 5), LatentAttention(4, 6, 4, 5, kv_rank=12)),
}


@pytest.mark.parametrize("kind", ["hybrid", pytest.param("recurrent", marks=pytest.mark.slow)])
def test_a_busy_engine_with_preemptions_equals_plain_generation(kind, cfg, tokenizer):
    blocks = [cfg.blocks[0].__class__(mixer, cfg.blocks[0].ffn, RMSNorm()) for mixer in MIXERS[kind]]
    check_against_generation(cfg.replace(blocks=tuple(blocks)), tokenizer)


@pytest.mark.slow
def test_patches_of_bytes_may_be_cut_anywhere(cfg, tokenizer):
    block = cfg.blocks[0]
    reads = Block(PatchAttention(4, 2, 8), None, residual=Residual(skip_scale=2.0))
    of_bytes = ByteLatent(
        24,
        (block,),
        (reads, block),
        PatchPool(2, 2, 12),
        StaticPatcher(3),
        NGrams((2, 3), 97),
        max_patches=16,
    )
    check_against_generation(cfg.replace(byte_latent=of_bytes), tokenizer)


def check_against_generation(cfg, tokenizer):
    params = init(cfg, jax.random.key(1))
    params["head"] = 3 * params["head"].at[tokenizer.vocab_size :].set(0)
    sizes = {"max_rows": 3, "page_size": 4, "num_pages": 24, "prefill_chunk": 8, "decode_steps": 3}
    buckets = {"row_buckets": (3,), "chunk_buckets": (8,), "context_buckets": (64,)}
    engine = Engine(cfg, params, tokenizer, **sizes, **buckets)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(4, 320, length).tolist() for length in (1, 8, 21, 9, 30, 3)]
    sampling = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    ids, done, steps = [engine.submit(Request(p, sampling)) for p in prompts], {}, 0
    while len(done) < len(ids):
        done |= {out.id: out for out in engine.step() if out.finished}
        steps += 1
        if steps % 4 == 0 and engine._scheduler.active:
            engine._scheduler.preempt(engine._scheduler.active[-1])
    assert engine.stats.preemptions > 0
    assert [done[id].tokens for id in ids] == generate(cfg, params, prompts, 12)
