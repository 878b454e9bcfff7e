"""`python -m model`: what describe counts, and that convert brings everything along."""

import json
import re

import jax
import numpy as np
import pytest

from data import load_tokenizer, train_tokenizer
from model import Attention, Block, RMSNorm, ScalarHead, SwiGLU, init_cache, load, load_config, save
from model.__main__ import main
from model.describe import cache_bytes_per_token, describe, parameter_count

from .conftest import GOLDENS, random_params, tiny


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


def test_every_group_is_listed_and_the_shares_add_up(tmp_path):
    norm = RMSNorm()
    wide = Block(Attention(4, 2, 6, qkv_bias=True, out_bias=True, qk_norm=norm), SwiGLU(40, bias=True), norm)
    plain = Block(Attention(4, 4, 6), SwiGLU(16), norm)
    cfg = tiny(tied_head=False, heads=(ScalarHead("value"),)).replace(blocks=(wide, wide, plain))
    save(tmp_path / "model", cfg, random_params(cfg))
    table = describe(tmp_path / "model").split("\n\n")[0].splitlines()[3:]
    row = re.compile(
        r"(?P<indent> *)(?P<name>[\w/ -]+?)  +(\d+( x \d+)* +)?(?P<count>[\d,]+) +[\d.]+ %(?P<task>.*)"
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
        (["convert", "{model}", "{model}"], "is there already"),
        (["convert", "{model}", "{tmp}/x", "--format=gguf"], "give it a name that ends in .gguf"),
    ],
    ids=["no path", "no rows", "same place", "gguf folder"],
)
def test_a_mistake_is_one_paragraph_and_exit_2(arguments, message, chat_model, tmp_path, capsys):
    source, _ = chat_model
    assert main([part.format(tmp=tmp_path, model=source) for part in arguments]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and message in printed and printed.count("\n") == 1
