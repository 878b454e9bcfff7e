"""The verifiers that rewards come from. They live in `data.verifiers`, where evaluation finds them, too."""

from data.verifiers import SCORERS, Verdict, Verifiers, score_math, score_task

__all__ = ["SCORERS", "Verdict", "Verifiers", "score_math", "score_task"]
