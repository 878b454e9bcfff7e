"""How an embedder's files say that hidden states become one vector: modules.json of sentence-transformers, and GGUF's
pooling_type (llama.cpp)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from configs import ConfigError
from configs.paths import resolve_model
from model.formats.gguf import container

_MODULES = ("Transformer", "Pooling", "Normalize")  # others, such as Dense, change the vectors
_MODES = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
}
_TYPES = {1: "mean", 2: "cls", 3: "last"}  # of llama.cpp


def pooling_of(path: str) -> str:
    """The `pooling` that model.embed.embed takes; "mean" where the files say nothing.

    Raises ConfigError that names what the files ask for where `embed` has no such pooling.
    """
    found = resolve_model(path)
    if found.kind == "gguf":
        return _of_gguf(found.weights)
    listing = found.weights / "modules.json"
    if not listing.is_file():
        return "mean"
    folders = []
    for module in json.loads(listing.read_text(encoding="utf-8")):
        kind = module["type"].rsplit(".", 1)[-1]
        if kind not in _MODULES:
            raise ConfigError(f"{listing}: wants the module {kind}; known are {', '.join(_MODULES)}.")
        if kind == "Pooling":
            folders.append(found.weights / module["path"] / "config.json")
    if not folders:
        return "mean"
    return _mode(folders[0], json.loads(folders[0].read_text(encoding="utf-8")))


def _mode(file: Path, config: dict[str, Any]) -> str:
    wanted = [key for key, value in config.items() if key.startswith("pooling_mode_") and value]
    if len(wanted) != 1 or wanted[0] not in _MODES:
        raise ConfigError(
            f"{file}: wants {', '.join(wanted) or 'no pooling'}; wanted one of {', '.join(_MODES)}."
        )
    return _MODES[wanted[0]]


def _of_gguf(file: Path) -> str:
    metadata = container.read(file).metadata
    key = f"{metadata['general.architecture']}.pooling_type"
    value = metadata.get(key, 1)
    if value not in _TYPES:
        raise ConfigError(f"{file}: {key}={value}; known are 1 (mean), 2 (first token) and 3 (last token).")
    return _TYPES[value]
