"""A SentencePiece model as a tokenizer.json, for software that reads nothing else."""

from __future__ import annotations

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from data.tokenizer.huggingface import HuggingFaceTokenizer
from data.tokenizer.sentencepiece import SentencePieceTokenizer, parse_model

_SPACE = "\u2581"


def huggingface_tokenizer(tokenizer: SentencePieceTokenizer) -> HuggingFaceTokenizer:
    """The same ids from the `tokenizers` library, save for a text that holds the character U+2581 itself, and one that
    begins with a space where a space mark goes before the start alone (Metaspace puts none before another).

    Where two ways to cut a text have the same score under a unigram model, such as a run of spaces, the library may
    take the other one.

    Raises ValueError for a model that normalises text.
    """
    proto = parse_model(tokenizer.model)
    spec = proto.normalizer_spec
    if spec.precompiled_charsmap or spec.remove_extra_whitespaces:
        raise ValueError(f"the SentencePiece model normalises text ({spec.name}); keep its .model file")
    build = {proto.trainer_spec.BPE: _bpe, proto.trainer_spec.UNIGRAM: _unigram}.get(
        proto.trainer_spec.model_type
    )
    if build is None:
        raise ValueError("the SentencePiece model is neither BPE nor unigram")
    backend = build(proto)
    if spec.add_dummy_prefix and not tokenizer.prefix_after_special:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        prepend = [normalizers.Prepend(_SPACE)] if spec.add_dummy_prefix else []
        backend.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", _SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if spec.add_dummy_prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    own = [p.piece for p in proto.pieces if p.type == p.USER_DEFINED]
    backend.add_tokens([AddedToken(piece, special=False, normalized=False) for piece in own])
    added = {word.id: _added(name, word[1:], special=False) for name, word in tokenizer.words.items()}
    for name, i in tokenizer.added_tokens.items():
        left, right = tokenizer.strips.get(name, (False, False))
        added[i] = _added(name, (left, right, name in tokenizer._single_words), special=True)
    for i, token in sorted(added.items()):
        backend.add_tokens([token])
        if backend.token_to_id(token.content) != i:
            raise ValueError(f"tokenizer.json can't give the added token {token.content!r} the id {i}")
    names = {"bos": tokenizer.bos_id, "pad": tokenizer.pad_id}
    made = HuggingFaceTokenizer(
        backend,
        special_tokens=sorted(tokenizer.special_tokens, key=tokenizer.special_tokens.__getitem__),
        eos=[name for i in tokenizer.eos_ids if (name := tokenizer.special_name(i))],
        chat_template=tokenizer.chat_template,
        roles=tokenizer.roles,
        around=tokenizer.around,
        **{role: tokenizer.special_name(i) for role, i in names.items()},
    )
    made.tool_template = tokenizer.tool_template
    return made


def _added(name: str, flags: tuple[bool, ...], special: bool) -> AddedToken:
    left, right, alone = flags
    return AddedToken(name, special=special, normalized=False, lstrip=left, rstrip=right, single_word=alone)


def _bpe(proto) -> tokenizers.Tokenizer:
    """Every way to cut a piece in two pieces is a merge; the whole's score is its priority."""
    ids = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    ordinary = {p.piece: p.score for p in proto.pieces if p.type in (p.NORMAL, p.UNUSED)}
    merges = []
    for whole, score in ordinary.items():
        for cut in range(1, len(whole)):
            left, right = whole[:cut], whole[cut:]
            if left in ordinary and right in ordinary:
                merges.append((-score, ids[left], ids[right], left, right))
    merges.sort()
    unknown = next(p.piece for p in proto.pieces if p.type == p.UNKNOWN)
    model = models.BPE(
        ids,
        [(left, right) for *_, left, right in merges],
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=proto.trainer_spec.byte_fallback,
    )
    return tokenizers.Tokenizer(model)


def _unigram(proto) -> tokenizers.Tokenizer:
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    unknown = next(i for i, p in enumerate(proto.pieces) if p.type == p.UNKNOWN)
    return tokenizers.Tokenizer(
        models.Unigram(pieces, unknown, byte_fallback=proto.trainer_spec.byte_fallback)
    )
