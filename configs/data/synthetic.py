"""Documents said again by a served model, for `python -m data.synthetic --workdir=runs/synthetic`; give
--config.endpoint.base_url=http://HOST:PORT/v1 and --config.endpoint.model=NAME."""

from ml_collections import ConfigDict


def get_config():
    corpus = "runs/corpus/text/train"
    recipes = ({"kind": "Rephrase", "styles": ("medium", "qa")}, {"kind": "QuestionAnswer", "count": 3})
    endpoint = {"base_url": "http://127.0.0.1:8000/v1", "model": "model"}
    return ConfigDict(
        {"seeds": corpus, "recipes": recipes, "endpoint": endpoint, "real": corpus, "max_share": 0.5}
    )
