"""text_offset of completions, against where the bytes of each token lie in the text."""

import codecs
import random
from types import SimpleNamespace

import pytest

from data import StreamDecoder
from serve.http.replies import CompletionReply

from .conftest import post, serving

TEXTS = ["a 🙂🙃 b", "東京🙂", "x🙂"]


def starts(pieces):
    """(text, the index of the character in which each piece begins), from the bytes of all pieces together."""
    raw, wrong = b"".join(pieces), {}

    def replace(error):
        wrong[error.start] = error.end
        return "\ufffd", error.end

    codecs.register_error("recording", replace)
    text, at, places = raw.decode("utf-8", "recording"), 0, []
    while at < len(raw):
        lead = raw[at]
        end = wrong.get(at, at + 1 + (lead >= 0xC0) + (lead >= 0xE0) + (lead >= 0xF0))
        places += [(at, end)]
        at = end
    index = [i for i, (start, end) in enumerate(places) for _ in range(start, end)] + [len(places)]
    assert len(places) == len(text)
    offsets, at = [], 0
    for piece in pieces:
        # One without bytes stands where the text goes on, or where a character is that is still open.
        open_ = at and codecs.getincrementaldecoder("utf-8")("replace")
        pending = open_ and (open_.decode(raw[:at]), open_.getstate()[0])[1]
        offsets.append(index[at - 1] if not piece and pending else index[at])
        at += len(piece)
    return text, offsets


def output(tokens, prompt):
    """As the engine gives it."""
    zeros = [0.0] * len(tokens)
    fields = {
        "tokens": tokens,
        "model_logprobs": zeros,
        "top_logprobs": [],
        "stop_reason": None,
        "cached_tokens": 0,
    }
    fields |= {
        "prompt_logprobs": [0.0] * (len(prompt) - 1),
        "prompt_top_logprobs": [],
        "finish_reason": "length",
    }
    return fields | {"num_tokens": len(tokens)}


def sequences(tokenizer, count=300):
    """Tokens of texts with characters of several tokens, some left out, doubled or special."""
    rng = random.Random(0)
    known = [id for text in TEXTS for id in tokenizer.encode(text)]
    for _ in range(count):
        ids = tokenizer.encode("".join(rng.choices(TEXTS, k=3)))
        for _ in range(rng.randrange(4)):
            at = rng.randrange(len(ids))
            ids[at : at + rng.randrange(2)] = rng.choices([tokenizer.bos_id, *known], k=rng.randrange(3))
        yield ids or [known[0]]


@pytest.mark.parametrize("echo", [False, True])
def test_offsets_are_where_each_tokens_bytes_lie_in_the_text(tokenizer, echo):
    split = 0
    for i, ids in enumerate(sequences(tokenizer)):
        cut = 1 + i % len(ids)
        prompt, answer = (ids[:cut], ids[cut:]) if echo else ([1], ids)
        parts = [
            [tokenizer.bytes_of(token) for token in part]
            for part in ((prompt, answer) if echo else (answer,))
        ]
        text, offsets = "", []
        for part in parts:
            more, places = starts(part)
            offsets += [len(text) + place for place in places]
            text += more
        decoder = StreamDecoder(tokenizer, continuation=True)
        said = "".join(map(decoder.push, answer)) + decoder.finish()
        out = SimpleNamespace(**output(answer, prompt), text=said)
        reply = CompletionReply("tiny", tokenizer, [prompt], True, echo)
        [choice] = reply.whole([out])["choices"]
        assert choice["text"] == text
        assert choice["logprobs"]["text_offset"] == offsets, (parts, text)
        split += len(set(offsets)) < len(offsets)
    assert split > 100


def test_a_stream_has_the_offsets_of_the_whole(tokenizer):
    for ids in sequences(tokenizer, 50):
        _, offsets = starts([tokenizer.bytes_of(token) for token in ids])
        reply, streamed = CompletionReply("tiny", tokenizer, [[1]], True), []
        for i in range(0, len(ids), 3):
            so_far, new = ids[: i + 3], ids[i : i + 3]
            more = {"new_tokens": new, "new_text": "", "finished": False}
            for chunk in reply.chunks(0, SimpleNamespace(**output(so_far, [1]) | more)):
                streamed += chunk["choices"][0]["logprobs"]["text_offset"]
        assert streamed == offsets


def test_alternatives_that_are_parts_of_characters_keep_names_of_their_own(tokenizer):
    parts = [token for token in range(tokenizer.vocab_size) if tokenizer.bytes_of(token)[:1] >= b"\x80"]
    parts = [token for token in parts if "\ufffd" in tokenizer.bytes_of(token).decode("utf-8", "replace")][:5]
    out = output([parts[0]], [1]) | {"top_logprobs": [[(token, -float(i)) for i, token in enumerate(parts)]]}
    reply = CompletionReply("tiny", tokenizer, [[1]], True)
    [choice] = reply.whole([SimpleNamespace(**out | {"model_logprobs": [0.0], "text": ""})])["choices"]
    names = ["bytes:" + "".join(f"\\x{byte:02x}" for byte in tokenizer.bytes_of(token)) for token in parts]
    assert choice["logprobs"]["top_logprobs"] == [dict(zip(names, (0.0, -1.0, -2.0, -3.0, -4.0)))]
    assert choice["logprobs"]["tokens"] == names[:1]


def test_an_echoed_prompt_that_ends_within_a_character_keeps_its_offsets(make_engine, tokenizer):
    ids = [tokenizer.bos_id, *tokenizer.encode("a 🙂")][:-1]
    with serving(make_engine(prompt_logprobs=True)) as port:
        body = {
            "model": "tiny",
            "prompt": ids,
            "echo": True,
            "logprobs": 0,
            "max_tokens": 6,
            "ignore_eos": True,
        }
        _, answer = post(port, body, "/v1/completions")
    [choice] = answer["choices"]
    text, offsets = choice["text"], choice["logprobs"]["text_offset"]
    prompt = tokenizer.decode(ids)
    assert text.startswith(prompt) and prompt.endswith("\ufffd")
    assert offsets[len(ids)] == len(prompt) and offsets[len(ids) - 1] == len(prompt) - 1


def test_spaces_that_decoding_takes_away_do_not_count(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "_cleans_up", True)
    ids = [token for word in ("Hello", " ", "you", " .", " So", " ?") for token in tokenizer.encode(word)]
    decoder, text, found = StreamDecoder(tokenizer, continuation=True), "", []
    for token in ids:
        found.append((len(text) + decoder.start_of(token), tokenizer.bytes_of(token).decode().strip()))
        text += decoder.push(token)
    text += decoder.finish()
    assert text == "Hello you. So?"
    for at, piece in found:
        assert text[at:].lstrip().startswith(piece), (at, piece)
