"""The pure function: a brute-force reading of it, caches, packing, layouts, dtypes, configs and checkpoints."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model import (
    Attention,
    Block,
    Llama3Scaling,
    ModelConfig,
    RMSNorm,
    Rope,
    ScalarHead,
    ShardingRules,
    SwiGLU,
    apply,
    decoder,
    init,
    init_cache,
    load,
    load_config,
    logical_axes,
    param_shapes,
    save,
)
from model.generate import generate
from model.kernels.attention import Mask, self_attention
from model.kernels.attention.reference import attention
from model.layout import relayout
from model.sharding import check_divisible, named_sharding

from .conftest import applied, check_decoding, paged_cache, random_params, random_tokens, tiny
from .conftest import compiled_fast as jit

# Most of the time here is compiling; test_goldens.py holds the fully optimised program to other implementations.
forward = jit(applied, static_argnums=0)


@pytest.fixture(scope="session")
def small():
    """(cfg, params) of two blocks with grouped heads, the second with a sliding window."""
    cfg = tiny(layers=2)
    windowed = dataclasses.replace(cfg.blocks[1], mixer=dataclasses.replace(cfg.blocks[1].mixer, window=4))
    cfg = cfg.replace(blocks=(cfg.blocks[0], windowed))
    return cfg, random_params(cfg)


# A reading of the model in plain float64 loops, straight from the papers.


def brute_norm(x, scale, eps):
    return x / np.sqrt((x * x).mean() + eps) * scale


def brute_rotate(x, position, rope):
    C = len(x)
    out = np.zeros(C)
    for c in range(C // 2):
        angle = position * rope.theta ** (-2 * c / C)
        a, b = x[c], x[c + C // 2]
        out[c], out[c + C // 2] = a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)
    return out


def brute_attention(queries, keys, values, t):
    """One head of the token at `t`; all [T, C]."""
    scores = [queries[t] @ keys[s] / np.sqrt(len(keys[s])) for s in range(t + 1)]
    weights = np.exp(np.array(scores) - max(scores))
    return sum(w * values[s] for s, w in enumerate(weights / weights.sum()))


def brute_block(block, p, x, positions):
    m, C = p["mixer"], block.mixer.head_dim
    h = [brute_norm(row, p["mixer_norm"]["scale"], block.norm.eps) for row in x]
    zero = np.zeros((99, C))

    def heads(name, number, norm=None):
        made = [[row @ m[name][:, i] + m.get(f"{name}_bias", zero)[i] for row in h] for i in range(number)]
        if norm and block.mixer.qk_norm:
            made = [[brute_norm(v, m[norm]["scale"], block.mixer.qk_norm.eps) for v in rows] for rows in made]
        return made

    rotate = lambda rows: [
        brute_rotate(v, position, block.mixer.rope) for v, position in zip(rows, positions)
    ]
    queries = [rotate(rows) for rows in heads("q", block.mixer.num_heads, "q_norm")]
    keys = [rotate(rows) for rows in heads("k", block.mixer.num_kv_heads, "k_norm")]
    values = heads("v", block.mixer.num_kv_heads)
    group = block.mixer.num_heads // block.mixer.num_kv_heads
    y = []
    for t, row in enumerate(x):
        found = [brute_attention(q, keys[i // group], values[i // group], t) for i, q in enumerate(queries)]
        row = row + sum(f @ m["o"][i] for i, f in enumerate(found)) + m.get("o_bias", 0)
        g = brute_norm(row, p["ffn_norm"]["scale"], block.norm.eps)
        gate = g @ p["ffn"]["gate"] + p["ffn"].get("gate_bias", 0)
        up = g @ p["ffn"]["up"] + p["ffn"].get("up_bias", 0)
        y.append(row + (gate / (1 + np.exp(-gate)) * up) @ p["ffn"]["down"] + p["ffn"].get("down_bias", 0))
    return y


def brute_logits(cfg, params, tokens, positions):
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    x = [params["embedding"][token] for token in tokens]
    for i, block in enumerate(cfg.blocks):
        x = brute_block(block, params[f"block_{i}"], x, positions)
    hidden = [brute_norm(row, params["final_norm"]["scale"], cfg.final_norm.eps) for row in x]
    return np.array(hidden) @ params.get("head", params["embedding"]).T, np.array(hidden)


FULL = Block(
    Attention(4, 2, 6, Rope(50.0), qkv_bias=True, out_bias=True, qk_norm=RMSNorm(1e-3)),
    SwiGLU(40, bias=True),
    RMSNorm(1e-2),
)


@pytest.mark.parametrize("full", [False, True], ids=["plain", "every option"])
def test_logits_equal_a_brute_force_reading_of_the_papers(full):
    cfg = tiny(layers=2)
    if full:
        plain = cfg.blocks[0]
        cfg = cfg.replace(
            blocks=(FULL, plain), tied_head=False, heads=(ScalarHead("value"), ScalarHead("reward"))
        )
    params, tokens = random_params(cfg), random_tokens(cfg, (2, 7))
    positions = np.array([np.arange(7), np.arange(100, 107)])
    out = forward(cfg, params, tokens, positions)
    for b in range(2):
        logits, hidden = brute_logits(cfg, params, tokens[b], positions[b])
        np.testing.assert_allclose(out.logits[b], logits, atol=2e-4, rtol=1e-4)
        np.testing.assert_allclose(out.hidden[b], hidden, atol=1e-4, rtol=1e-4)
        for head in cfg.heads:
            wanted = hidden @ np.asarray(params[f"{head.name}_head"]) + np.asarray(
                params[f"{head.name}_head_bias"]
            )
            np.testing.assert_allclose(out.heads[head.name][b], wanted, atol=1e-4)
    assert out.logits.dtype == jnp.float32 and set(out.heads) == {head.name for head in cfg.heads}


def test_llama3_scaling_keeps_high_frequencies_and_divides_low_ones():
    scaling, plain = Llama3Scaling(8.0, 1.0, 4.0, 8192), Rope(500_000.0)
    ratio = plain.frequencies(128) / Rope(500_000.0, scaling).frequencies(128)
    wavelength = 2 * np.pi / plain.frequencies(128)
    np.testing.assert_allclose(ratio[wavelength < 8192 / 4], 1, rtol=1e-6)
    np.testing.assert_allclose(ratio[wavelength > 8192], 8, rtol=1e-6)
    middle = ratio[(wavelength > 8192 / 4) & (wavelength < 8192)]
    assert len(middle) > 0 and np.all((middle > 1) & (middle < 8)) and np.all(np.diff(middle) > 0)


@pytest.mark.parametrize("window", [None, 1, 7, 64, 150])
@pytest.mark.parametrize("T", [1, 63, 64, 65, 200, 1100])
def test_attention_in_query_blocks_equals_the_plain_reference(T, window):
    rng = np.random.default_rng(T)
    q, k, v = (jnp.asarray(rng.normal(size=(2, T, heads, 4)), jnp.float32) for heads in (4, 2, 2))
    segments = jnp.asarray(np.sort(rng.integers(1, 4, (2, T))), jnp.int32)
    causal = np.tril(np.ones((T, T), bool))
    if window is not None:
        causal &= ~np.tril(np.ones((T, T), bool), -window)
    causal, positions = jnp.asarray(causal[None]), jnp.broadcast_to(jnp.arange(T), (2, T))
    blocked, reference = jit(functools.partial(self_attention, mask=Mask(window=window))), jit(attention)
    np.testing.assert_allclose(blocked(q, k, v, positions, None), reference(q, k, v, causal), atol=2e-6)
    mask = causal & (segments[:, :, None] == segments[:, None])
    np.testing.assert_allclose(blocked(q, k, v, positions, segments), reference(q, k, v, mask), atol=2e-6)


def test_gradients_of_attention_in_query_blocks_equal_those_of_the_plain_reference():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 130, heads, 4)), jnp.float32) for heads in (4, 2, 2))
    causal = jnp.tril(jnp.ones((130, 130), bool))[None]
    loss = lambda f, *last: jax.jit(
        jax.grad(lambda q, k, v: jnp.sum(jnp.sin(f(q, k, v, *last))), argnums=(0, 1, 2))
    )
    for ours, wanted in zip(
        loss(self_attention, jnp.arange(130)[None], None)(q, k, v),
        loss(attention, causal)(q, k, v),
        strict=True,
    ):
        np.testing.assert_allclose(ours, wanted, atol=2e-5)


@settings(max_examples=8, deadline=None)
@given(cuts=st.lists(st.integers(1, 23), max_size=4, unique=True), padding=st.integers(0, 5))
def test_packed_row_equals_its_documents_alone(cuts, padding, small):
    cfg, params = small
    tokens = random_tokens(cfg, (1, 24))
    bounds = [0, *sorted(cuts), 24]
    segments, positions = np.zeros((1, 24 + 5), np.int32), np.zeros((1, 24 + 5), np.int32)
    row = np.zeros((1, 24 + 5), np.int32)
    row[:, padding : padding + 24] = tokens
    for number, (start, stop) in enumerate(zip(bounds, bounds[1:]), 1):
        segments[:, padding + start : padding + stop] = number
        positions[:, padding + start : padding + stop] = np.arange(stop - start)
    packed = forward(cfg, params, row, positions, segments).logits[0, padding:]
    for start, stop in zip(bounds, bounds[1:]):
        alone = np.zeros((1, 24), np.int32)
        alone[:, : stop - start] = tokens[:, start:stop]  # what comes after a token can't change it
        np.testing.assert_allclose(
            packed[start:stop], forward(cfg, params, alone).logits[0, : stop - start], atol=2e-5
        )


def test_scanned_equals_unrolled(small):
    cfg, _ = small
    cfg = cfg.replace(blocks=(cfg.blocks[0], cfg.blocks[0], FULL, cfg.blocks[0]))
    params, tokens = random_params(cfg), random_tokens(cfg, (2, 9))
    scanned_cfg, scanned = relayout(cfg, params, scan=True)
    assert jax.tree.map(jnp.shape, scanned) == jax.tree.map(lambda s: s.shape, param_shapes(scanned_cfg))
    unrolled, rolled = forward(cfg, params, tokens), forward(scanned_cfg, scanned, tokens)
    np.testing.assert_allclose(unrolled.logits, rolled.logits, atol=2e-5)
    back_cfg, back = relayout(scanned_cfg, scanned, scan=False)
    assert back_cfg == cfg
    jax.tree.map(np.testing.assert_array_equal, back, params)


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_recomputation_changes_no_gradient(scan, small):
    cfg, params = relayout(*small, scan=scan)
    if not scan:
        cfg = cfg.replace(blocks=cfg.blocks[:1])
        params = {key: value for key, value in params.items() if key != "block_1"}
    tokens = random_tokens(cfg, (1, 9))

    @functools.partial(jit, static_argnums=0)
    def gradient(cfg, params):
        return jax.grad(lambda p: jnp.sum(jnp.sin(apply(cfg, p, tokens).logits)))(params)

    wanted = jax.tree.leaves(gradient(cfg, params))
    for remat in ("products", "offload", "full"):
        for a, b in zip(jax.tree.leaves(gradient(cfg.replace(remat=remat), params)), wanted, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4)


def test_bfloat16_is_close_to_float32_and_gives_float32_logits(small):
    cfg, params = small
    tokens = random_tokens(cfg, (2, 20))
    exact = forward(cfg, params, tokens)
    half = forward(cfg.replace(dtype="bfloat16"), params, tokens)
    assert half.logits.dtype == jnp.float32 and half.hidden.dtype == jnp.bfloat16
    error = float(jnp.sqrt(jnp.mean((exact.logits - half.logits) ** 2) / jnp.mean(exact.logits**2)))
    assert 1e-4 < error < 0.03  # bfloat16 has 8 bits of mantissa


def test_logits_can_be_asked_for_at_some_tokens_only(small):
    cfg, params = small
    tokens = random_tokens(cfg, (2, 9))
    at = np.array([[3, 8], [0, 5]])
    some = forward(cfg, params, tokens, logits_at=at).logits
    np.testing.assert_allclose(
        some, np.take_along_axis(forward(cfg, params, tokens).logits, at[:, :, None], 1), atol=1e-5
    )


# Decoding.


@pytest.mark.parametrize(
    "paged, scan", [(False, False), (True, False), (True, True)], ids=["dense", "paged", "paged and scanned"]
)
def test_cached_decoding_equals_the_full_forward_pass(paged, scan, small):
    cfg, params = relayout(*small, scan=scan)
    tokens = random_tokens(cfg, (2, 19))
    cache = paged_cache(cfg, 2, 5, 4) if paged else init_cache(cfg, 2, 20)
    widths = (7, 1, 1, 7, 1, 1, 1)  # two chunks, and tokens one by one between and after them
    cache = check_decoding(forward, cfg, params, tokens, cache, widths)
    assert cache.length.tolist() == [19, 19]


@pytest.mark.parametrize("paged", [False, True], ids=["dense", "paged"])
def test_ragged_rows_decode_as_if_each_were_alone(paged, small):
    cfg, params = small
    tokens, lengths = random_tokens(cfg, (3, 16)), np.array([5, 1, 9])
    cache = paged_cache(cfg, 3, 4, 4, seed=1) if paged else init_cache(cfg, 3, 16)
    prompt = np.where(np.arange(9) < lengths[:, None], tokens[:, :9], 0)
    out = forward(
        cfg, params, prompt, segment_ids=(np.arange(9) < lengths[:, None]).astype(np.int32), cache=cache
    )
    wanted = forward(cfg, params, tokens).logits
    for b, length in enumerate(lengths):
        np.testing.assert_allclose(out.logits[b, :length], wanted[b, :length], atol=3e-5)
    for step in range(4):
        assert out.cache.length.tolist() == (lengths + step).tolist()
        now = np.take_along_axis(tokens, (lengths + step)[:, None], 1)
        out = forward(cfg, params, now, cache=out.cache)
        np.testing.assert_allclose(out.logits[:, 0], wanted[np.arange(3), lengths + step], atol=3e-5)


def test_a_row_without_real_tokens_leaves_the_cache_as_it_was(small):
    cfg, params = small
    tokens = random_tokens(cfg, (2, 4))
    first = forward(cfg, params, tokens, cache=paged_cache(cfg, 2, 2, 4))
    idle = forward(cfg, params, tokens, segment_ids=np.array([[0] * 4, [1, 1, 0, 0]]), cache=first.cache)
    assert idle.cache.length.tolist() == [4, 6]
    mine = np.asarray(first.cache.page_table)[0]
    for name in first.cache.layers:
        for key in ("k", "v"):
            np.testing.assert_array_equal(
                idle.cache.layers[name][key][mine], first.cache.layers[name][key][mine]
            )
            assert not np.asarray(idle.cache.layers[name][key][0]).any()  # nobody's page


def test_tokens_beyond_the_table_are_not_written_over_others(small):
    cfg, params = small
    tokens = random_tokens(cfg, (1, 10))
    full = forward(cfg, params, tokens[:, :8], cache=init_cache(cfg, 1, 8))
    after = forward(cfg, params, tokens[:, 8:], cache=full.cache)
    jax.tree.map(np.testing.assert_array_equal, after.cache.layers, full.cache.layers)


def test_generation_is_greedy_and_stops(small):
    cfg, params = small
    prompts = [[3, 1, 4], [1, 5, 9, 2, 6]]
    new = generate(cfg, params, prompts, 6)
    for prompt, ids in zip(prompts, new, strict=True):
        for i, token in enumerate(ids):
            row = np.zeros((1, 16), np.int32)
            row[0, : len(prompt) + i] = prompt + ids[:i]
            assert token == int(np.argmax(forward(cfg, params, row).logits[0, len(prompt) + i - 1]))
    stop = new[0][2]
    stopped = generate(cfg, params, prompts, 6, stop_ids=[stop])
    assert stopped[0] == new[0][: new[0].index(stop) + 1]
    with pytest.raises(ValueError, match="at least one token in each"):
        generate(cfg, params, [[]], 3)


def test_sampling_follows_the_distribution_and_its_seed(small):
    cfg, params = small
    draws = [
        generate(cfg, params, [[3, 1, 4]] * 256, 1, temperature=1.0, seed=seed) for seed in (0, 0, 1, 2, 3)
    ]
    assert draws[0] == draws[1] != draws[2]
    ids = np.array(draws[1:]).ravel()
    wanted = np.asarray(jax.nn.softmax(forward(cfg, params, np.array([[3, 1, 4]], np.int32)).logits[0, -1]))
    seen = np.bincount(ids, minlength=cfg.vocab_size) / len(ids)
    assert np.abs(seen - wanted).max() < 4 * np.sqrt(0.25 / len(ids))


# Configs.


CONFIGS = [
    tiny(),
    tiny(qk_norm=True, scan=True, remat="full", dtype="bfloat16", heads=(ScalarHead("value"),)),
    ModelConfig(
        7,
        8,
        (FULL, Block(Attention(1, 1, 2, Rope(9.0, Llama3Scaling(8, 1, 4, 64))), SwiGLU(3))),
        tied_head=False,
    ),
]


@pytest.mark.parametrize("cfg", CONFIGS, ids=["plain", "options", "mixed"])
def test_a_config_goes_through_json_unchanged(cfg):
    again = ModelConfig.from_dict(json.loads(json.dumps(cfg.to_dict())))
    assert again == cfg and hash(again) == hash(cfg)


def test_a_saved_config_that_is_not_ours_is_an_error():
    saved = tiny().to_dict()
    with pytest.raises(ValueError, match=r"GatedMLP has no field \['widht'\]"):
        ModelConfig.from_dict(
            saved | {"blocks": [saved["blocks"][0] | {"ffn": {"kind": "GatedMLP", "widht": 3}}]}
        )
    with pytest.raises(ValueError, match="unknown model part 'Hyena'. Known parts: Alibi, Attention, Block"):
        ModelConfig.from_dict(saved | {"final_norm": {"kind": "Hyena"}})
    with pytest.raises(ValueError, match="has kind ModelConfig; this one is 'Rope'"):
        ModelConfig.from_dict({"kind": "Rope", "theta": 5.0, "scaling": None})


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Attention(3, 2, 4), "num_heads=3 is not a multiple of num_kv_heads=2"),
        (lambda: Attention(2, 2, 5), "head_dim=5 leaves an odd number of channels"),
        (lambda: tiny(dtype="float64"), "dtype='float64' is not one of"),
        (lambda: tiny(remat="some"), "remat='some' is not one of"),
        (lambda: ModelConfig(5, 4, ()), "given 0 blocks"),
    ],
    ids=["groups", "odd head", "dtype", "remat", "no blocks"],
)
def test_a_model_that_cannot_be_is_refused_when_it_is_described(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_equal_neighbours_are_one_run():
    a, b = tiny().blocks[0], FULL
    cfg = tiny().replace(blocks=(a, a, b, a), scan=True)
    assert [(name, block, list(numbers)) for name, block, numbers in cfg.runs()] == [
        ("run_0", a, [0, 1]), ("run_1", b, [2]), ("run_2", a, [3]),
    ]  # fmt: skip


def test_fresh_parameters_depend_on_the_key_alone_and_have_the_stated_spread():
    cfg = decoder(512, 256, 2, 4, 2, 64, 512, tied_head=False, scan=True)
    a, b, c = (jit(init, static_argnums=0)(cfg, jax.random.key(seed)) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert not np.array_equal(a["embedding"], c["embedding"])
    assert jax.tree.map(jnp.shape, a) == jax.tree.map(lambda s: s.shape, param_shapes(cfg))
    cut = 0.8796  # a normal cut at two deviations has this deviation
    block = a["run_0"]
    for values, std in [
        (a["embedding"], 256**-0.5),
        (a["head"], cut * 256**-0.5),
        (block["mixer"]["q"], cut * 256**-0.5),
        (block["mixer"]["o"], cut * 256**-0.5 / 2),  # 1 / sqrt(2 * blocks): what residual branches add up to
        (block["ffn"]["down"], cut * 512**-0.5 / 2),
    ]:
        np.testing.assert_allclose(np.std(values), std, rtol=0.02)
        assert abs(np.mean(values)) < std / 50


# Native checkpoints.


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_a_native_save_gives_back_config_parameters_and_tokenizer(scan, small, tmp_path):
    cfg, params = relayout(*small, scan=scan)
    save(tmp_path / "model", cfg, params, tokenizer={"tokenizer.json": b"{}", "deep/file": b"\0\1"})
    assert load_config(tmp_path / "model") == cfg
    loaded_cfg, loaded = load(tmp_path / "model")
    assert loaded_cfg == cfg
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert (tmp_path / "model" / "tokenizer" / "deep" / "file").read_bytes() == b"\0\1"
    other_cfg, other = load(tmp_path / "model", cfg=cfg.replace(scan=not scan), dtype="bfloat16")
    assert other_cfg.scan is not scan
    wanted = relayout(cfg, params, scan=not scan)[1]
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(jnp.bfloat16)), other, wanted)


@pytest.mark.parametrize("format", ["native", "huggingface", "gguf"])
def test_a_model_loads_onto_eight_devices(format, tmp_path):
    cfg = decoder(64, 24, 2, 4, 2, 6, 40)
    params = random_params(cfg)
    path = tmp_path / ("model.gguf" if format == "gguf" else "model")
    save(path, cfg, params, format=format)
    mesh = jax.make_mesh((1, 4, 1, 1, 1, 2), ("data", "fsdp", "stage", "context", "expert", "tensor"))
    rules, axes = ShardingRules(), logical_axes(cfg)
    check_divisible(param_shapes(cfg), axes, rules, mesh)
    is_names = lambda x: isinstance(x, tuple)
    shardings = jax.tree.map(lambda names: named_sharding(mesh, rules, names), axes, is_leaf=is_names)
    _, loaded = load(path, shardings=shardings)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert jax.tree.map(lambda x: x.sharding, loaded) == shardings
    assert len(loaded["block_0"]["mixer"]["q"].addressable_shards[0].data.ravel()) == 24 * 4 * 6 // 8


def test_a_mesh_that_does_not_divide_the_model_is_an_error_with_the_mend():
    cfg = tiny()
    mesh = jax.make_mesh((1, 1, 1, 1, 1, 8), ("data", "fsdp", "stage", "context", "expert", "tensor"))
    with pytest.raises(
        ValueError, match=r"tensor = 8 do not divide the axis 'heads' \(4\).*Use one of 1, 2, 4"
    ):
        shapes, axes = param_shapes(cfg)["block_0"]["mixer"]["q"], logical_axes(cfg)["block_0"]["mixer"]["q"]
        check_divisible({"q": shapes}, {"q": axes}, ShardingRules(), mesh)


def test_another_model_than_the_config_asks_for_is_refused(small, tmp_path):
    save(tmp_path / "model", *small)
    with pytest.raises(ValueError, match="holds another model than the config asks for"):
        load(tmp_path / "model", cfg=tiny(rope_theta=999.0))
    with pytest.raises(ValueError, match="format='onnx' is not one of native, huggingface, gguf"):
        save(tmp_path / "other", *small, format="onnx")


def test_parameters_of_the_other_layout_and_empty_batches_are_refused_with_the_mend():
    cfg = decoder(32, 16, 2, 2, 1, 8, 24)
    params = init(cfg, jax.random.key(0))
    with pytest.raises(ValueError, match=r"groups block_0, block_1, and with scan=True .*relayout"):
        apply(cfg.replace(scan=True), params, jnp.zeros((1, 3), jnp.int32))
    for shape in ((0, 3), (1, 0)):
        with pytest.raises(ValueError, match="at least one row of one token"):
            apply(cfg, params, jnp.zeros(shape, jnp.int32))
