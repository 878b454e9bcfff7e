"""Rewritten rows: a document's pieces are all there, in the order that is promised, and nothing else changes."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import data
from configs import ConfigError
from data.tokenizer.training import DEFAULT_SPECIAL_TOKENS, SpecialTokens
from model import Inputs, apply, decoder
from tests.policy import adamw, objective_of, policy_state, policy_step
from train.algorithms import LanguageModelling, MaskedLanguageModelling
from train.algorithms.corruption import fill_in_the_middle, mask_tokens
from train.algorithms.language_modelling import neftune_noise
from train.trainer import train

from .conftest import make_config
from .test_experts import fresh, jit
from .test_step import packed_batch

PREFIX, SUFFIX, MIDDLE = 101, 102, 103
IDS = (PREFIX, SUFFIX, MIDDLE)
CFG = decoder(64, 16, 1, 2, 1, 8, 24)


def documents(rows=40, length=48, seed=0):
    """Packed rows as the loader makes them: documents of different tokens, the last one cut by the row's end."""
    rng = np.random.default_rng(seed)
    batch = {
        name: np.zeros((rows, length), np.int32) for name in ("tokens", "targets", "segment_ids", "positions")
    }
    batch["loss_weights"] = np.zeros((rows, length), np.float32)
    for row in range(rows):
        at, segment = 0, 0
        while at < length - 2:
            n, segment = int(rng.integers(5, 24)), segment + 1
            document = rng.permutation(100)[: n + 1].astype(np.int32)
            stop = min(at + n, length)
            m = stop - at
            batch["tokens"][row, at:stop] = document[:m]
            last = m if stop == length and row % 2 else m - 1  # every other row is cut within a document
            batch["targets"][row, at : at + last] = document[1 : last + 1]
            batch["loss_weights"][row, at : at + last] = 1
            batch["segment_ids"][row, at:stop] = segment
            batch["positions"][row, at:stop] = np.arange(m)
            at = stop
    return {name: jnp.asarray(x) for name, x in batch.items()}


def keys_of(batch, seed=0):
    return jax.random.split(jax.random.key(seed), len(batch["tokens"]))


@pytest.mark.parametrize("spm_rate", [0.0, 1.0])
def test_a_middle_is_moved_to_the_end_and_nothing_is_lost_but_three_tokens(spm_rate):
    batch = documents()
    found = jit(lambda b, k: fill_in_the_middle(b, k, IDS, 0.8, spm_rate))(batch, keys_of(batch))
    old, new = (jax.device_get(x) for x in (batch, found))
    for name in ("loss_weights", "segment_ids", "positions"):
        np.testing.assert_array_equal(old[name], new[name])
    moved, cuts = 0, set()
    for row in range(len(old["tokens"])):
        for segment in range(1, old["segment_ids"][row].max() + 1):
            here = np.flatnonzero(old["segment_ids"][row] == segment)
            before, after, targets = (
                old["tokens"][row, here],
                new["tokens"][row, here],
                new["targets"][row, here],
            )
            np.testing.assert_array_equal(targets[:-1], after[1:])
            assert targets[-1] == old["targets"][row, here[-1]]
            if len(here) < 8 or after[0] != PREFIX:
                np.testing.assert_array_equal(before, after)
                continue
            moved += 1
            assert after[-1] == before[-1]
            suffix_at, middle_at = (list(after).index(token) for token in (SUFFIX, MIDDLE))
            if spm_rate:
                assert suffix_at == 1
                suffix, rest = after[2:middle_at], after[middle_at + 1 : -1]
                np.testing.assert_array_equal(np.concatenate([rest, suffix]), before[: len(before) - 4])
            else:
                prefix, suffix = after[1:suffix_at], after[suffix_at + 1 : middle_at]
                middle = after[middle_at + 1 : -1]
                np.testing.assert_array_equal(
                    np.concatenate([prefix, middle, suffix]), before[: len(before) - 4]
                )
            cuts.add((suffix_at, middle_at))
    assert moved > 40 and len(cuts) > 10


def test_dialogues_are_left_as_they_are():
    batch = documents()
    batch["loss_weights"] = batch["loss_weights"].at[:, ::3].set(0.0)  # a mask of answers
    found = fill_in_the_middle(batch, keys_of(batch), IDS, 1.0)
    long = jax.device_get(batch["segment_ids"]) > 0
    np.testing.assert_array_equal(np.where(long, found["tokens"], 0), np.where(long, batch["tokens"], 0))


def test_masked_tokens_are_their_own_targets_in_the_shares_of_the_paper():
    batch = documents(rows=400)
    found = jit(lambda b, k: mask_tokens(b, k, 0, 100))(batch, keys_of(batch))
    chosen = np.asarray(found["loss_weights"]) > 0
    real = np.asarray(batch["segment_ids"]) > 0
    tokens, old = np.asarray(found["tokens"]), np.asarray(batch["tokens"])
    assert not (chosen & ~real).any() and chosen.sum() / real.sum() == pytest.approx(0.15, abs=0.01)
    np.testing.assert_array_equal(found["targets"], old)
    np.testing.assert_array_equal(tokens[~chosen], old[~chosen])
    of_chosen = tokens[chosen]
    assert (of_chosen == 0).mean() == pytest.approx(0.8 + 0.002, abs=0.03)
    assert (of_chosen == old[chosen]).mean() == pytest.approx(0.1 + 0.009, abs=0.03)


@pytest.mark.parametrize("ids", [None, 50])
def test_label_smoothing_is_cross_entropy_with_the_smoothed_target(ids):
    params, batch = fresh(CFG), packed_batch()
    plain, _ = jit(objective_of(LanguageModelling(), CFG))(params, batch)
    smoothed = LanguageModelling(label_smoothing=0.2, smoothed_ids=ids)
    loss, metrics = jit(objective_of(smoothed, CFG))(params, batch)
    logits = jit(lambda p, b: apply(CFG, p, Inputs.from_batch(b)).logits)(params, batch)
    logprobs = np.asarray(jax.nn.log_softmax(logits))
    chosen = np.take_along_axis(logprobs, batch["targets"][..., None], -1)[..., 0]
    wanted = -(0.8 * chosen + 0.2 * logprobs[..., :ids].mean(-1)) * batch["loss_weights"]
    assert float(loss.total) == pytest.approx(wanted.sum(), rel=1e-5)
    assert float(metrics["nll"].total) == pytest.approx(float(plain.total), rel=1e-5)


def test_labels_are_smoothed_over_the_tokenizers_ids_without_the_models_padding():
    tokenizer = data.train_tokenizer("bytes", [], 0)
    found = LanguageModelling(label_smoothing=0.1).with_tokenizer(tokenizer)
    assert found.smoothed_ids == tokenizer.vocab_size


def test_neftune_noise_is_bounded_by_the_length_of_the_document_and_absent_from_a_measurement():
    batch = {k: jnp.asarray(v) for k, v in packed_batch().items()}
    noise = np.asarray(neftune_noise(batch, keys_of(batch), 16, 5.0))
    segments = np.asarray(batch["segment_ids"])
    for row in range(8):
        for segment in (1, 2):
            here = segments[row] == segment
            bound = 5.0 / np.sqrt(here.sum() * 16)
            assert 0.8 * bound < np.abs(noise[row, here]).max() <= bound
    params, noisy = fresh(CFG), LanguageModelling(neftune_alpha=5.0, fim_rate=1.0, fim_ids=(60, 61, 62))
    quiet, plain = (jit(objective_of(a, CFG))(params, batch)[0] for a in (noisy, LanguageModelling()))
    assert float(quiet.total) == float(plain.total)
    loud, _ = jit(objective_of(noisy, CFG, rng=jax.random.key(3)))(params, batch)
    assert abs(float(loud.total) - float(plain.total)) > 1e-3


def test_special_tokens_are_found_in_the_tokenizer_or_missed_by_name():
    tokenizer = data.train_tokenizer("bpe", ["a cat sat on a mat"] * 20, 264)
    with pytest.raises(ConfigError, match="fim_tokens.*has not each of them as one token"):
        LanguageModelling(fim_rate=0.5).with_tokenizer(tokenizer)
    with pytest.raises(ConfigError, match="mask_token='.MASK.' is no token"):
        MaskedLanguageModelling().with_tokenizer(tokenizer)
    single = tuple(tokenizer.decode([i]) for i in (70, 71, 72))
    found = LanguageModelling(fim_rate=0.5, fim_tokens=single).with_tokenizer(tokenizer)
    assert found.fim_ids == (70, 71, 72)
    assert MaskedLanguageModelling(mask_token=single[0]).with_tokenizer(tokenizer).mask_id == 70
    names = ["[MASK]", "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"]
    special = SpecialTokens([*DEFAULT_SPECIAL_TOKENS, *names])
    theirs = data.train_tokenizer("bpe", ["a cat sat on a mat"] * 20, 270, special)
    wanted = [theirs.special_tokens[name] for name in names]
    assert MaskedLanguageModelling().with_tokenizer(theirs).mask_id == wanted[0]
    assert LanguageModelling(fim_rate=0.5).with_tokenizer(theirs).fim_ids == tuple(wanted[1:])
    with pytest.raises(ConfigError, match="sees both sides"):
        objective_of(MaskedLanguageModelling(mask_id=3), CFG)(fresh(CFG), packed_batch())


def test_an_encoder_learns_to_fill_in_what_is_masked():
    """Numbers that rise by one: a hidden one is known from its neighbours on both sides."""
    block = CFG.blocks[0]
    both_sides = dataclasses.replace(block, mixer=dataclasses.replace(block.mixer, causal=False))
    cfg = CFG.replace(blocks=(both_sides,) * 2)
    algorithm = MaskedLanguageModelling(mask_id=63)
    optimizer = adamw(cfg, 600, peak_lr=1e-2, weight_decay=0.0)
    step, state = jit(policy_step(cfg, optimizer, algorithm)), policy_state(fresh(cfg), optimizer)
    rng = np.random.default_rng(0)
    ones = np.ones((16, 12), np.int32)
    seen = []
    for _ in range(600):
        tokens = rng.integers(1, 40, (16, 1)) + np.arange(12)
        batch = {"tokens": tokens.astype(np.int32), "targets": tokens.astype(np.int32), "segment_ids": ones}
        batch |= {
            "loss_weights": ones.astype(np.float32),
            "positions": np.tile(np.arange(12, dtype=np.int32), (16, 1)),
        }
        state, metrics = step(state, batch)
        seen.append(float(metrics["accuracy"].mean()))
    assert np.mean(seen[-20:]) > 0.8 and np.mean(seen[:20]) < 0.3


def test_a_run_learns_to_fill_in_hidden_spans_from_its_config(corpus, tmp_path):
    """Numbers that rise by one: what is hidden is known from what is shown."""
    spans = {"sentinel_ids": [200, 201, 202], "mode_ids": [-1]}
    final = train(
        make_config(corpus, steps=600, optimizer={"peak_lr": 1e-2}, data={"spans": spans}), tmp_path
    )
    # two hidden numbers and a sentinel; numbers of the text's range drawn at random would cost 2.7
    assert final["validation_loss"] < 1.6
    assert "sentinel_ids" in (tmp_path / "config.json").read_text()
