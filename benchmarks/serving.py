"""Our server beside llama.cpp's on this CPU: the same GGUF file, the same requests, one server after the other.

    python -m benchmarks.serving [--model=smollm2|PATH.gguf] [--only=ours|llama.cpp] [--rows=1,4,8,16] [--tokens=128]

llama.cpp's `llama-server` is built once, into .venvs/llama.cpp, from the sources that the package llama-cpp-python
carries; or give one with --llama-server. Requests are greedy and stream; their prompts are random tokens, so they share
no prefix. Printed are:

- tokens a second of all requests together, from the first token of the first to the last of the last, for each number
  of requests at once, with prompts of 32 tokens;
- tokens of prompt a second and time to the first token, for prompts of 512 and 1500 tokens;
- seconds from the command to the first token, with the programs of an earlier start, and for ours without them;
- the resident memory at the end, of the server's process, its mapped files included.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import http.client
import json
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

SOURCES = "llama-cpp-python==0.3.36"
BUILT = Path(__file__).resolve().parents[1] / ".venvs" / "llama.cpp"
LENGTH, MOST_ROWS = 2048, 16


class Stream(NamedTuple):
    """When a request was sent and when the events of its answer came, seconds of the monotonic clock."""

    sent: float
    tokens: list[float]  # of the events; one may bring several tokens


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--only", choices=("ours", "llama.cpp"))
    parser.add_argument("--rows", default="1,4,8,16", help="requests at once")
    parser.add_argument("--tokens", type=int, default=128, help="of an answer")
    parser.add_argument("--weights", default="file", help="of ours; see python -m serve --help")
    parser.add_argument("--llama-server", type=Path, help="the program")
    parser.add_argument(
        "--cold", action="store_true", help="ours also without the programs of an earlier start"
    )
    options = parser.parse_args()
    from serve.__main__ import model_path

    path = model_path(options.model)
    for name in ("ours", "llama.cpp"):
        if options.only in (None, name):
            measure(name, path, options)


def measure(name: str, path: Path, options: argparse.Namespace) -> None:
    port = free_port()
    if name == "ours":
        command = [sys.executable, "-m", "serve", f"--model={path}", f"--port={port}", "--alias=model"]
        sizes = f"--max-rows={MOST_ROWS} --max-length={LENGTH} --kv-memory=2 --weights={options.weights}"
    else:
        command = [str(options.llama_server or built_server()), "-m", str(path), "--port", str(port)]
        sizes = f"-np {MOST_ROWS} -t {os.cpu_count() or 1} -c {MOST_ROWS * LENGTH} --no-webui"
    command += sizes.split()
    if name == "ours" and options.cold:
        with tempfile.TemporaryDirectory() as folder:
            with Server(command, port, os.environ | {"XDG_CACHE_HOME": folder}) as server:
                print(
                    f"{name}: first token after {server.first_token:.1f} s, nothing compiled before",
                    flush=True,
                )
    with Server(command, port, dict(os.environ)):  # its programs are kept for the next one
        time.sleep(40 if name == "ours" else 0)
    with Server(command, port, dict(os.environ)) as server:
        print(f"{name}: first token after {server.first_token:.1f} s", flush=True)
        if name == "ours":
            time.sleep(15)  # until all programs are there
        for rows in map(int, options.rows.split(",")):
            rates = [decode_rate(port, rows, options.tokens) for _ in range(3)]
            print(f"{name}: {rows:>3} requests: {statistics.median(rates):7.1f} tokens/s", flush=True)
        for length in (512, 1500):
            seconds = statistics.median(first_token(port, length) for _ in range(3))
            print(
                f"{name}: prompt of {length}: {length / seconds:6.0f} tokens/s, {seconds:.2f} s", flush=True
            )
        print(f"{name}: {server.resident() / 2**20:.0f} MiB", flush=True)


class Server:
    """A server's process, from its start to its first token, until the block ends."""

    def __init__(self, command: list[str], port: int, env: dict[str, str]):
        start = time.monotonic()
        self._log = tempfile.TemporaryFile()
        self._process = subprocess.Popen(command, env=env, stdout=self._log, stderr=self._log)
        try:
            while True:
                if self._process.poll() is not None or time.monotonic() - start > 600:
                    self._log.seek(0)
                    raise SystemExit(f"{command} did not start:\n{self._log.read().decode()[-3000:]}")
                try:
                    if stream(port, 8, 1).tokens:
                        break
                except (OSError, http.client.HTTPException):
                    time.sleep(0.05)
        except BaseException:
            self._process.kill()
            raise
        self.first_token = time.monotonic() - start

    def resident(self) -> int:
        """Bytes."""
        with open(f"/proc/{self._process.pid}/status", encoding="utf-8") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmRSS"))

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(60)


def decode_rate(port: int, rows: int, tokens: int) -> float:
    with concurrent.futures.ThreadPoolExecutor(rows) as pool:
        streams = list(pool.map(lambda _: stream(port, 32, tokens), range(rows)))
    begin, end = min(s.tokens[0] for s in streams), max(s.tokens[-1] for s in streams)
    return rows * (tokens - 1) / (end - begin)


def first_token(port: int, length: int) -> float:
    found = stream(port, length, 1)
    return found.tokens[0] - found.sent


def stream(port: int, prompt: int, tokens: int) -> Stream:
    """One request with a prompt of so many random tokens."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    body = {
        "prompt": [random.randrange(1000, 40000) for _ in range(prompt)],
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "ignore_eos": True,
        "model": "model",
    }
    sent, times = time.monotonic(), []
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        reply = connection.getresponse()
        if reply.status != 200:
            raise http.client.HTTPException(f"{reply.status}: {reply.read()[:300]!r}")
        for line in reply:
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                if event.get("choices") and (event["choices"][0]["text"] or not times):
                    times.append(time.monotonic())
    finally:
        connection.close()
    return Stream(sent, times)


def built_server() -> Path:
    program = BUILT / "bin" / "llama-server"
    if program.exists():
        return program
    print(f"Building {program} from {SOURCES}; this takes some minutes.", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        download = ["-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([sys.executable, *download, SOURCES], cwd=folder, check=True)
        archive = next(Path(folder).glob("*.tar.gz"))
        shutil.unpack_archive(archive, folder, filter="data")
        source = next(Path(folder).glob("*/vendor/llama.cpp"))
        flags = ("BUILD_TESTS", "BUILD_EXAMPLES", "CURL", "OPENSSL", "BUILD_WEBUI")
        off = [f"-DLLAMA_{name}=OFF" for name in flags]
        build = ["cmake", "-B", "build", "-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=OFF", *off]
        subprocess.run(build, cwd=source, check=True, stdout=subprocess.DEVNULL)
        make = ["cmake", "--build", "build", "--target", "llama-server", "-j", str(os.cpu_count() or 1)]
        subprocess.run(make, cwd=source, check=True, stdout=subprocess.DEVNULL)
        program.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source / "build" / "bin" / "llama-server", program)
    return program


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


if __name__ == "__main__":
    main()
