"""Raw text to a curated corpus, a tokenizer, and deterministic batches.

Everything is exported lazily, so that `import data` stays light: the module behind a name is imported when
the name is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from configs.lazy import lazy_exports

_HOME = {
    "Tokenizer": "data.tokenizer",
    "StreamDecoder": "data.tokenizer",
    "load_tokenizer": "data.load",
    "train_tokenizer": "data.tokenizer.training",
    "SpecialTokens": "data.tokenizer.training",
    "TextLimits": "data.tokenizer.training",
    "ChatTemplateError": "data.templates",
    "DEFAULT_CHAT_TEMPLATE": "data.chat",
    "write_dataset": "data.shards",
    "open_dataset": "data.shards",
    "Dataset": "data.shards",
    "DatasetError": "data.shards",
    "tokenize_dataset": "data.tokenize",
    "write_chat_dataset": "data.tokenize",
    "write_preference_dataset": "data.tokenize",
    "make_batches": "data.batches",
    "make_run_batches": "data.batches",
    "Reading": "data.batches",
    "Mixture": "data.mixture",
    "Phase": "data.mixture",
    "Balance": "data.mixture",
    "Curriculum": "data.mixture",
    "make_plan": "data.plan",
    "make_run_plan": "data.plan",
    "Problem": "data.tasks",
    "TaskSpec": "data.tasks",
    "curate": "data.curation",
    "Corpus": "data.corpus",
    "CorpusConfig": "data.corpus",
    "build_corpus": "data.corpus",
}

__all__ = [
    "Balance",
    "ChatTemplateError",
    "Corpus",
    "CorpusConfig",
    "Curriculum",
    "DEFAULT_CHAT_TEMPLATE",
    "Dataset",
    "DatasetError",
    "Mixture",
    "Phase",
    "Problem",
    "Reading",
    "SpecialTokens",
    "StreamDecoder",
    "TaskSpec",
    "TextLimits",
    "Tokenizer",
    "build_corpus",
    "curate",
    "load_tokenizer",
    "make_batches",
    "make_plan",
    "make_run_batches",
    "make_run_plan",
    "open_dataset",
    "tokenize_dataset",
    "train_tokenizer",
    "write_chat_dataset",
    "write_dataset",
    "write_preference_dataset",
]

if TYPE_CHECKING:
    from data.batches import Reading, make_batches, make_run_batches
    from data.chat import DEFAULT_CHAT_TEMPLATE
    from data.corpus import Corpus, CorpusConfig, build_corpus
    from data.curation import curate
    from data.load import load_tokenizer
    from data.mixture import Balance, Curriculum, Mixture, Phase
    from data.plan import make_plan, make_run_plan
    from data.shards import Dataset, DatasetError, open_dataset, write_dataset
    from data.tasks import Problem, TaskSpec
    from data.templates import ChatTemplateError
    from data.tokenize import tokenize_dataset, write_chat_dataset, write_preference_dataset
    from data.tokenizer import StreamDecoder, Tokenizer
    from data.tokenizer.training import SpecialTokens, TextLimits, train_tokenizer

__getattr__, __dir__ = lazy_exports(__name__, _HOME)
