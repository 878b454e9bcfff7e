"""A corpus with dialogues that take over at nine tenths of the run, for `python -m data.plan` (a run's own plan:
`python -m train ... --plan`)."""

from ml_collections import ConfigDict


def get_config():
    corpus, dialogues = "runs/corpus/tokens/train", "runs/dialogues/chat/train"
    annealing = {"weights": {corpus: 0.3, dialogues: 0.7}, "start": 0.9}
    data = {"mixture": {corpus: 1.0}, "phases": (annealing,), "packing": "best_fit"}
    return ConfigDict({"data": data, "steps": 2000})
