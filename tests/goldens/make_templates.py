"""Writes templates.json: what transformers 5 renders of published chat templates, as hashes of the text.

    .venvs/tokenizers/bin/python tests/goldens/make_templates.py FOLDER_OF_SHARED_DATA

(The environment is that of make_tokenizers.py.) The templates themselves are not kept here; a test reads them from the
shared folder, and is skipped where it is absent. The clock stands at 2025-01-02.
"""

import datetime
import hashlib
import json
import sys
import tarfile
from pathlib import Path

from transformers.utils import chat_template_utils

OUT = Path(__file__).parent / "templates.json"
ROLES = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "description": "The <city> & more"},
        "days": {"type": "integer"},
    },
    "required": ["city"],
}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "weather", "description": "Tells it.", "parameters": PARAMETERS},
    }
]
ASKED = {"role": "user", "content": "What is the weather in Zürich?"}
CALL = {
    "id": "call12345",
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "Zürich", "days": 2}},
}
TOLD = {"role": "tool", "tool_call_id": "call12345", "name": "weather", "content": '{"sun": true}'}
THOUGHT = {"role": "assistant", "content": "It shines.", "reasoning_content": "Sun means\nit shines."}
CASES = {
    "plain": {
        "messages": [ASKED, {"role": "assistant", "content": "Sunny."}, {"role": "user", "content": "Sure?"}]
    },
    "system": {"messages": [{"role": "system", "content": "Be brief."}, ASKED]},
    "no prompt": {
        "messages": [ASKED, {"role": "assistant", "content": "Sunny."}],
        "add_generation_prompt": False,
    },
    "tools": {"messages": [ASKED], "tools": TOOLS},
    "called": {
        "messages": [ASKED, {"role": "assistant", "content": "", "tool_calls": [CALL]}, TOLD],
        "tools": TOOLS,
    },
    "called, null content": {
        "messages": [
            ASKED,
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            TOLD,
            THOUGHT,
            ASKED,
        ],
        "tools": TOOLS,
    },
    "null keys": {
        "messages": [
            ASKED,
            {"role": "assistant", "content": "Sunny.", "tool_calls": None, "reasoning": None},
            ASKED,
        ]
    },
    "reasoning": {"messages": [ASKED, THOUGHT, ASKED, THOUGHT], "add_generation_prompt": False},
    "reasoning by another name": {
        "messages": [ASKED, {"role": "assistant", "content": "It shines.", "reasoning": "Sun."}, ASKED]
    },
    "thinking": {
        "messages": [ASKED, {"role": "assistant", "content": "It shines.", "thinking": "Sun."}, ASKED]
    },
    "think tags": {
        "messages": [ASKED, {"role": "assistant", "content": "<think>\nSun.\n</think>\n\nIt shines."}, ASKED]
    },
    "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "What is it?"}]}]},
    "thinking off": {"messages": [ASKED], "enable_thinking": False},
}


class Clock(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls(2025, 1, 2, 3, 4, 5, tzinfo=tz)


def main(shared: Path) -> None:
    chat_template_utils.datetime = Clock
    written = {}
    with tarfile.open(shared / "data" / "serving" / "chat_templates_llamacpp.tar.gz") as archive:
        for member in sorted(archive.getmembers(), key=lambda member: member.name):
            if member.name.endswith(".jinja"):
                written[member.name] = rendered(archive.extractfile(member).read().decode())
    OUT.write_text(json.dumps({"roles": ROLES, "cases": CASES, "rendered": written}, indent=1) + "\n")
    texts = [text for each in written.values() for text in each.values()]
    print(len(texts), "texts,", sum(text is None for text in texts), "refused")


def rendered(template: str) -> dict[str, str | None]:
    """Hashes; None for what the template refuses."""
    found = {}
    for name, case in CASES.items():
        case = dict(case)
        messages = [{k: v for k, v in message.items() if v is not None} for message in case.pop("messages")]
        given = {"add_generation_prompt": True} | case | ROLES
        try:
            texts, _ = chat_template_utils.render_jinja_template([messages], chat_template=template, **given)
        except Exception:
            found[name] = None
            continue
        found[name] = hashlib.sha256(texts[0].encode()).hexdigest()[:16]
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]))
