"""Guesses of the next tokens, which the model then verifies in one step (speculative decoding).

Leviathan et al. 2023, arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318. A drafter here names one token a place, so
the rule of those papers accepts it with the probability that the model gives it. The engine draws the model's token
with the noise of its place, as without a draft, and accepts the guess where the two are equal. That has the same
probability, and every token stays the one that the request gets without speculation.
"""

from serve.drafters.ngram import NgramIndex
from serve.drafters.payoff import Payoff
from serve.drafters.speculation import Speculation

__all__ = ["NgramIndex", "Payoff", "Speculation"]
