"""How good a model is: bits per byte of text, exact match on generated tasks, and any lm-eval task.

Everything is exported lazily, so that `import evals` stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

_HOME = {
    "EvalConfig": "evals.config",
    "TaskEval": "evals.config",
    "evaluate": "evals.evaluate",
}

__all__ = ["EvalConfig", "TaskEval", "evaluate"]

if TYPE_CHECKING:
    from evals.config import EvalConfig, TaskEval
    from evals.evaluate import evaluate


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'evals' has no attribute {name!r}; it exports {', '.join(__all__)}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__():
    return __all__
