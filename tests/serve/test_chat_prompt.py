"""What a chat request asks of the chat template reaches it, or is refused by name."""

import copy
import json
import tarfile

import openai
import pytest

from serve.http.api import ChatBody, parse_body
from serve.http.chat_prompt import chat_prompt, template_arguments
from serve.http.errors import ApiError
from serve.parsers import form_of

from .conftest import serving

ASKED = {"role": "user", "content": "What is two plus two?"}
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": 2}'}}
TOLD = {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "4"}]}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
EACH = "{% for m in messages %}[{{ m.role }}|{{ m.content }}|{{ m.name }}|{{ m.tool_call_id }}|"
EACH += "{% for c in m.tool_calls %}{{ c.id }} {{ c.function.name }} {{ c.function.arguments | tojson }}"
EACH += "{% endfor %}]{% endfor %}"


def shown(tokenizer, template, tool_template=None, **fields):
    """The text that the model reads of a request's fields."""
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template, tokenizer.tool_template = template, tool_template
    body = parse_body(json.dumps({"model": "tiny", "messages": [ASKED]} | fields).encode(), ChatBody)
    form = form_of(template, tool_template)
    prompt = chat_prompt(body, template_arguments(body, tokenizer, form), tokenizer, form)
    body.choices()
    return tokenizer.decode(prompt.tokens, keep_special=True)


@pytest.mark.parametrize("said", [{"content": None}, {}])
def test_an_assistant_may_say_nothing_beside_its_tool_calls(tokenizer, said):
    messages = [ASKED, {"role": "assistant", "tool_calls": [CALL]} | said, TOLD]
    text = shown(tokenizer, EACH, messages=messages)
    call = 'c1 add {"a": 2, "b": 2}'
    assert text == f"[user|What is two plus two?|||][assistant||||{call}][tool|4||c1|]"


def test_names_and_parts_of_messages_reach_the_template(tokenizer):
    parts = [{"type": "text", "text": "What "}, {"type": "text", "text": "now?"}]
    messages = [{"role": "user", "name": "ann", "content": parts}]
    assert shown(tokenizer, EACH, messages=messages) == "[user|What now?|ann||]"


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_reasoning_of_earlier_answers_reaches_the_template(tokenizer, name):
    messages = [ASKED, {"role": "assistant", "content": "4", name: "Sum."}, ASKED]
    template = "{% for m in messages %}{{ m.reasoning_content }}{% endfor %}"
    assert shown(tokenizer, template, messages=messages) == "Sum."


EFFORT = "{{ reasoning_effort if reasoning_effort is defined else 'unset' }}"
SWITCH = "{{ enable_thinking if enable_thinking is defined else 'unset' }}"
OLD_SWITCH = "{% if thinking is not defined %}{% set thinking = 'unset' %}{% endif %}{{ thinking }}"
BOTH = EFFORT + SWITCH


@pytest.mark.parametrize(
    "template,effort,text",
    [
        (EFFORT, "high", "high"),
        (EFFORT, "none", "none"),
        (EFFORT, None, "unset"),
        (SWITCH, "none", "False"),
        (SWITCH, "low", "True"),
        (SWITCH, None, "unset"),
        (OLD_SWITCH, "none", "False"),
        (OLD_SWITCH, "medium", "True"),
        (BOTH, "none", "noneFalse"),
        (BOTH, "max", "maxTrue"),
    ],
)
def test_reasoning_effort_is_what_the_template_reads_of_it(tokenizer, template, effort, text):
    assert shown(tokenizer, template, reasoning_effort=effort) == text


def test_reasoning_effort_is_refused_where_the_template_reads_none(tokenizer):
    with pytest.raises(
        ApiError, match="reasoning_effort='low': this model's chat template has no such"
    ) as error:
        shown(tokenizer, "{{ messages[0].content }} {% set enable_thinking = 1 %}", reasoning_effort="low")
    assert (error.value.status, error.value.param) == (400, "reasoning_effort")
    assert shown(tokenizer, "{{ messages[0].content }}", reasoning_effort=None) == ASKED["content"]


def test_published_templates_take_reasoning_effort_as_their_models_have_it(shared, tokenizer):
    def of(file, effort):
        with tarfile.open(shared / "data" / "serving" / "chat_templates_llamacpp.tar.gz") as archive:
            template = archive.extractfile(file).read().decode()
        return shown(tokenizer, template, reasoning_effort=effort)

    assert "Reasoning: high" in of("openai-gpt-oss-120b.jinja", "high")
    assert "Reasoning: medium" in of("openai-gpt-oss-120b.jinja", None)  # its own default
    assert "<think>\n\n</think>" in of("Qwen-Qwen3-0.6B.jinja", "none")  # how Qwen3 is told not to think
    assert "<think>" not in of("Qwen-Qwen3-0.6B.jinja", "low")
    with pytest.raises(ApiError, match="no such setting"):
        of("google-gemma-2-2b-it.jinja", "low")


def test_tools_are_shown_where_no_call_is_wanted_and_the_template_reads_them(tokenizer):
    template = "{{ tools | tojson if tools else 'no tools' }}"
    plain = "{{ messages[0].content }}"
    assert json.loads(shown(tokenizer, template, tools=[TOOL], tool_choice="none")) == [TOOL]
    assert json.loads(shown(tokenizer, plain, template, tools=[TOOL], tool_choice="none")) == [TOOL]
    for choice in (None, "none", "auto"):
        assert shown(tokenizer, template, tools=[], tool_choice=choice) == "no tools"
    with pytest.raises(ApiError, match="shows no tools"):
        shown(tokenizer, plain, tools=[TOOL], tool_choice="none")
    with pytest.raises(ApiError, match="shows no tool calls"):
        shown(tokenizer, plain, messages=[ASKED, {"role": "assistant", "tool_calls": [CALL]}])


HERMES = '{{ tools | tojson }}{# <tool_call> "arguments" #}'
NAMED = {"type": "function", "function": {"name": "add"}}


@pytest.mark.parametrize(
    "fields,param,words",
    [
        ({"tools": [TOOL]}, "tools", "is not read here"),
        ({"tools": [TOOL], "tool_choice": "auto"}, "tools", "is not read here"),
        ({"tools": [TOOL], "tool_choice": "required"}, "tools", "is not read here"),
        ({"tools": [TOOL, TOOL]}, "tools", "same name"),
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"tool_choice": NAMED}, "tool_choice", "one of the tools by name"),
        ({"tools": [TOOL], "tool_choice": "must"}, "tool_choice", "one of the tools by name"),
        ({"tools": [TOOL], "tool_choice": {"type": "function"}}, "tool_choice", "one of the tools by name"),
    ],
)
def test_tools_that_can_not_be_called_are_refused_by_name(tokenizer, fields, param, words):
    with pytest.raises(ApiError, match=words) as error:
        shown(tokenizer, "{{ tools | tojson }}", **fields)
    assert (error.value.status, error.value.param) == (400, param)


def test_a_required_call_excludes_another_form_of_the_answer(tokenizer):
    assert json.loads(shown(tokenizer, HERMES, tools=[TOOL], tool_choice="required")) == [TOOL]
    with pytest.raises(ApiError, match="together with a form"):
        fields = {"tools": [TOOL], "tool_choice": NAMED, "response_format": {"type": "json_object"}}
        shown(tokenizer, HERMES, **fields)


def test_variables_of_the_template_can_be_set_within_bounds(tokenizer):
    kwargs = {"chat_template_kwargs": {"enable_thinking": False}}
    assert shown(tokenizer, SWITCH, **kwargs) == "False"
    assert shown(tokenizer, SWITCH, chat_template_kwargs={}) == "unset"
    for template, bad in (
        (SWITCH, {"other": 1}),
        ("{{ messages }}", {"messages": "x"}),
        ("{{ bos_token }}", {"bos_token": "x"}),
        (SWITCH, {"enable_thinking": "x" * 5000}),
    ):
        with pytest.raises(ApiError) as error:
            shown(tokenizer, template, chat_template_kwargs=bad)
        assert error.value.status == 400 and error.value.param.startswith("chat_template_kwargs.")
    with pytest.raises(ApiError):
        shown(tokenizer, SWITCH, chat_template_kwargs={"enable_thinking": [1]})


TURNS = "{% for m in messages %}<{{ m.role }}>{{ m.content }};{% endfor %}"
TURNS += "{% if add_generation_prompt %}<assistant>{% endif %}"
THINKS = TURNS + "{% if add_generation_prompt %}<think>\n{% endif %}{# </think> #}"
MAY_THINK = TURNS + "{# </think> #}"


@pytest.mark.parametrize(
    "template,last,text",
    [
        (TURNS, {"content": "4, I "}, "<assistant>4, I "),
        (TURNS, {"content": "<|im_end|>"}, "<assistant><|im_end|>"),  # text, and no token that ends a turn
        (THINKS, {"content": "4", "reasoning_content": "Sum."}, "<assistant><think>\nSum.\n</think>\n\n4"),
        (MAY_THINK, {"content": "4", "reasoning_content": "Sum."}, "<assistant><think>\nSum.\n</think>\n\n4"),
        (MAY_THINK, {"content": "4"}, "<assistant>4"),
    ],
)  # fmt: skip
def test_the_last_message_is_continued_as_the_model_would_have_written_it(tokenizer, template, last, text):
    messages = [ASKED, {"role": "assistant"} | last]
    fields = {"messages": messages, "continue_final_message": True, "add_generation_prompt": False}
    prompt = shown(tokenizer, template, **fields)
    assert prompt == f"<user>{ASKED['content']};" + text
    assert shown(tokenizer, template, **fields | {"add_generation_prompt": None}) == prompt


@pytest.mark.parametrize(
    "fields,param",
    [
        ({"continue_final_message": True}, "continue_final_message"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"add_generation_prompt": False}, "add_generation_prompt"),
        (
            {
                "continue_final_message": True,
                "messages": [ASKED, {"role": "assistant", "tool_calls": [CALL]}],
            },
            "continue_final_message",
        ),
    ],
)
def test_a_continuation_that_can_not_be_is_refused(tokenizer, fields, param):
    with pytest.raises(ApiError) as error:
        shown(tokenizer, TURNS, **fields)
    assert (error.value.status, error.value.param) == (400, param)


UNREAD = {
    "user": "ann", "metadata": {"a": "b"}, "store": True, "service_tier": "flex", "safety_identifier": "x",
    "prompt_cache_key": "x", "prompt_cache_retention": "24h", "parallel_tool_calls": False,
    "prediction": {"type": "content", "content": "4"},
}  # fmt: skip
DEFAULTS = {
    "audio": None, "echo": False, "best_of": 1, "stop": "", "repetition_penalty": 1.0, "chat_template_kwargs": {},
    "length_penalty": 1.0, "use_beam_search": False, "skip_special_tokens": True, "anything_null": None,
    "structured_outputs": None, "frequency_penalty": 0.0, "function_call": "auto", "functions": [], "logit_bias": {},
    "modalities": ["text"], "presence_penalty": 0, "response_format": {"type": "text"}, "verbosity": "medium",
    "web_search_options": None, "tools": [], "tool_choice": "auto", "reasoning_effort": None, "top_logprobs": 0,
}  # fmt: skip
UNSERVED = {
    "audio": {"voice": "alloy", "format": "wav"}, "function_call": {"name": "f"}, "functions": [{"name": "f"}],
    "modalities": ["text", "audio"], "verbosity": "high", "web_search_options": {}, "skip_special_tokens": False,
    "tool_choice": "required", "reasoning_effort": "high", "use_beam_search": True,
}  # fmt: skip


@pytest.mark.parametrize("name", [*UNREAD, *DEFAULTS])
def test_what_changes_no_answer_passes(tokenizer, name):
    value = (UNREAD | DEFAULTS)[name]
    assert shown(tokenizer, "{{ messages[0].content }}", **{name: value}) == ASKED["content"]


@pytest.mark.parametrize("name", UNSERVED)
def test_what_would_change_an_answer_and_is_not_served_is_refused_by_name(tokenizer, name):
    with pytest.raises(ApiError, match=name) as error:
        shown(tokenizer, "{{ messages[0].content }}", **{name: UNSERVED[name]})
    assert (error.value.status, error.value.param) == (400, name)


@pytest.fixture(scope="module")
def client(make_engine):
    with serving(make_engine()) as port:
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
            yield client


def test_the_official_client_sends_back_what_it_was_answered(client):
    sizes = {"model": "tiny", "max_tokens": 3, "temperature": 0}
    first = client.chat.completions.create(messages=[{"role": "user", "content": "Hi"}], **sizes)
    said = first.choices[0].message
    messages = [{"role": "user", "content": "Hi"}, said, {"role": "user", "content": "So?"}]
    second = client.chat.completions.create(messages=messages, **sizes)
    plain = [*messages[:1], {"role": "assistant", "content": said.content}, messages[2]]
    again = client.chat.completions.create(messages=plain, **sizes)
    assert second.usage.prompt_tokens == again.usage.prompt_tokens
    assert second.choices[0].message == again.choices[0].message
    dumped = client.chat.completions.create(messages=[messages[0], said.model_dump(), messages[2]], **sizes)
    assert dumped.usage.prompt_tokens == again.usage.prompt_tokens


def test_a_dialogue_with_tool_calls_is_answered(make_engine, tokenizer):
    engine = make_engine()
    engine.tokenizer = copy.copy(tokenizer)
    engine.tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content or m.tool_calls[0].id }}{% endfor %}{{ reasoning_effort }}"
    )
    messages = [ASKED, {"role": "assistant", "content": None, "tool_calls": [CALL]}, TOLD]
    with serving(engine) as port:
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
            options = {"model": "tiny", "messages": messages, "max_tokens": 2}
            answer = client.chat.completions.create(**options, reasoning_effort="high")
    assert answer.usage.prompt_tokens == len(tokenizer.encode(ASKED["content"] + "c14high"))
