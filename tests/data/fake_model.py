"""A "model" that answers the data stage's prompts by rule, the same to the same request, and can be told to die."""

import hashlib
import os
import re
import threading

LOCK = threading.Lock()
CALLS = []  # of this process


def generate(model):
    """What `Endpoint.generate` names."""

    def answer(request):
        with LOCK:
            CALLS.append(request)
            if len(CALLS) > int(os.environ.get("FAKE_MODEL_DIES_AFTER", "1000000")):
                os._exit(9)
        return reply_to(request)

    return answer


def reply_to(request):
    prompt = request["messages"][-1]["content"]
    mark = hashlib.sha256(f"{prompt}{request['seed']}".encode()).hexdigest()
    words = " ".join(f"w{mark[i : i + 3]}" for i in range(0, 60, 2))
    shows_others = prompt.startswith("Here are requests")
    if "fails" in prompt and not shows_others:
        raise RuntimeError("out of order")
    if "refuse" in prompt and not shows_others:
        return f"I\u2019m sorry, but I will not. {words}"
    if "Question: ..." in prompt:
        first = f"**Question:** What is {words}?\nAnswer: It is {words[::-1]}."
        return f"{first}\n\nQuestion: Why {mark[:9]} so?\nAnswer: {words}"
    if "Request: ..." in prompt:
        return f"Request: Please {words}\nReply: Certainly {words[::-1]}"
    if found := re.match(r"State the final answer to the following arithmetic problem: (.*) =", prompt):
        right = sum(int(x) for x in found[1].replace("- ", "-").replace("+ ", "+").split())
        return f"Adding up. <answer>{right if request['seed'] % 2 else right + 1}</answer>"
    return f"{words} copied" if "short" not in prompt else "no"
