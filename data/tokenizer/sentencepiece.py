"""SentencePiece tokenizers (BPE and unigram): our own lossless ones, a Hugging Face tokenizer.model, or
pieces from a GGUF file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from configs.files import atomic_write
from data.tokenizer.huggingface import piece_bytes
from data.tokenizer.interface import Tokenizer

_META_SPACE = "\u2581"


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model behind our interface. Kudo and Richardson 2018, arXiv:1808.06226.

    SentencePiece itself spells a space as '▁' and so can't tell the two apart; here a '▁' in the text is
    written as its three bytes, and text survives unchanged when the model's own normalisation is the
    identity.
    """

    def __init__(
        self,
        model: bytes,
        *,
        added_tokens: Mapping[str, int] | None = None,
        bos: str | None = None,
        eos: Iterable[str] = (),
        pad: str | None = None,
        chat_template: str | None = None,
        strips: Mapping[str, tuple[bool, bool]] | None = None,
    ):
        """`model`: a serialised ModelProto. `added_tokens`: special tokens beside the model's control pieces.

        Raises ValueError for bytes that are not a model and names that the vocabulary lacks.
        """
        proto = parse_model(model)
        self._model = model
        self._processor = _processor(model)
        self._prefix = proto.normalizer_spec.add_dummy_prefix
        self._strip_leading_space = self._prefix
        proto.normalizer_spec.add_dummy_prefix = False
        self._continuation = _processor(proto.SerializeToString()) if self._prefix else self._processor
        added = dict(added_tokens or {})
        ids = {piece.piece: i for i, piece in enumerate(proto.pieces)} | added
        special = {p.piece: i for i, p in enumerate(proto.pieces) if p.type == p.CONTROL} | added
        self._tokens = {i: piece.piece for i, piece in enumerate(proto.pieces)} | {
            i: t for t, i in added.items()
        }
        self._bytes = {i: piece_bytes(piece.piece) for i, piece in enumerate(proto.pieces)}
        for i, piece in enumerate(proto.pieces):
            if piece.type == piece.UNKNOWN:
                self._bytes[i] = "\ufffd".encode()
        self._byte_ids = {p.piece: i for i, p in enumerate(proto.pieces) if p.type == p.BYTE}
        self.vocab_size = max(self._tokens) + 1

        def id_of(name: str | None) -> int | None:
            if name is not None and name not in ids:
                raise ValueError(f"token {name!r} is not in the vocabulary")
            return None if name is None else ids[name]

        self._set_specials(special, id_of(bos), [id_of(t) for t in eos], id_of(pad), chat_template, strips)
        self._added = added

    @property
    def model(self) -> bytes:
        """The serialised ModelProto."""
        return self._model

    @property
    def added_tokens(self) -> dict[str, int]:
        """Special tokens beside the model's own pieces."""
        return dict(self._added)

    def _encode(self, texts: list[str], continuation: bool) -> list[list[int]]:
        for text in texts:
            text.encode("utf-8")
        processor = self._continuation if continuation else self._processor
        if not self._byte_ids or not any(_META_SPACE in text for text in texts):
            return processor.encode(texts)
        return [self._encode_with_meta_space(text, processor) for text in texts]

    def _encode_with_meta_space(self, text: str, processor: Any) -> list[int]:
        as_bytes = [self._byte_ids[f"<0x{b:02X}>"] for b in _META_SPACE.encode()]
        first, *rest = text.split(_META_SPACE)
        ids = processor.encode(first)
        for part in rest:
            ids += as_bytes + self._continuation.encode(part)
        return ids

    def token_of(self, token_id: int) -> str:
        if not 0 <= token_id < self.vocab_size:
            raise ValueError(f"token id {token_id} is outside the vocabulary of {self.vocab_size}")
        return self._tokens.get(token_id, f"<unused {token_id}>")

    def bytes_of(self, token_id: int) -> bytes:
        if not 0 <= token_id < self.vocab_size:
            raise ValueError(f"token id {token_id} is outside the vocabulary of {self.vocab_size}")
        return b"" if token_id in self._special_ids else self._bytes.get(token_id, b"")

    def _save_vocabulary(self, folder: Path) -> dict[str, Any]:
        atomic_write(folder / "tokenizer.model", self._model)
        return {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_prefix_space": bool(self._prefix)}


def parse_model(model: bytes):
    """The ModelProto in `model`. Raises ValueError when it is none."""
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2 as pb

    try:
        proto = pb.ModelProto.FromString(model)
    except DecodeError as error:
        raise ValueError(f"not a SentencePiece model ({len(model)} bytes): {error}") from error
    if not proto.pieces:
        raise ValueError(f"not a SentencePiece model ({len(model)} bytes): it has no pieces")
    return proto


def _processor(model: bytes):
    import sentencepiece

    try:
        return sentencepiece.SentencePieceProcessor(model_proto=model)
    except (RuntimeError, OSError) as error:
        raise ValueError(f"not a usable SentencePiece model ({len(model)} bytes): {error}") from error
