"""A corpus rephrased by a served model, at most as much as there is of it: for `python -m data.synthetic`.

python -m serve --model=smollm2 --port=8000
python -m data.synthetic --config=configs/data/synthetic.py:runs/corpus/text/train --workdir=runs/synthetic
"""

from ml_collections import ConfigDict


def get_config(seeds: str = "runs/corpus/text/train"):
    config = ConfigDict({"seeds": seeds, "max_seeds": 100})
    config.recipe = ConfigDict({"kind": "Rephrase", "styles": ("medium", "qa")})
    config.endpoint = ConfigDict({"base_url": "http://127.0.0.1:8000/v1", "model": "smollm2"})
    config.sampling = ConfigDict({"temperature": 0.8, "max_tokens": 400})
    return config
