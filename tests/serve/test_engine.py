"""The engine gives each request the tokens it would get alone, whatever else happens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import MESH_AXES, apply, init, logical_axes
from model.generate import generate
from model.sharding import ShardingRules, named_sharding
from serve import CompilationAfterWarmup, Request, SamplingParams
from tests.meshes import assert_divided

PARAMS = [
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 1},
    {"temperature": 0.7, "top_k": 5, "seed": 2**63 + 5},
    {"temperature": 1.3, "top_p": 0.8, "seed": 3},
    {"temperature": 1.0, "min_p": 0.2, "seed": 4},
    {"temperature": 0.9, "top_k": 50, "top_p": 0.9, "min_p": 0.01, "seed": 5},
]


def prompts(count, seed=0, longest=40):
    rng = np.random.default_rng(seed)
    return [rng.integers(4, 320, rng.integers(1, longest)).tolist() for _ in range(count)]


def requests(count=9, max_tokens=20, seed=0, **options):
    options = {"ignore_eos": True, "max_tokens": max_tokens, **options}
    kinds = [PARAMS[i % len(PARAMS)] for i in range(count)]
    return [
        Request(p, SamplingParams(**(kind | options)))
        for p, kind in zip(prompts(count, seed), kinds, strict=True)
    ]


@pytest.fixture(scope="module")
def full_logits(cfg, params):
    """Logits of one whole sequence by one plain forward pass, [T, V]."""
    forward = jax.jit(lambda params, tokens: apply(cfg, params, tokens).logits)

    def logits(tokens, params=params):
        padded = np.zeros((1, cfg.max_length), np.int32)
        padded[0, : len(tokens)] = tokens
        return np.asarray(forward(params, padded))[0, : len(tokens)]

    return logits


@pytest.fixture(scope="module")
def alone(make_engine):
    """Tokens and log-probabilities of each request served with nothing beside it."""
    engine, known = make_engine(), {}

    def serve(request):
        key = (tuple(request.prompt), request.sampling)
        if key not in known:
            [known[key]] = engine.generate([request])
        return known[key]

    return serve


def test_greedy_tokens_equal_plain_generation_and_the_argmax_of_the_full_forward_pass(
    engine, cfg, params, full_logits, tokenizer
):
    given = prompts(7)
    outputs = engine.generate(
        [Request(p, SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)) for p in given]
    )
    # Plain generation knows no tokenizer: rows of the head that belong to no token are silenced for it.
    silenced = params | {"head": params["head"].at[tokenizer.vocab_size :].set(0)}
    assert [out.tokens for out in outputs] == generate(cfg, silenced, given, 20)
    for prompt, out in zip(given, outputs, strict=True):
        logits = full_logits([*prompt, *out.tokens])[len(prompt) - 1 : -1, : tokenizer.vocab_size]
        assert out.tokens == logits.argmax(-1).tolist()
        assert out.finish_reason == "length" and out.prompt_tokens == len(prompt)


def test_a_batch_of_one_equals_a_batch_of_many_token_for_token(engine, alone):
    batch = requests(13)
    outputs = engine.generate(batch)
    assert [out.tokens for out in outputs] == [alone(request).tokens for request in batch]
    assert len({tuple(out.tokens) for out in outputs}) == len(batch)


def test_too_few_pages_preempt_the_youngest_and_change_no_token(engine, alone):
    batch = [
        Request(p, SamplingParams(max_tokens=30, seed=i, ignore_eos=True))
        for i, p in enumerate(prompts(6, 7, 32))
    ]
    before = engine.stats.preemptions
    outputs = engine.generate(batch)
    assert engine.stats.preemptions > before
    assert [out.tokens for out in outputs] == [alone(request).tokens for request in batch]


def test_a_preemption_every_third_step_changes_no_token(engine, alone):
    batch = requests(8, seed=3)
    ids, done, steps = [engine.submit(request) for request in batch], {}, 0
    while len(done) < len(ids):
        done |= {out.id: out for out in engine.step() if out.finished}
        steps += 1
        if steps % 3 == 0 and engine._scheduler.active:
            engine._scheduler.preempt(engine._scheduler.active[-1])
    assert [done[id].tokens for id in ids] == [alone(request).tokens for request in batch]


def test_logprobs_equal_those_of_the_full_forward_pass(engine, full_logits):
    batch = requests(7, logprobs=3)
    for request, out in zip(batch, engine.generate(batch), strict=True):
        logits = full_logits([*request.prompt, *out.tokens])[len(request.prompt) - 1 : -1]
        at_temperature = jax.nn.log_softmax(logits / (request.sampling.temperature or 1.0))
        plain = np.asarray(jax.nn.log_softmax(logits))
        place = np.arange(len(out.tokens))
        np.testing.assert_allclose(out.logprobs, at_temperature[place, out.tokens], atol=1e-5)
        np.testing.assert_allclose(out.model_logprobs, plain[place, out.tokens], atol=1e-5)
        for alternatives, row in zip(out.top_logprobs, plain, strict=True):
            assert [token for token, _ in alternatives] == np.argsort(-row)[:3].tolist()
            np.testing.assert_allclose(
                [value for _, value in alternatives], np.sort(row)[::-1][:3], atol=1e-5
            )


def test_new_parts_of_the_outputs_add_up_to_all(engine):
    tokens, logprobs, texts, last = {}, {}, {}, {}
    for i, p in enumerate(prompts(6)):
        engine.submit(Request(p, SamplingParams(max_tokens=12, seed=i), id=f"r{i}", detokenize=True))
    while engine.has_work:
        for out in engine.step():
            tokens.setdefault(out.id, []).extend(out.new_tokens)
            logprobs.setdefault(out.id, []).extend(out.new_logprobs)
            texts[out.id] = texts.get(out.id, "") + out.new_text
            last[out.id] = out
    assert len(last) == 6 and all(out.finished for out in last.values())
    for id, out in last.items():
        assert (tokens[id], logprobs[id], texts[id]) == (out.tokens, out.logprobs, out.text)
        assert len(out.tokens) == len(out.logprobs) == len(out.versions) and np.all(
            np.array(out.logprobs) < 0
        )
        assert out.text == engine.tokenizer.decode(out.tokens)


def test_seeds_reproduce_and_other_seeds_differ(make_engine):
    [prompt] = prompts(1)
    seeded = [Request(prompt, SamplingParams(max_tokens=16, seed=s, ignore_eos=True)) for s in (1, 2, 1)]
    first, second, third = (out.tokens for out in make_engine().generate(seeded))
    assert first == third != second
    unseeded = [Request(prompt, SamplingParams(max_tokens=16, ignore_eos=True))] * 2
    runs = [[out.tokens for out in make_engine(seed=s).generate(unseeded)] for s in (0, 0, 1)]
    assert runs[0] == runs[1] and runs[0][0] != runs[0][1] and runs[0][0] != runs[2][0]


def test_stop_tokens_end_an_answer_and_are_kept(engine, tokenizer):
    [prompt] = prompts(1)
    greedy = {"temperature": 0, "max_tokens": 20}
    [free] = engine.generate([Request(prompt, SamplingParams(**greedy, ignore_eos=True))])
    stop = next(t for t in free.tokens[3:] if free.tokens.index(t) >= 3)
    [out] = engine.generate(
        [Request(prompt, SamplingParams(**greedy, ignore_eos=True, stop_token_ids=(stop,)))]
    )
    assert out.tokens == free.tokens[: free.tokens.index(stop) + 1]
    assert (out.finish_reason, out.stop_reason) == ("stop", stop)


def test_the_tokenizers_stop_ids_end_an_answer_unless_ignored(engine, params, tokenizer):
    # A head that answers with the end of the text from everything: its row is the sum of what norms give.
    loud = jax.tree.map(lambda x: x, params)
    eos = tokenizer.eos_ids[0]
    hidden = apply(engine.cfg, params, jnp.array([[9]])).hidden[0, 0]
    loud["head"] = params["head"].at[eos].set(hidden * 10)
    engine.update_params(loud, 1)
    try:
        prompt = [9]
        stop, ignore = engine.generate(
            [
                Request(prompt, SamplingParams(temperature=0, max_tokens=3, ignore_eos=i))
                for i in (False, True)
            ]
        )
    finally:
        engine.update_params(params, 0)
    assert (stop.tokens, stop.finish_reason, stop.stop_reason) == ([eos], "stop", eos)
    assert len(ignore.tokens) == 3 and ignore.finish_reason == "length"


@pytest.mark.parametrize("start,length", [(0, 1), (3, 2), (7, 3), (9, 4)])
def test_a_stop_string_ends_the_text_before_it_and_the_tokens_with_it(engine, tokenizer, start, length):
    prompt = tokenizer.encode("What is")
    params = {"temperature": 1.0, "seed": 11, "max_tokens": 40, "ignore_eos": True}
    [free] = engine.generate([Request(prompt, SamplingParams(**params), detokenize=True)])
    # Half a character is replaced only once the next token shows that it stays half, so such are left out.
    pieces = [free.text[i : i + length] for i in range(start, len(free.text) - length)]
    stop = next(piece for piece in pieces if "\ufffd" not in piece)
    [out] = engine.generate([Request(prompt, SamplingParams(**params, stop=["never this", stop]))])
    assert out.text == free.text[: free.text.index(stop)] and stop not in out.text
    assert (out.finish_reason, out.stop_reason) == ("stop", stop)
    assert out.tokens == free.tokens[: len(out.tokens)]
    assert stop in tokenizer.decode(out.tokens) and stop not in tokenizer.decode(out.tokens[:-1])


def test_a_cancelled_request_ends_at_once_and_frees_its_pages(engine):
    long = SamplingParams(max_tokens=24, seed=1, ignore_eos=True)
    ids = [engine.submit(Request(p, long)) for p in prompts(6, longest=20)]
    engine.step()
    held = engine.stats.pages - engine.stats.pages_free
    assert held and engine.stats.waiting
    assert engine.cancel(ids[0]) and engine.cancel(ids[5]) and not engine.cancel(ids[0])
    assert not engine.cancel("unknown")
    reasons = {}
    while engine.has_work:
        reasons |= {out.id: out.finish_reason for out in engine.step() if out.finished}
    assert reasons == {id: "cancelled" if id in (ids[0], ids[5]) else "length" for id in ids}


def test_new_parameters_continue_running_requests_and_each_token_knows_its_version(
    engine, cfg, params, full_logits, tokenizer
):
    given = prompts(4, seed=5, longest=12)
    greedy = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    ids, last = [engine.submit(Request(p, greedy)) for p in given], {}
    for _ in range(2):
        last |= {out.id: out for out in engine.step()}
    other = init(cfg, jax.random.key(1))
    engine.update_params(other, 7)
    try:
        while engine.has_work:
            last |= {out.id: out for out in engine.step()}
    finally:
        engine.update_params(params, 0)
    for prompt, id in zip(given, ids, strict=True):
        tokens, versions = last[id].tokens, np.array(last[id].versions)
        assert 0 < np.sum(versions == 0) < np.sum(versions == 7) and np.all(np.diff(versions) >= 0)
        for version, weights in ((0, params), (7, other)):
            logits = full_logits([*prompt, *tokens], weights)[len(prompt) - 1 : -1, : tokenizer.vocab_size]
            best = jax.nn.log_softmax(logits)
            place = np.flatnonzero(versions == version)
            assert np.array(tokens)[place].tolist() == best.argmax(-1)[place].tolist()


def test_parameters_of_another_shape_dtype_or_tree_are_refused(engine, params):
    with pytest.raises(ValueError, match=r"\['head'\].*bfloat16.*float32"):
        engine.update_params(params | {"head": params["head"].astype(jnp.bfloat16)}, 1)
    with pytest.raises(ValueError, match="another tree"):
        engine.update_params({"head": params["head"]}, 1)


def test_nothing_compiles_after_warmup_whatever_is_asked_for(engine):
    compilations = []

    def listen(event, duration, **kwargs):
        if "compile" in event:
            compilations.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        assert (jax.jit(lambda x: x + 1.5)(1.0), bool(compilations)) == (2.5, True)  # the listener hears
        compilations.clear()
        engine.generate(
            requests(9) + requests(5, seed=1, logprobs=20) + requests(5, max_tokens=3, stop="xyz")
        )
        engine.generate(requests(1))
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert compilations == []


def test_a_shape_unknown_after_warmup_raises(make_engine):
    engine = make_engine()
    engine._runner._sealed = True
    engine.submit(Request([5]))
    with pytest.raises(CompilationAfterWarmup, match="prefill with 1 rows"):
        engine.step()


def test_tokens_beyond_the_tokenizer_are_never_sampled(engine, params, tokenizer):
    padded = params | {"head": params["head"].at[tokenizer.vocab_size :].set(100.0)}
    engine.update_params(padded, 1)
    try:
        outputs = engine.generate(requests(6, logprobs=1))
    finally:
        engine.update_params(params, 0)
    assert all(token < tokenizer.vocab_size for out in outputs for token in out.tokens)


def test_logits_that_are_not_finite_end_their_own_request_alone(make_engine, params, alone):
    broken = params | {"embedding": params["embedding"].at[99].set(np.nan)}
    engine = make_engine(broken)
    batch = [Request([p if p != 99 else 98 for p in r.prompt], r.sampling) for r in requests(10)]
    batch[2] = Request([5] * 20 + [99] + [6] * 10)
    batch[5] = Request([99])
    outputs = engine.generate(batch)
    for i, (request, out) in enumerate(zip(batch, outputs, strict=True)):
        if i in (2, 5):
            assert out.finish_reason == "error" and "not finite" in out.error and out.tokens == []
        else:
            expected = alone(request).tokens
            if 99 in expected[:-1]:  # it sampled the broken token itself: what came before is good
                assert out.finish_reason == "error"
                expected = expected[: expected.index(99) + 1]
            assert out.tokens == expected


def test_the_engine_runs_where_its_parameters_are(make_engine, alone, params, cfg):
    batch = requests(5)
    expected = [alone(request).tokens for request in batch]
    fewest = {"row_buckets": (), "context_buckets": ()}
    third = make_engine(jax.device_put(params, jax.devices()[3]), **fewest)
    assert [out.tokens for out in third.generate(batch)] == expected
    assert jax.tree.leaves(third._runner.pages)[0].devices() == {jax.devices()[3]}
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]).reshape(1, 2, 1, 1, 1, 2), MESH_AXES)
    shardings = jax.tree.map(
        lambda axes: named_sharding(mesh, ShardingRules(), axes),
        logical_axes(cfg),
        is_leaf=lambda x: isinstance(x, tuple),
    )
    sharded = make_engine(jax.device_put(params, shardings), **fewest)
    assert [out.tokens for out in sharded.generate(batch)] == expected
    assert "tensor" in str(jax.tree.leaves(sharded._runner.pages)[0].sharding.spec)
    programs = [e._runner._steps.lower("prefill", 4, 32, 4).compile() for e in (third, sharded)]
    assert_divided(*programs, 0.6, 0.9)


def test_generate_reports_progress_and_refuses_to_lose_others_outputs(engine):
    seen = []
    engine.generate(requests(6, max_tokens=4), progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (6, 6) and [d for d, _ in seen] == sorted({d for d, _ in seen})
    engine.submit(Request([4], SamplingParams(max_tokens=1)))
    with pytest.raises(RuntimeError, match="idle"):
        engine.generate(requests(1))
    assert [out.finish_reason for out in engine.step()] in (["length"], ["stop"])


def test_after_an_abort_the_engine_serves_again(engine, alone):
    for request in requests(6):
        engine.submit(request)
    engine.step()
    outputs = engine.abort("the device failed")
    assert {out.finish_reason for out in outputs} == {"error"} and len(outputs) == 6
    assert {out.error for out in outputs} == {"the device failed"} and not engine.has_work
    [request] = requests(1)
    assert engine.generate([request])[0].tokens == alone(request).tokens
