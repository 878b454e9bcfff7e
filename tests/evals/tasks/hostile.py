"""A careless metric, as some benchmarks have them: it evaluates what the model answered."""

import os


def evaluate_answer(doc, results):
    refused, value = 0.0, None
    try:
        value = eval(results[0])
    except PermissionError:
        refused = 1.0
    return {
        "right": float(value == doc["answer"]),
        "refused": refused,
        "secret": float("HF_TOKEN" in os.environ),
    }
