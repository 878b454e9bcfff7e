"""How good a model is: bits per byte of text, exact match on generated tasks, and any lm-eval task.

Everything is exported lazily, so that `import evals` stays light.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from configs.lazy import lazy_exports

_HOME = {
    "EvalConfig": "evals.config",
    "TaskEval": "evals.config",
    "evaluate": "evals.evaluate",
}

__all__ = ["EvalConfig", "TaskEval", "evaluate"]

if TYPE_CHECKING:
    from evals.config import EvalConfig, TaskEval
    from evals.evaluate import evaluate

__getattr__, __dir__ = lazy_exports(__name__, _HOME)
