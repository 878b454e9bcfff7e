"""`python -m model`: what describe counts, and that convert brings everything along."""

import json
import re

import jax
import numpy as np
import pytest

from data import load_tokenizer, train_tokenizer
from model import (
    Attention,
    Block,
    LearnedPositions,
    ModelConfig,
    RMSNorm,
    ScalarHead,
    SwiGLU,
    apply,
    init_cache,
    load,
    load_config,
    save,
)
from model.__main__ import main
from model.blocks.deltanet import GatedDeltaNet, KimiDeltaAttention
from model.blocks.differential_attention import DifferentialAttention
from model.blocks.experts import ClampedSwiGLU
from model.blocks.ffn import MLP
from model.blocks.latent_attention import LatentAttention
from model.blocks.mamba import Mamba
from model.blocks.mamba2 import Mamba2
from model.blocks.mixture_of_depths import MixtureOfDepths
from model.blocks.mixture_of_recursions import (
    MixtureOfRecursions,
    RecursionExpertChoice,
    RecursionTokenChoice,
)
from model.blocks.moe import MoE
from model.blocks.norms import LayerNorm
from model.blocks.parallel import Parallel
from model.blocks.retnet import Retention
from model.blocks.rglru import RGLRU
from model.blocks.router import Router
from model.blocks.rwkv7 import RWKV7, RWKV7ChannelMix
from model.config import PARTS
from model.inspect.anatomy import (
    activation_bytes,
    anatomy,
    cache_bytes_per_token,
    parameter_count,
    parameter_groups,
    state_bytes_per_row,
)
from model.inspect.describe import describe
from model.logprobs import token_logprobs
from model.readouts.mtp import mtp_blocks

from .conftest import GOLDENS, random_params, tiny

NORM, LAYER_NORM = RMSNorm(), LayerNorm()
EVERY_PART = ModelConfig(
    31,
    12,
    (
        Block(RWKV7(2, 6, 2, 3, 4, 5, first=True), None, LAYER_NORM),
        Block(RWKV7(2, 6, 2, 3, 4, 5), None, LAYER_NORM),
        Block(RWKV7ChannelMix(20, 12), None, LAYER_NORM),
        Block(
            Attention(4, 2, 6, qkv_bias=True, out_bias=True, qk_norm=LAYER_NORM, sinks=True, gate=True),
            MLP(20),
            post_norm=NORM,
        ),
        Block(
            LatentAttention(2, 4, 2, 5, 7, q_rank=6, bias=True),
            SwiGLU(20, bias=True),
            None,
            post_norm=LAYER_NORM,
        ),
        Block(LatentAttention(2, 4, 2, 5, 7), None),
        Block(DifferentialAttention(4, 2, 6, 0.2, qkv_bias=True, out_bias=True, pair_norm=NORM), None),
        Block(Mamba(24, 4, 2, bias=True, norm=NORM), None),
        Block(Mamba2(4, 6, 5, in_bias=True, out_bias=True), MoE(6, 2, ClampedSwiGLU(9), Router(bias=True))),
        Block(
            GatedDeltaNet(4, 2, 3, 4),
            MoE(6, 2, SwiGLU(9), Router("sigmoid", choice_bias=True), shared=SwiGLU(7), shared_gate=True),
        ),
        Block(KimiDeltaAttention(2, 4), MoE(4, 1, MLP(9))),
        Block(Parallel((Retention(2, 4, 5), RGLRU(4, 3)), out_norm=NORM), None),
        Block(RGLRU(4, 3), None),
        Block(MixtureOfDepths(Block(Retention(2, 4, 5), None)), None, None),
        Block(MixtureOfRecursions((Block(RGLRU(4, 3), None),), 2, RecursionExpertChoice()), None, None),
        Block(MixtureOfRecursions((Block(RGLRU(4, 3), None),), 2, RecursionTokenChoice()), None, None),
        Block(Retention(2, 4, 5), None),
    ),
    positions=LearnedPositions(16),
    embed_norm=NORM,
    tied_head=False,
    head_bias=True,
    heads=(ScalarHead("value"),),
    max_length=16,
)
MODELS = sorted(path.parent for path in GOLDENS.glob("*/config.json"))


def lines_of(text):
    """group -> the rest of its line."""
    return {
        line.split("  ")[0].strip() if line[0] != " " else line.split()[0]: line
        for line in text.splitlines()
        if line
    }


@pytest.mark.parametrize(
    "changes", [{}, {"tied_head": False, "heads": (ScalarHead("value"),)}, {"scan": True}], ids=str
)
def test_parameters_are_counted_as_the_arrays_have_them(changes):
    cfg = tiny(**changes)
    assert parameter_count(cfg) == sum(leaf.size for leaf in jax.tree.leaves(random_params(cfg)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cache_bytes_are_those_of_a_cache(dtype):
    cfg = tiny(dtype=dtype)
    assert cache_bytes_per_token(cfg) * 2 * 10 == sum(
        x.nbytes for x in jax.tree.leaves(init_cache(cfg, 2, 10).layers)
    )


def test_what_grows_with_a_row_and_what_does_not_are_told_apart():
    sizes = [sum(x.nbytes for x in jax.tree.leaves(init_cache(EVERY_PART, 2, n).layers)) for n in (10, 11)]
    per_token = cache_bytes_per_token(EVERY_PART)
    assert sizes[1] - sizes[0] == 2 * per_token
    assert sizes[0] == 2 * (10 * per_token + state_bytes_per_row(EVERY_PART))


def test_every_parameter_of_every_part_has_a_role():
    used = {type(part).__name__ for block in EVERY_PART.blocks for part in (block.mixer, block.ffn)}
    # an expert; T5's and BLT's, among the published families
    elsewhere = {"ClampedSwiGLU", "CrossAttention", "PatchAttention"}
    elsewhere |= {"SequentialMTP", "ParallelMTP"}  # tests/model/test_mtp.py
    assert {name for name, part in PARTS.items() if hasattr(part, "flops_per_token")} <= used | elsewhere
    assert not [group.name for group in parameter_groups(EVERY_PART) if not group.role]


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.name)
def test_the_groups_of_a_published_family_are_its_arrays(path):
    cfg = load_config(path)
    cfg, params = load(path, cfg=cfg.replace(scan=False))
    groups = parameter_groups(cfg)
    assert all(group.role for group in groups)
    assert sum(group.parameters for group in groups) == sum(x.size for x in jax.tree.leaves(params))
    idle = 0
    blocks = [(block, params[f"block_{i}"]) for i, block in enumerate(cfg.blocks)]
    for name, block in mtp_blocks(cfg.mtp).items():
        blocks.append((block, params[name]["block_0"]))
    for block, of_block in blocks:
        if isinstance(block.ffn, MoE):
            experts = sum(x.size for x in jax.tree.leaves(of_block["ffn"]["experts"]))
            idle += experts // block.ffn.num_experts * (block.ffn.num_experts - block.ffn.experts_per_token)
    assert sum(group.parameters - group.active for group in groups) == idle
    assert (idle > 0) == any(isinstance(block.ffn, MoE) for block in cfg.blocks)


def test_activations_are_about_what_the_compiled_step_needs():
    cfg, rows = tiny(6, scan=True), jax.ShapeDtypeStruct((4, 64), np.int32)
    loss = lambda params, tokens: -token_logprobs(apply(cfg, params, tokens).logits, tokens)[0].sum()
    params = jax.eval_shape(lambda: random_params(cfg))
    needed = jax.jit(jax.grad(loss)).lower(params, rows).compile().memory_analysis().temp_size_in_bytes
    assert 0.7 < activation_bytes(cfg, 4, 64) / needed < 1.4
    none, products, offload, full = (
        activation_bytes(cfg.replace(remat=r), 4, 64) for r in ("none", "products", "offload", "full")
    )
    assert full < none / 2 and full < products < none and offload < products


def test_memory_is_the_sum_of_its_parts():
    cfg = tiny(dtype="bfloat16")
    found, count = anatomy(cfg, batch=3, context=20), parameter_count(cfg)
    assert [found.training[name] for name in ("parameters", "gradients", "AdamW's moments")] == [
        4 * count,
        4 * count,
        8 * count,
    ]
    assert found.serving == {"parameters": 2 * count, "cache": 3 * 20 * cache_bytes_per_token(cfg)}
    assert found.backward_flops_per_token == 2 * found.forward_flops_per_token


def test_json_has_the_figures_of_the_table(capsys):
    path = GOLDENS / "mixtral"
    assert main(["describe", str(path), "--json", "--batch=2", "--context=8"]) == 0
    found = json.loads(capsys.readouterr().out)
    lines = lines_of(describe(path, 2, 8))
    assert f"{found['active_parameters']:,} parameters a token" in lines["active"]
    assert f"{found['parameters']:,}" in lines["total"]
    assert found["groups"][0]["axes"] == ["vocab", "embed"]


def test_every_group_is_listed_and_the_shares_add_up(tmp_path):
    norm = RMSNorm()
    wide = Block(Attention(4, 2, 6, qkv_bias=True, out_bias=True, qk_norm=norm), SwiGLU(40, bias=True), norm)
    plain = Block(Attention(4, 4, 6), SwiGLU(16), norm)
    cfg = tiny(tied_head=False, heads=(ScalarHead("value"),)).replace(blocks=(wide, wide, plain))
    save(tmp_path / "model", cfg, random_params(cfg))
    table = describe(tmp_path / "model").split("\n\n")[0].splitlines()[3:]
    row = re.compile(
        r"(?P<indent> *)(?P<name>[\w/ -]+?)  +(\d+( x \d+)* +\w+( x \w+)* +)?(?P<count>[\d,]+) +[\d.]+ %(?P<task>.*)"
    )
    rows = [row.fullmatch(line).groupdict() for line in table]
    counts = {r["name"]: int(r["count"].replace(",", "")) for r in rows if not r["indent"]}
    of_parts = sum(int(r["count"].replace(",", "")) for r in rows if r["indent"])
    assert {"block 0-1", "block 2", "head", "value_head", "final_norm/scale", "total"} <= counts.keys()
    assert counts["block 0-1"] + counts["block 2"] == of_parts
    assert sum(counts.values()) == 2 * counts["total"]
    assert counts["total"] == parameter_count(cfg)
    assert {"mixer/q_norm/scale", "mixer/o_bias", "ffn/down_bias"} <= {r["name"] for r in rows}
    assert all(r["task"].strip() for r in rows if r["name"] not in ("block 2", "total"))


def test_a_config_alone_is_described(tmp_path, small):
    lines = lines_of(describe(GOLDENS / "llama_tied" / "config.json"))
    assert "no weights here" in lines["stored"]
    assert lines_of(describe(GOLDENS / "llama_tied"))["total"] == lines["total"]
    cfg, _ = small
    (tmp_path / "own.json").write_text(json.dumps(cfg.to_dict()))
    assert f"{parameter_count(cfg):,}" in lines_of(describe(tmp_path / "own.json"))["total"]


def test_smollm2_is_described_as_it_is(smollm2):
    lines = lines_of(describe(smollm2, batch=2, context=1000))
    assert "134,515,008" in lines["total"]  # as its model card counts
    assert "210 Q4_1, 61 F32, 1 Q8_0" in lines["stored"]
    assert "30 equal blocks of 3,540,096" in lines["block 0-29"]
    assert "46,080 bytes a token" in lines["cache"] and "87.9 MiB for 2 x 1,000" in lines["cache"]


@pytest.fixture
def chat_model(tmp_path, small):
    """A Hugging Face folder with tokenizer and chat template; its tokenizer."""
    tokenizer = train_tokenizer("bpe", ["the cat sat on the mat"] * 20, 264, digits=3)
    tokenizer.save(tmp_path / "tokenizer")
    files = {item.name: item.read_bytes() for item in (tmp_path / "tokenizer").iterdir()}
    cfg = tiny().replace(vocab_size=320)
    save(tmp_path / "start", cfg, random_params(cfg), format="huggingface", tokenizer=files)
    return tmp_path / "start", tokenizer


def test_a_model_goes_through_every_format_with_its_tokenizer(chat_model, tmp_path, capsys):
    source, tokenizer = chat_model
    path = source
    for name, format in [("n", "native"), ("b.gguf", "gguf"), ("c", "native"), ("d", "huggingface"), ("e.gguf", None),
                         ("f", None)]:  # fmt: skip
        arguments = ["convert", str(path), str(tmp_path / name)]
        assert main(arguments + ([f"--format={format}"] if format else [])) == 0
        path = tmp_path / name
    assert load_config(path) == load_config(source)
    jax.tree.map(np.testing.assert_array_equal, load(path)[1], load(source)[1])
    messages = [{"role": "user", "content": "the cat\n 123"}]
    assert load_tokenizer(path).apply_chat_template(messages) == tokenizer.apply_chat_template(messages)
    assert load_tokenizer(path).eos_ids == tokenizer.eos_ids
    assert "written as huggingface" in capsys.readouterr().out


def test_convert_can_change_the_dtype(chat_model, tmp_path):
    source, _ = chat_model
    for name in ("half", "half.gguf"):
        assert main(["convert", str(source), str(tmp_path / name), "--dtype=bfloat16"]) == 0
    assert (
        main(["convert", str(source), str(tmp_path / "native"), "--dtype=bfloat16", "--format=native"]) == 0
    )
    cfg, params = load(tmp_path / "native")
    assert cfg.dtype == "bfloat16" and str(params["embedding"].dtype) == "bfloat16"
    assert "BF16" in describe(tmp_path / "half.gguf")
    jax.tree.map(np.testing.assert_array_equal, params, load(tmp_path / "half")[1])


def test_stop_tokens_that_only_config_json_knows_come_along(chat_model, tmp_path):
    source, _ = chat_model
    (source / "generation_config.json").unlink()
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"eos_token_id": 7}))
    assert main(["convert", str(source), str(tmp_path / "native"), "--format=native"]) == 0
    assert 7 in load_tokenizer(tmp_path / "native").eos_ids


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["describe", "{tmp}/nothing"], "no such file or folder"),
        (["describe", "{model}", "--batch=0"], "must be at least 1"),
        (["convert", "{model}", "{model}"], "already exists"),
        (["convert", "{model}", "{tmp}/x", "--format=gguf"], "give it a name that ends in .gguf"),
    ],
    ids=["no path", "no rows", "same place", "gguf folder"],
)
def test_a_mistake_is_one_paragraph_and_exit_2(arguments, message, chat_model, tmp_path, capsys):
    source, _ = chat_model
    assert main([part.format(tmp=tmp_path, model=source) for part in arguments]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and message in printed and printed.count("\n") == 1
