"""What can be done with conversations on the chat page; a written-down server answers."""

import json
import re

import pytest

from serve.page import chat_page

THOUGHT = {"reasoning_content": "First, *think*."}


def chunk(delta, finish=None, tokens=1):
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return {"choices": [choice], "usage": {"completion_tokens": tokens}}


class Server:
    """Answers each request in turn with the next of `answers`: a text, a list of chunks, or (status, error)."""

    def __init__(self, *answers):
        self.answers, self.bodies = list(answers), []
        self.page, self.policy = chat_page()

    def __call__(self, page):
        page.route("**/*", self.answer)

    def answer(self, route):
        url = route.request.url
        if url.endswith("/v1/models"):
            return route.fulfill(json={"data": [{"id": "tiny"}]})
        if not url.endswith("/v1/chat/completions"):
            headers = {"Content-Security-Policy": self.policy, "Content-Type": "text/html; charset=utf-8"}
            return route.fulfill(body=self.page, headers=headers)
        self.bodies.append(route.request.post_data_json)
        answer = self.answers.pop(0)
        if isinstance(answer, tuple):
            return route.fulfill(status=answer[0], json={"error": answer[1]})
        if isinstance(answer, str):
            answer = [chunk({"content": part}) for part in re.findall(r"(?s).{1,5}", answer)]
            answer.append(chunk({}, "stop", 7))
        body = "".join(f"data: {json.dumps(each)}\n\n" for each in answer)
        return route.fulfill(body=body + "data: [DONE]\n\n", content_type="text/event-stream")

    def said(self, i=-1):
        return [(message["role"], message["content"]) for message in self.bodies[i]["messages"]]


@pytest.fixture
def talk(open_page):
    """A page whose server gives these answers."""

    def start(*answers, **options):
        server = Server(*answers)
        page = open_page("http://localhost:9/", route=server, **options)
        page.wait_for_function("() => document.title.startsWith('tiny')")
        return page, server

    return start


def ask(page, text):
    page.get_by_label("Message").fill(text)
    page.get_by_label("Message").press("Enter")
    done(page)


def done(page):
    page.wait_for_function("() => running === null")


def press(page, name, message=".assistant"):
    page.locator(message).last.get_by_role("button", name=name, exact=True).click()


def texts(page):
    return [each.strip() for each in page.locator(".message .body").all_text_contents()]


def test_an_edited_question_is_asked_again_without_what_came_after(talk):
    page, server = talk("one", "two", "three")
    ask(page, "first")
    ask(page, "second")
    page.locator(".user").first.get_by_role("button", name="Edit").click()
    page.get_by_label("Edited text").fill("better")
    page.get_by_role("button", name="Save and ask").click()
    done(page)
    assert server.said() == [("user", "better")] and texts(page) == ["better", "three"]
    page.locator(".user").get_by_role("button", name="Edit").click()
    page.get_by_label("Edited text").press("Escape")
    assert texts(page) == ["better", "three"] and len(server.bodies) == 3


def test_an_answer_can_be_written_again_and_all_versions_stay(talk):
    page, server = talk("one", "two", (400, {"message": "broken", "code": None}), "after")
    ask(page, "first")
    press(page, "Regenerate")
    done(page)
    assert server.said() == [("user", "first")] and texts(page) == ["first", "two"]
    assert "2 of 2" in page.locator(".assistant .actions").text_content()
    press(page, "Previous version")
    assert texts(page) == ["first", "one"]
    press(page, "Regenerate")
    done(page)
    assert texts(page) == ["first", "one"] and "broken" in page.get_by_role("alert").text_content()
    press(page, "Next version")
    ask(page, "next")
    assert server.said() == [("user", "first"), ("assistant", "two"), ("user", "next")]


def test_a_cut_answer_is_continued_in_place(talk):
    page, server = talk([chunk({"content": "One, "}), chunk({}, "length", 2)], "two.")
    ask(page, "Count")
    press(page, "Continue")
    done(page)
    assert texts(page) == ["Count", "One, two."]
    body = server.bodies[-1]
    assert server.said() == [("user", "Count"), ("assistant", "One, ")]
    assert body["continue_final_message"] is True and body["add_generation_prompt"] is False
    assert "continue_final_message" not in server.bodies[0]
    assert page.locator(".assistant").get_by_role("button", name="Continue").count() == 0  # it has ended


def test_thinking_is_folded_and_not_sent_back(talk):
    thought = [chunk(THOUGHT), chunk({"content": "Four."}), chunk({}, "stop")]
    page, server = talk(thought, "So.")
    ask(page, "2+2?")
    details = page.locator(".assistant details")
    assert details.get_attribute("open") is None and not page.locator(".thinking em").is_visible()
    page.get_by_text("Thought").click()
    assert page.locator(".thinking em").is_visible() and texts(page) == ["2+2?", "Four."]
    ask(page, "And?")
    assert server.bodies[-1]["messages"][1] == {"role": "assistant", "content": "Four."}


def test_tool_calls_are_shown(talk):
    pieces = [
        [{"index": 0, "id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a"'}}],
        [{"index": 0, "function": {"arguments": ": 2}"}}],
        [{"index": 1, "id": "c2", "type": "function", "function": {"name": "sub", "arguments": "{}"}}],
    ]
    page, _ = talk([*(chunk({"tool_calls": piece}) for piece in pieces), chunk({}, "tool_calls")])
    ask(page, "2+2?")
    calls = page.locator(".call")
    assert [each.locator("pre").text_content() for each in calls.all()] == ['{"a": 2}', "{}"]
    assert "add" in calls.first.text_content() and "sub" in calls.last.text_content()


@pytest.mark.parametrize("height", [700, 320])
def test_an_error_is_in_sight_with_the_question_back_in_the_box(talk, height):
    page, _ = talk("long\n\n" * 40, (400, {"message": "That can't be done.", "code": None}), height=height)
    ask(page, "first")
    ask(page, "a question\nof some\nlines\nthat makes\nthe box high")
    failure = page.get_by_role("alert")
    box, footer = failure.bounding_box(), page.locator("footer").bounding_box()
    assert box["y"] > 0 and box["y"] + box["height"] <= footer["y"]
    assert "That can't be done." in failure.text_content()
    assert page.get_by_label("Message").input_value().startswith("a question")
    assert page.evaluate("chat.messages.length") == 2


def test_a_full_context_has_a_way_on(talk):
    full = (400, {"message": "the prompt has 99 tokens", "code": "context_length_exceeded"})
    page, server = talk("one", "two", full, full, "three", "four")
    ask(page, "first")
    ask(page, "second")
    ask(page, "third")
    page.get_by_role("button", name="Leave out the oldest").click()
    done(page)
    assert server.said() == [("user", "second"), ("assistant", "two"), ("user", "third")]
    page.get_by_role("button", name="Leave out the oldest").click()
    done(page)
    assert server.said() == [("user", "third")]
    ask(page, "fourth")
    assert server.said() == [("user", "third"), ("assistant", "three"), ("user", "fourth")]
    assert texts(page) == ["first", "one", "second", "two", "third", "three", "fourth", "four"]
    assert page.locator(".unsent").count() == 1


def test_a_question_that_is_too_long_by_itself_offers_nothing_more(talk):
    full = (400, {"message": "the prompt has 99 tokens", "code": "context_length_exceeded"})
    page, _ = talk(full)
    ask(page, "long")
    assert page.get_by_role("alert").is_visible()
    assert page.get_by_role("button", name="Leave out the oldest").count() == 0


def test_conversations_stay_in_the_browser_and_can_be_carried_to_another(talk, tmp_path):
    page, _ = talk("one", "two")
    ask(page, "first *question*")
    page.keyboard.press("Alt+n")
    assert texts(page) == []
    ask(page, "other question")
    page.reload()
    page.get_by_role("button", name="Chats").click()
    titles = page.locator("#chat-list .open")
    assert titles.all_text_contents() == ["other question", "first *question*"]
    titles.last.click()
    assert texts(page) == ["first *question*", "one"]
    with page.expect_download() as download:
        page.get_by_role("button", name="Export all").click()
    download.value.save_as(tmp_path / "all.json")
    with page.expect_download() as download:
        page.get_by_role("button", name="Export this").click()
    download.value.save_as(tmp_path / "one.md")
    assert "## You\n\nfirst *question*" in (tmp_path / "one.md").read_text()
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Delete first *question*").click()
    page.reload()
    page.get_by_role("button", name="Chats").click()
    assert page.locator("#chat-list .open").all_text_contents() == ["other question"]

    page, server = talk("three")
    page.get_by_role("button", name="Chats").click()
    page.locator("#import").set_input_files(tmp_path / "one.md")
    page.get_by_text("holds no conversations").wait_for()
    page.locator("#import").set_input_files(tmp_path / "all.json")
    page.get_by_role("button", name="first *question*", exact=True).click()
    ask(page, "more")
    assert server.said() == [("user", "first *question*"), ("assistant", "one"), ("user", "more")]


def test_a_foreign_entry_in_storage_is_no_conversation(talk):
    page, _ = talk()
    entries = ["not JSON", '{"id": 5}', '{"id": "a", "messages": [{"role": "robot", "content": "x"}]}', "[]"]
    page.evaluate(
        "(all) => all.forEach((text, i) => localStorage.setItem('crucible.chat.' + i, text))", entries
    )
    page.reload()
    page.get_by_role("button", name="Chats").click()
    assert page.locator("#chat-list li").count() == 0 and page.evaluate("localStorage.length") >= 4


def test_sampling_controls_reach_the_server_only_when_they_are_set(talk):
    page, server = talk("a", "b")
    ask(page, "plain")
    assert set(server.bodies[0]) == {"model", "stream", "stream_options", "messages", "temperature"}
    page.get_by_role("button", name="Settings").click()
    page.get_by_text("More about sampling").click()
    values = {"top_p": "0.9", "top_k": "40", "min_p": "0.05", "seed": "7", "repetition_penalty": "1.1"}
    values |= {"presence_penalty": "0.5", "frequency_penalty": "-0.5", "temperature": "0", "max": "50"}
    for name, value in values.items():
        page.locator(f"#{name}").fill(value)
    page.locator("#ends").fill("END\nSTOP")
    page.locator("#effort").select_option("low")
    page.reload()  # they are kept
    ask(page, "set")
    body = server.bodies[1]
    assert body["max_completion_tokens"] == 50 and body["stop"] == ["END", "STOP"]
    assert body["reasoning_effort"] == "low"
    del values["max"]
    assert {name: body[name] for name in values} == {name: float(value) for name, value in values.items()}


def test_the_keyboard_does_what_the_mouse_does(talk):
    page, server = talk("one", "two")
    page.locator("h1").click()
    page.keyboard.press("/")
    page.keyboard.type("hello")
    page.keyboard.press("Enter")
    done(page)
    page.keyboard.press("ArrowUp")
    page.keyboard.type(" there")
    page.keyboard.press("Control+Enter")
    done(page)
    assert server.said() == [("user", "hello there")] and texts(page) == ["hello there", "two"]
    names = []
    for _ in range(12):
        page.keyboard.press("Tab")
        names.append(page.evaluate("document.activeElement.ariaLabel || document.activeElement.textContent"))
    assert {"Copy", "Edit", "Regenerate", "Settings"} <= set(names)


def luminance(colour):
    red, green, blue = (int(part) / 255 for part in re.findall(r"\d+", colour)[:3])
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (red, green, blue)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


COLOURS = """() => [...document.querySelectorAll("button, label, summary, p, .facts, .failure, h1, th, code, a")]
  .filter((e) => e.checkVisibility() && e.textContent.trim() && !e.classList.contains("sr"))
  .map((e) => {
    let at = e;
    while (at && getComputedStyle(at).backgroundColor === "rgba(0, 0, 0, 0)") at = at.parentElement;
    return [e.textContent.slice(0, 30), getComputedStyle(e).color, getComputedStyle(at).backgroundColor];
  })"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_text_can_be_read_and_every_control_has_a_name(talk, theme):
    text = "A [link](http://a.b), `code`.\n\n| a |\n|---|\n| b |\n\n```py\nx\n```"
    page, _ = talk([chunk(THOUGHT), chunk({"content": text}), chunk({}, "length")], (400, {"message": "no"}))
    page.get_by_role("button", name="Settings").click()
    page.locator("#theme").select_option(theme)
    page.get_by_text("More about sampling").click()
    page.get_by_role("button", name="Chats").click()
    ask(page, "Hi")
    ask(page, "Again")
    colours = page.evaluate(COLOURS)
    assert len(colours) > 30
    for shown, colour, background in colours:
        a, b = luminance(colour), luminance(background)
        assert (max(a, b) + 0.05) / (min(a, b) + 0.05) >= 4.5, (shown, colour, background)  # WCAG 2.2, AA
    tree = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]
    controls = [
        node
        for node in tree
        if node.get("role", {}).get("value")
        in ("button", "textbox", "spinbutton", "combobox", "link", "checkbox")
    ]
    assert len(controls) > 20
    assert [node for node in controls if not node["name"].get("value", "").strip()] == []
    assert (luminance(page.evaluate("getComputedStyle(document.body).backgroundColor")) < 0.1) == (
        theme == "dark"
    )


def test_a_phone_has_room_for_conversations_and_wide_answers(talk):
    wide = (
        "| "
        + " | ".join(["column"] * 20)
        + " |\n"
        + "|---" * 20
        + "|\n\n```\n"
        + "x" * 300
        + "\n```\n\n$$"
        + "x+" * 80
        + "y$$"
    )
    page, _ = talk(wide, width=360, height=640, has_touch=True, is_mobile=True)
    ask(page, "W" * 200)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.get_by_role("button", name="Chats").click()
    for button in page.locator("#chats button").all():
        box = button.bounding_box()
        assert (
            box["x"] >= 0 and box["x"] + box["width"] <= 360 and box["height"] >= 24
        )  # WCAG 2.2, target size
    page.locator("#chat-list .open").click()
    assert page.locator("#chats").is_hidden() and page.locator(".assistant").is_visible()
