"""Where a model is: the one reading of `init_from`, `model` and `--model` for every stage."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
from pathlib import Path
from typing import Literal

from configs.typed import ConfigError, nearest

MARKER = Path("meta") / "model.json"  # in a native checkpoint; its "format" is "crucible"
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "merges.txt"),
    *("spiece.model", "sentencepiece.bpe.model", "spm.model"),
)


@dataclasses.dataclass(frozen=True)
class ModelPath:
    """A model that was found.

    `weights` is the checkpoint's folder, the Hugging Face folder or the GGUF file; `tokenizer` the folder or
    GGUF file that has its tokenizer, or None; `step` the checkpoint's number, when it has one.
    """

    kind: Literal["native", "huggingface", "gguf"]
    weights: Path
    tokenizer: Path | None
    step: int | None


def resolve_model(path: str | os.PathLike) -> ModelPath:
    """Finds the model that `path` means.

    A run folder (its newest complete checkpoint), a `checkpoints` folder, one checkpoint or native save, a
    Hugging Face folder, or a .gguf file. Raises ConfigError that says what was looked for and what is there.
    """
    if re.match(r"\w+://", os.fspath(path)):
        raise ConfigError(
            f"{path}: a model is read from a file system. Mount the bucket (gcsfuse, mountpoint-s3), and give the "
            "folder that it is mounted at."
        )
    path = Path(path).expanduser()
    if not path.exists():
        raise ConfigError(f"{path}: no such file or folder. {_siblings(path)}")
    if path.is_file():
        return _resolve_file(path)
    if (path / MARKER).is_file():
        return _native(path)
    for folder in (path / "checkpoints", path):
        if folder.name == "checkpoints" and folder.is_dir():
            if steps := complete_steps(folder):
                return _native(folder / str(steps[-1]))
            raise ConfigError(f"{path}: no complete checkpoint in {folder}. {_listing(folder)}")
    if _is_huggingface(path):
        has_tokenizer = any((path / name).exists() for name in TOKENIZER_FILES)
        return ModelPath("huggingface", path, path if has_tokenizer else None, None)
    ggufs = sorted(path.glob("*.gguf"))
    hint = f" To load a GGUF file give the file itself, e.g. {ggufs[0]}." if ggufs else ""
    raise ConfigError(
        f"{path}: no model found. Looked for checkpoints/<step>/ (a run folder), {MARKER} (a checkpoint), "
        f"and config.json with a model_type (a Hugging Face folder). {_listing(path)}{hint}"
    )


def complete_steps(checkpoints: str | os.PathLike) -> list[int]:
    """The steps whose checkpoints in this folder are complete, ascending.

    A checkpoint is written under a temporary name and renamed, so a folder named by a number that has the
    marker file is complete; names such as `30.orbax-checkpoint-tmp` are passed over.
    """
    folders = [item for item in Path(checkpoints).iterdir() if _is_step(item.name)]
    return sorted(int(folder.name) for folder in folders if (folder / MARKER).is_file())


def installed_file(package: str, pattern: str) -> Path | None:
    """The first file that matches `pattern` in an installed package, which is not imported, or None."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        return None
    folders = [Path(folder) for folder in spec.submodule_search_locations or []]
    found = sorted(item for folder in folders for item in folder.glob(pattern))
    return found[0] if found else None


def _resolve_file(path: Path) -> ModelPath:
    with open(path, "rb") as file:
        magic = file.read(4)
    if magic == b"GGUF":
        return ModelPath("gguf", path, path, None)
    if path.suffix == ".gguf":
        raise ConfigError(f"{path}: is named .gguf but begins with {magic!r}, not with 'GGUF'.")
    raise ConfigError(f"{path}: is no GGUF file. Give a .gguf file, or the folder {path.parent} of a model.")


def _native(folder: Path) -> ModelPath:
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{folder / MARKER}: not JSON: {error}") from None
    if not isinstance(marker, dict) or marker.get("format") != "crucible":
        found = marker.get("format") if isinstance(marker, dict) else marker
        raise ConfigError(f"{folder / MARKER}: format is {found!r}; wanted 'crucible'.")
    is_step = _is_step(folder.name)
    candidates = [folder / "tokenizer"]
    if is_step and folder.parent.name == "checkpoints":
        candidates.append(folder.parent.parent / "tokenizer")
    tokenizer = next((item for item in candidates if item.is_dir() and any(item.iterdir())), None)
    return ModelPath("native", folder, tokenizer, int(folder.name) if is_step else None)


def _is_step(name: str) -> bool:
    return re.fullmatch("0|[1-9][0-9]*", name) is not None


def _is_huggingface(folder: Path) -> bool:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and "model_type" in config


def _siblings(path: Path) -> str:
    folder = next((parent for parent in path.parents if parent.is_dir()), Path("."))
    names = [str(folder / item.name) for item in folder.iterdir()] if folder == path.parent else []
    if close := nearest(str(path), names):
        return "Did you mean " + " or ".join(close) + "?"
    return _listing(folder)


def _listing(folder: Path) -> str:
    names = sorted(item.name + ("/" if item.is_dir() else "") for item in folder.iterdir())
    shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    return f"In {folder.resolve()} there is: {shown or 'nothing'}."
