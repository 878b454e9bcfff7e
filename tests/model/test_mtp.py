"""Multi-token prediction: modules in a row and heads side by side. The goldens of test_families prove the former's
numbers; here are the latter's, and what holds for both."""

import dataclasses
import json
import logging
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from model import ModelConfig, apply, init_cache, load, load_config, logical_axes, param_shapes, save
from model.adapters import drop_adapters
from model.blocks.attention import Attention
from model.blocks.block import Block
from model.blocks.ffn import SwiGLU
from model.blocks.lora import LoRA
from model.blocks.moe import MoE
from model.blocks.norms import LayerNorm, RMSNorm
from model.blocks.positions import LearnedPositions
from model.blocks.rwkv7 import RWKV7
from model.formats.peft import load_adapters, save_adapter
from model.inspect.anatomy import anatomy, parameter_groups
from model.inspect.flops import forward_flops_per_token, mtp_flops_per_token, train_flops_per_token
from model.layout import relayout, without_mtp
from model.readouts.mtp import ParallelMTP, SequentialMTP, look_ahead, same_segment

from .conftest import GOLDENS, applied, check_decoding, compiled_fast, random_params, random_tokens, tiny
from .test_families import OTHER_PYTHON

NORM = RMSNorm()
MIXTURE = Block(Attention(4, 2, 6), MoE(4, 2, SwiGLU(12)))
DENSE = Block(Attention(2, 1, 8, window=3), SwiGLU(20))
MTPS = {
    "sequential": SequentialMTP((MIXTURE, DENSE), LayerNorm()),
    "parallel": ParallelMTP((MIXTURE, DENSE)),
}
both = pytest.mark.parametrize("kind", MTPS)

forward = compiled_fast(applied, static_argnums=0)


def model_with(kind, **changes):
    cfg = tiny(layers=2, tied_head=False, mtp=MTPS[kind], **changes)
    return cfg, random_params(cfg)


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_a_parallel_head_is_the_model_with_that_head_for_its_last_block(scan):
    cfg = tiny(layers=3, mtp=ParallelMTP((MIXTURE, DENSE)))
    params, tokens = random_params(cfg), random_tokens(cfg, (2, 9))
    run_cfg, run_params = relayout(cfg, params, scan=scan)
    out = forward(run_cfg, run_params, tokens)
    assert len(out.mtp_logits) == 2
    for k, block in enumerate(cfg.mtp.blocks, 1):
        other = cfg.replace(blocks=(*cfg.blocks[:-1], block), mtp=None)
        of_other = {name: params[name] for name in params if not name.startswith("mtp_")}
        of_other["block_2"] = params[f"mtp_{k}"]["block_0"]
        np.testing.assert_allclose(out.mtp_logits[k - 1], forward(other, of_other, tokens).logits, atol=3e-5)


def test_a_sequential_module_by_hand():
    """A block that adds nothing, so that all that is left are norms, the join and the head; token by token."""
    silent = Block(Attention(4, 2, 6), None)
    cfg = tiny(layers=1, tied_head=False, mtp=SequentialMTP((silent, silent), NORM))
    params, tokens = random_params(cfg), random_tokens(cfg, (2, 7))
    for k in (1, 2):
        params[f"mtp_{k}"]["block_0"]["mixer"]["o"] *= 0
    out = jax.tree.map(np.asarray, forward(cfg, params, tokens))
    normed = lambda x, scale: x / np.sqrt((x**2).mean() + 1e-5) * np.asarray(scale["scale"])
    for b in range(2):
        hidden = out.hidden[b]
        for k in (1, 2):
            of_module, given = params[f"mtp_{k}"], []
            for i in range(7):
                ahead = params["embedding"][tokens[b, i + k]] if i + k < 7 else np.zeros(24)
                read = np.concatenate(
                    [
                        normed(np.asarray(ahead), of_module["embedding_norm"]),
                        normed(hidden[i], of_module["hidden_norm"]),
                    ]
                )
                given.append(normed(read @ np.asarray(of_module["join"]), of_module["final_norm"]))
            hidden = np.stack(given)
            np.testing.assert_allclose(
                out.mtp_logits[k - 1][b], hidden @ np.asarray(params["head"]).T, atol=3e-5
            )


@both
def test_packed_documents_are_as_alone_and_none_sees_another(kind):
    cfg, params = model_with(kind)
    lengths = (5, 2, 6)
    documents = [random_tokens(cfg, (n,), seed=n) for n in lengths]
    padded = lambda parts: np.pad(np.concatenate(parts), (0, 14 - sum(map(len, parts)))).astype(np.int32)
    numbered = lambda ns: [np.full(n, i) for i, n in enumerate(ns, 1)]
    counted = lambda ns: [np.arange(n) for n in ns]
    cuts = (lengths, *((n,) for n in lengths))  # the packed row, then each document in a row of its own
    tokens = np.stack([padded(parts) for parts in (documents, *([d] for d in documents))])
    segments, positions = (np.stack([padded(of(ns)) for ns in cuts]) for of in (numbered, counted))
    out = forward(cfg, params, tokens, positions, segments)
    for row, start in ((1, 0), (2, 5), (3, 7)):
        n = lengths[row - 1]
        for logits in (out.logits, *out.mtp_logits):
            np.testing.assert_allclose(logits[0, start : start + n], logits[row, :n], atol=3e-5)


@both
def test_scanned_and_recomputed_models_say_the_same(kind):
    cfg, params = model_with(kind)
    tokens = random_tokens(cfg, (2, 8))
    wanted = forward(cfg, params, tokens)
    scanned_cfg, scanned = relayout(cfg.replace(remat="full"), params, scan=True)
    assert set(scanned) == set(param_shapes(scanned_cfg))
    found = forward(scanned_cfg, scanned, tokens)
    for ours, theirs in zip(
        (found.logits, *found.mtp_logits), (wanted.logits, *wanted.mtp_logits), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=3e-5)
    jax.tree.map(np.testing.assert_array_equal, relayout(scanned_cfg, scanned, scan=False)[1], params)


@both
def test_decoding_with_a_cache_is_as_ever_and_says_no_later_tokens(kind):
    cfg, params = model_with(kind)
    tokens = random_tokens(cfg, (2, 9))
    cache = init_cache(cfg, 2, 9)
    assert forward(cfg, params, tokens[:, :3], cache=cache).mtp_logits == ()
    check_decoding(forward, cfg, params, tokens, cache, (4, 1, 1, 3))


@both
def test_who_does_not_ask_pays_nothing_and_gets_the_same(kind):
    cfg, params = model_with(kind)
    plain, of_plain = without_mtp(cfg, params)
    assert plain.mtp is None and set(params) - set(of_plain) == {"mtp_1", "mtp_2"}
    tokens = random_tokens(cfg, (2, 8))
    compiled = [
        jax.jit(lambda p, t, c=c: apply(c, p, t).logits, keep_unused=False).lower(p, tokens).compile()
        for c, p in ((cfg, params), (plain, of_plain))
    ]
    flops = [program.cost_analysis()["flops"] for program in compiled]
    assert flops[0] == flops[1] > 0
    np.testing.assert_array_equal(compiled[0](params, tokens), compiled[1](of_plain, tokens))


def test_logits_at_some_tokens_are_those_of_all():
    cfg = tiny(layers=1, mtp=SequentialMTP((DENSE,)))
    params = random_params(cfg)
    tokens, at = random_tokens(cfg, (2, 8)), np.array([[1, 6], [0, 3]])
    whole, some = forward(cfg, params, tokens), forward(cfg, params, tokens, logits_at=at)
    for ours, theirs in zip(some.mtp_logits, whole.mtp_logits, strict=True):
        np.testing.assert_allclose(ours, np.take_along_axis(theirs, at[:, :, None], 1), atol=1e-5)


def test_blocks_of_mtp_find_what_earlier_blocks_share():
    mixer = RWKV7(4, 6, 2, 3, 4, 5)
    first = Block(dataclasses.replace(mixer, first=True), None)
    cfg = ModelConfig(
        61,
        24,
        (first, Block(mixer, None)),
        positions=LearnedPositions(16),
        mtp=ParallelMTP((Block(mixer, None),)),
    )
    params, tokens = random_params(cfg), random_tokens(cfg, (2, 8))
    params["block_1"] = params["mtp_1"]["block_0"]
    out = forward(cfg, params, tokens)
    np.testing.assert_allclose(out.mtp_logits[0], out.logits, atol=1e-5)


def test_what_mtp_reports_is_apart_from_what_the_model_reports():
    cfg, params = model_with("sequential")
    out = forward(cfg, params, random_tokens(cfg, (2, 8)))
    assert not out.aux and float(out.mtp_aux["moe_entropy"].weight) == 2 * 8


@pytest.mark.slow
def test_adapters_are_beside_its_maps_too_and_go_out_and_in_again(tmp_path):
    cfg = load_config(GOLDENS / "deepseek_v3_mtp")
    adapted = cfg.replace(adapters=LoRA(2, 4.0, ("join", "mixer/o")))
    beside = random_params(adapted)
    params = drop_adapters(adapted, beside)[1]
    tokens = random_tokens(cfg, (2, 6))
    wanted, without = forward(adapted, beside, tokens), forward(cfg, params, tokens)
    assert all(np.abs(a - b).max() > 0.1 for a, b in zip(wanted.mtp_logits, without.mtp_logits, strict=True))
    save_adapter(tmp_path / "adapter", adapted, beside)
    found = forward(*load_adapters(cfg, params, [tmp_path / "adapter"]), tokens)
    for ours, theirs in zip(
        (found.logits, *found.mtp_logits), (wanted.logits, *wanted.mtp_logits), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=3e-5)


def test_looking_ahead_ends_with_the_row_and_the_document():
    segments = np.array([[1, 1, 1, 2, 2, 0, 0]])
    for k in (1, 2, 9):
        ahead, same = look_ahead(jnp.asarray(segments), k), same_segment(jnp.asarray(segments), k)
        for i in range(7):
            inside = i + k < 7
            assert ahead[0, i] == (segments[0, i + k] if inside else 0)
            assert same[0, i] == (inside and segments[0, i] == segments[0, i + k] != 0)


@both
def test_it_is_saved_and_read_whole(kind, tmp_path):
    cfg, params = model_with(kind)
    assert ModelConfig.from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg
    save(tmp_path / "model", cfg, params)
    again, loaded = load(tmp_path / "model")
    assert again == cfg
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_mtp_needs_blocks_and_a_model_that_is_causal():
    with pytest.raises(ValueError, match="needs a block for each token"):
        ParallelMTP(())
    blind = dataclasses.replace(MIXTURE, mixer=Attention(4, 2, 6, causal=False))
    with pytest.raises(ValueError, match="an encoder sees the tokens that multi-token"):
        tiny(mtp=MTPS["parallel"]).replace(blocks=(blind,))


@both
def test_parameters_have_axes_roles_and_a_place(kind):
    cfg, params = model_with(kind)
    names = jax.tree.leaves(logical_axes(cfg)["mtp_1"], is_leaf=lambda x: isinstance(x, tuple))
    shapes = jax.tree.leaves(params["mtp_1"])
    assert all(len(axes) == leaf.ndim and any(axes) for axes, leaf in zip(names, shapes, strict=True))
    groups = [group for group in parameter_groups(cfg) if group.stack == "mtp"]
    assert all(group.role for group in groups) and [group.blocks for group in groups][-1] == (2, 2)
    for k in (1, 2):
        counted = sum(group.parameters for group in groups if group.blocks == (k, k))
        assert counted == sum(leaf.size for leaf in jax.tree.leaves(params[f"mtp_{k}"]))
    idle = sum(group.parameters - group.active for group in groups)
    assert idle == 3 * 4 * 24 * 12 / 2  # two of four experts


@pytest.mark.parametrize("kind, join", [("sequential", 2 * (2 * 24) * 24), ("parallel", 0)])
def test_training_computes_mtp_and_writing_does_not(kind, join):
    cfg, _ = model_with(kind)
    plain = cfg.replace(mtp=None)
    assert forward_flops_per_token(cfg, 16) == forward_flops_per_token(plain, 16)
    longer = plain.replace(blocks=plain.blocks + cfg.mtp.blocks)
    blocks = forward_flops_per_token(longer, 16) - forward_flops_per_token(plain, 16)
    extra = blocks + 2 * (join + 2 * 24 * 61)
    assert mtp_flops_per_token(cfg, 16) == extra
    assert train_flops_per_token(cfg, 16) == train_flops_per_token(plain, 16) + 3 * extra
    found = anatomy(cfg, 1, 16)
    assert found.mtp_flops_per_token == extra
    assert found.backward_flops_per_token == 2 * (found.forward_flops_per_token + extra)
    assert found.training["activations"] > anatomy(plain, 1, 16).training["activations"]


@pytest.mark.parametrize("format, name", [("gguf", "model.gguf"), ("huggingface", "model")])
@both
def test_a_format_without_a_place_for_it_gets_the_model_alone(kind, format, name, tmp_path, caplog):
    cfg, params = model_with(kind)
    save(tmp_path / name, *relayout(cfg, params, scan=True), format)
    assert "without multi-token prediction" in caplog.text
    again, loaded = load(tmp_path / name)
    plain, of_plain = without_mtp(cfg, params)
    assert again == plain
    jax.tree.map(np.testing.assert_array_equal, loaded, of_plain)


def changed(tmp_path, name, change):
    folder = shutil.copytree(GOLDENS / name, tmp_path / name)
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("name", ["deepseek_v3_mtp", "glm4_moe_mtp", "qwen3_next_mtp"])
def test_a_checkpoint_without_the_modules_is_the_model_without_them(name, tmp_path, caplog):
    def drop(tensors):
        for key in [key for key in tensors if key.startswith(("mtp.", "model.layers.2.", "model.layers.3."))]:
            del tensors[key]

    whole = load(GOLDENS / name)
    folder = changed(tmp_path, name, drop)
    with caplog.at_level(logging.WARNING):
        cfg, params = load(folder)
    assert [record.message for record in caplog.records] == [
        f"{folder}: has no tensors for multi-token prediction; the model is read without it."
    ]
    plain, of_plain = without_mtp(*whole)
    assert cfg == plain == load_config(folder) and whole[0] == load_config(GOLDENS / name) != cfg
    jax.tree.map(np.testing.assert_array_equal, params, of_plain)
    save(tmp_path / "again", cfg, params, format="huggingface")
    assert load_config(tmp_path / "again") == cfg
    assert json.loads((tmp_path / "again" / "config.json").read_text())["num_nextn_predict_layers"] == 0


@pytest.mark.slow
@pytest.mark.skipif(
    not OTHER_PYTHON.is_file(), reason="no .venvs/goldens with transformers; see tests/goldens/make.py"
)
def test_transformers_computes_the_same_from_modules_that_we_save(tmp_path):
    names = sorted(path.name for path in GOLDENS.glob("*_mtp"))
    for name in names:
        save(tmp_path / name, *load(GOLDENS / name), format="huggingface")
    command = [str(OTHER_PYTHON), str(GOLDENS / "make_mtp.py"), "--check", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    differences = json.loads(run.stdout.splitlines()[-1])
    assert sorted(differences) == names and max(differences.values()) < 1e-5


def test_modules_that_are_there_in_part_are_an_error(tmp_path):
    folder = changed(
        tmp_path, "deepseek_v3_mtp", lambda tensors: tensors.pop("model.layers.3.eh_proj.weight")
    )
    with pytest.raises(ValueError, match=r"lacks 1 tensors .*: model.layers.3.eh_proj.weight"):
        load(folder)


@pytest.mark.parametrize("copy", ["embed_tokens", "shared_head.head"])
def test_repeated_embedding_and_head_must_be_the_models_own_or_absent(copy, tmp_path):
    name = f"model.layers.3.{copy}.weight"
    original = {"embed_tokens": "model.embed_tokens.weight", "shared_head.head": "lm_head.weight"}[copy]

    def nudge(tensors):
        tensors[name][3, 4] += 1e-3

    with pytest.raises(ValueError, match=f"'{name}' differs from '{original}'"):
        load(changed(tmp_path / "other", "deepseek_v3_mtp", nudge))
    absent = changed(tmp_path / "absent", "deepseek_v3_mtp", lambda tensors: tensors.pop(name))
    jax.tree.map(np.testing.assert_array_equal, load(absent)[1], load(GOLDENS / "deepseek_v3_mtp")[1])


def test_a_tied_head_is_repeated_as_the_embedding(tmp_path):
    cfg, _ = load(GOLDENS / "glm4_moe_mtp")
    tied = cfg.replace(tied_head=True)
    save(tmp_path / "tied", tied, random_params(tied), format="huggingface")
    tensors = safetensors.numpy.load_file(tmp_path / "tied" / "model.safetensors")
    np.testing.assert_array_equal(
        tensors["model.layers.2.shared_head.head.weight"], tensors["model.embed_tokens.weight"]
    )
    assert load(tmp_path / "tied")[0] == tied


def test_qwen_has_one_module_at_most(tmp_path):
    saved = json.loads((GOLDENS / "qwen3_next_mtp" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(saved | {"num_nextn_predict_layers": 2}))
    with pytest.raises(ValueError, match="num_nextn_predict_layers=2 is not an integer from 0 to 1"):
        load_config(tmp_path)
