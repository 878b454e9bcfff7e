"""Text that a model makes from seeds, accepted by rules, with where each row comes from."""

from data.synthetic.config import SyntheticConfig
from data.synthetic.run import synthesise

__all__ = ["SyntheticConfig", "synthesise"]
