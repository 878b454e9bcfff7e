"""Each row of a batch has the adapter that its request names, of its own rank, beside others and none."""

import jax
import numpy as np
import pytest

from model.adapters import add_adapters, merge_adapter
from model.blocks.lora import LoRA
from model.formats.peft import save_adapter
from serve import Engine, Request, RequestError, SamplingParams

SIZES = {"max_rows": 4, "page_size": 4, "prefill_chunk": 16, "decode_steps": 5}
SIZES |= {"row_buckets": (4,), "chunk_buckets": (16,), "context_buckets": (64,)}
RANKS = {"low": (2, 8.0), "high": (5, 3.0)}
GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True, logprobs=0)
PROMPTS = np.random.default_rng(5).integers(4, 320, (6, 11)).tolist()


@pytest.fixture(scope="module")
def folders(cfg, params, tmp_path_factory):
    """(PEFT folder, the model with this adapter merged) by name, of different ranks, scales and maps."""
    found = {}
    for seed, (name, (rank, alpha)) in enumerate(RANKS.items()):
        targets = ("q", "o", "down") if seed else ("*",)
        adapted_cfg, adapted = add_adapters(cfg, params, LoRA(rank, alpha, targets), jax.random.key(seed))
        noise = lambda path, x, s=seed: (
            x + 0.3 * np.random.default_rng(s).normal(size=x.shape).astype(x.dtype)
            if str(path[-1].key).endswith("_lora_b")
            else x
        )
        adapted = jax.tree_util.tree_map_with_path(noise, adapted)
        folder = tmp_path_factory.mktemp(name)
        save_adapter(folder, adapted_cfg, adapted)
        found[name] = folder, merge_adapter(adapted_cfg, adapted)[1]
    return found


@pytest.fixture(scope="module")
def merged(cfg, params, tokenizer, folders):
    """What the model with one adapter merged into its weights says."""
    engines = {None: Engine(cfg, params, tokenizer, **SIZES)}
    engines |= {name: Engine(cfg, tree, tokenizer, **SIZES) for name, (_, tree) in folders.items()}
    return lambda name, prompt: engines[name].generate([Request(prompt, GREEDY)])[0]


@pytest.fixture
def adapting(cfg, params, tokenizer):
    return Engine(cfg, params, tokenizer, **SIZES, adapter_slots=2, adapter_rank=6)


def check(engine, merged, names):
    outputs = engine.generate(
        [Request(p, GREEDY, adapter=name) for p, name in zip(PROMPTS, names, strict=True)]
    )
    for out, name, prompt in zip(outputs, names, PROMPTS, strict=True):
        wanted = merged(name, prompt)
        assert out.tokens == wanted.tokens
        np.testing.assert_allclose(out.logprobs, wanted.logprobs, atol=1e-4)
    return outputs


def test_a_batch_of_several_adapters_says_what_each_merged_model_says(adapting, merged, folders):
    for name, (folder, _) in folders.items():
        adapting.load_adapter(name, folder)
    assert adapting.adapters == ["low", "high"]
    told = check(adapting, merged, ["low", "high", None, "high", "low", None])
    assert len({tuple(out.tokens) for out in told}) == 6


def test_adapters_are_loaded_and_dropped_while_others_run_and_share_no_cached_prefix(
    adapting, merged, folders, params
):
    adapting.load_adapter("low", folders["low"][0])
    check(adapting, merged, ["low", None, "low", None, "low", None])
    adapting.submit(Request(PROMPTS[0], GREEDY, id="running", adapter="low"))
    adapting.step()
    adapting.load_adapter("other", folders["high"][0])
    with pytest.raises(ValueError, match="in use by 1 requests, 'running'"):
        adapting.drop_adapter("low")
    with pytest.raises(ValueError, match="all 2 slots have adapters"):
        adapting.load_adapter("third", folders["high"][0])
    outputs = []
    while adapting.has_work:
        outputs += adapting.step()
    assert outputs[-1].tokens == merged("low", PROMPTS[0]).tokens
    adapting.drop_adapter("low")
    with pytest.raises(RequestError, match="no adapter named 'low'; it has: other"):
        adapting.submit(Request(PROMPTS[0], GREEDY, adapter="low"))
    adapting.load_adapter("low", folders["high"][0])  # another one under the old name
    out = adapting.generate([Request(PROMPTS[0], GREEDY, adapter="low")])[0]
    assert out.cached_tokens == 0 and out.tokens == merged("high", PROMPTS[0]).tokens
    adapting.update_params(params, 1)
    out = adapting.generate([Request(PROMPTS[0], GREEDY, adapter="low")])[0]
    assert out.tokens == merged("high", PROMPTS[0]).tokens and out.versions == [1] * 10


def test_an_adapter_that_does_not_fit_is_refused_with_the_way_out(cfg, params, tokenizer, folders):
    engine = Engine(
        cfg, params, tokenizer, **SIZES, adapter_slots=1, adapter_rank=3, adapter_targets=("q", "o")
    )
    with pytest.raises(ValueError, match="adapter_rank=5"):
        engine.load_adapter("high", folders["high"][0])
    with pytest.raises(ValueError, match="adapter_targets=.* leaves out"):
        engine.load_adapter("low", folders["low"][0])
    assert engine.adapters == []
    with pytest.raises(ValueError, match="adapter_slots=1 or more"):
        Engine(cfg, params, tokenizer, **SIZES).load_adapter("low", folders["low"][0])


def test_a_model_with_an_adapter_of_its_own_is_served_with_it(cfg, params, tokenizer, merged):
    adapted_cfg, adapted = add_adapters(cfg, params, LoRA(3, 6.0), jax.random.key(3))
    noise = lambda path, x: x + 0.2 if str(path[-1].key).endswith("_lora_b") else x
    adapted = jax.tree_util.tree_map_with_path(noise, adapted)
    told = Engine(adapted_cfg, adapted, tokenizer, **SIZES).generate([Request(PROMPTS[0], GREEDY)])[0]
    plain = Engine(*merge_adapter(adapted_cfg, adapted), tokenizer, **SIZES).generate(
        [Request(PROMPTS[0], GREEDY)]
    )[0]
    assert told.tokens == plain.tokens != merged(None, PROMPTS[0]).tokens
    with pytest.raises(ValueError, match="adapters of its own"):
        Engine(adapted_cfg, adapted, tokenizer, **SIZES, adapter_slots=1)
