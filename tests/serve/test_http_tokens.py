"""/tokenize and /detokenize against the tokenizer itself."""

import pytest

from .conftest import CHAT, SENTENCES, post

TEXT = SENTENCES[4]


def test_a_text_becomes_tokens_and_tokens_its_text(port, tokenizer):
    ids = [tokenizer.bos_id, *tokenizer.encode(TEXT)]
    assert post(port, {"prompt": TEXT}, "/tokenize") == (
        200,
        {"count": len(ids), "max_model_len": 64, "tokens": ids, "token_strs": None},
    )
    body = {"model": "tiny", "prompt": TEXT, "add_special_tokens": False, "return_token_strs": True}
    _, answer = post(port, body, "/tokenize")
    assert answer["tokens"] == ids[1:]
    assert answer["token_strs"] == [tokenizer.token_of(token) for token in ids[1:]]
    assert post(port, {"tokens": ids[1:]}, "/detokenize") == (200, {"prompt": TEXT})
    _, answer = post(port, {"tokens": ids}, "/detokenize")
    assert answer["prompt"] == tokenizer.token_of(tokenizer.bos_id) + TEXT
    assert post(port, {"tokens": []}, "/detokenize") == (200, {"prompt": ""})


def test_messages_become_the_prompt_of_a_chat(port, tokenizer):
    _, answer = post(port, {"messages": CHAT["messages"]}, "/tokenize")
    assert answer["tokens"] == tokenizer.apply_chat_template(CHAT["messages"])[0]
    _, chat = post(port, CHAT | {"max_tokens": 1})
    assert answer["count"] == chat["usage"]["prompt_tokens"]
    _, long = post(port, {"messages": [{"role": "user", "content": "x " * 1000}]}, "/tokenize")
    assert long["count"] > 1000  # more than the context has


@pytest.mark.parametrize(
    "path,body,param",
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": CHAT["messages"]}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"prompt": "a", "tools": []}, "tools"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": CHAT["messages"], "add_special_tokens": True}, "add_special_tokens"),
        ("/tokenize", {"messages": [{"role": "wizard", "content": "a"}]}, "messages[0].role"),
        ("/tokenize", {"prompt": "a", "spell": 1}, "spell"),
        ("/tokenize", b"[]", None),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [10**30]}, "tokens"),
        ("/detokenize", {"tokens": [True]}, "tokens[0]"),
        ("/detokenize", {"tokens": "5"}, "tokens"),
    ],
)
def test_wrong_fields_are_refused_by_name(port, path, body, param):
    status, answer = post(port, body, path)
    assert (status, answer["error"]["param"]) == (400, param), answer
    assert post(port, {"model": "gpt", "prompt": "a"}, "/tokenize")[0] == 404
