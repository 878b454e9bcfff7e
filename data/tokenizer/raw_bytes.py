"""Raw bytes as tokens: byte b is the id b + offset, after the special tokens (Pagnoni et al. 2024, arXiv:2412.09871,
has offset 4)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from configs.files import atomic_write
from data.tokenizer.interface import Tokenizer

MARK = "byte_offset"  # the key of tokenizer_config.json that says that a folder is one of these


class ByteTokenizer(Tokenizer):
    """The bytes of UTF-8, one id each. `offset`: the id of byte 0, by default the number of special tokens."""

    def __init__(
        self,
        special_tokens: Sequence[str] = (),
        *,
        offset: int | None = None,
        bos: str | None = None,
        eos: Iterable[str] = (),
        pad: str | None = None,
        chat_template: str | None = None,
    ):
        """Raises ValueError for more special tokens than the offset has room for, or a role that is none of them."""
        self.offset = len(special_tokens) if offset is None else offset
        if len(special_tokens) > self.offset:
            raise ValueError(f"offset={self.offset} has no room for {len(special_tokens)} special tokens")
        ids = {name: i for i, name in enumerate(special_tokens)}
        if missing := [name for name in (bos, *eos, pad) if name is not None and name not in ids]:
            raise ValueError(f"{missing} are not among the special tokens {list(ids)}")
        self.vocab_size = self.offset + 256
        roles = [None if name is None else ids[name] for name in (bos, pad)]
        self._set_specials(ids, roles[0], [ids[name] for name in eos], roles[1], chat_template)

    def _encode(self, texts: list[str], continuation: bool) -> list[list[int]]:
        return [
            (np.frombuffer(t.encode("utf-8"), np.uint8).astype(np.int32) + self.offset).tolist()
            for t in texts
        ]

    def _without_specials(self, ids: list[int], text: str) -> list[int]:
        return ids  # a byte is never a special token

    def token_of(self, token_id: int) -> str:
        from data.tokenizer.spellings import byte_alphabet

        self._check(token_id)
        if token_id >= self.offset:
            return {b: c for c, b in byte_alphabet().items()}[token_id - self.offset]
        return self.special_name(token_id) or f"<unused {token_id}>"

    def bytes_of(self, token_id: int) -> bytes:
        self._check(token_id)
        return bytes([token_id - self.offset]) if token_id >= self.offset else b""

    def decode(self, ids: Iterable[int], keep_special: bool = False) -> str:
        ids = np.asarray(list(ids), np.int64)
        if keep_special or not len(ids):
            return super().decode(ids.tolist(), keep_special)
        self._check(int(ids.min()))
        self._check(int(ids.max()))
        kept = ids[ids >= self.offset] - self.offset
        return kept.astype(np.uint8).tobytes().decode("utf-8", "replace")

    def _check(self, token_id: int) -> None:
        if not 0 <= token_id < self.vocab_size:
            raise ValueError(f"token id {token_id} is outside the vocabulary of {self.vocab_size}")

    @property
    def backend(self):
        """The same ids from the `tokenizers` library, for others to read: byte-level BPE without merges."""
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers

        vocabulary = {self.token_of(i): i for i in range(self.vocab_size)}
        backend = tokenizers.Tokenizer(models.BPE(vocabulary, []))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens(list(self.special_tokens))
        return backend

    def _save_vocabulary(self, folder: Path) -> dict[str, Any]:
        atomic_write(folder / "tokenizer.json", self.backend.to_str(pretty=True))
        return {"tokenizer_class": "PreTrainedTokenizerFast", MARK: self.offset}
