"""Every algorithm, cut off in the middle, ends bit for bit like one that was not."""

from __future__ import annotations

import numpy as np
import pytest

from train.trainer import train

from .conftest import leaves
from .test_post_training import answers, tuned  # noqa: F401  (a fixture)

ALGORITHMS = {
    "DPO": "pairs",
    "ORPO": "pairs",
    "SimPO": "pairs",
    "KTO": "labelled",
    "RewardModel": "pairs",
    "Distillation": "tokens",
}
QUICK = ("KTO", "Distillation")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in ALGORITHMS]
)
def test_a_run_that_was_cut_off_ends_like_one_that_was_not(corpus, answers, uninterrupted, tmp_path, name):  # noqa: F811
    algorithm, more = {"kind": name}, {}
    if name == "Distillation":
        algorithm["teacher"] = str(uninterrupted[0])
        more = {"data": {"mixture": {str(corpus / "down"): 1.0}, "validation": {}}}
    config = tuned(
        corpus,
        answers,
        uninterrupted[0],
        algorithm,
        "labelled" if name == "KTO" else "pairs",
        steps=6,
        average_decay=0.5,
        checkpoint={"every": 2},
        **more,
    )
    whole = train(config, tmp_path / "whole")
    train(config, tmp_path / "parts", stop_at=3)
    parts = train(config, tmp_path / "parts")
    assert parts["loss"] == whole["loss"]
    for ours, theirs in zip(leaves(tmp_path / "parts"), leaves(tmp_path / "whole"), strict=True):
        np.testing.assert_array_equal(ours, theirs)
