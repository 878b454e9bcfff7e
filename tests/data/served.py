"""A server of this process that speaks as much of the OpenAI protocol as the data stage asks for."""

import contextlib
import http.server
import json
import threading


@contextlib.contextmanager
def served(answer):
    """(base_url, requests seen): `answer(request)` gives text, or (status, text) for an error."""
    seen = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append(request)
            said = answer(request)
            status, text = said if isinstance(said, tuple) else (200, said)
            message = {"role": "assistant", "content": text}
            body = {"choices": [{"message": message}], "usage": {"total_tokens": 7}}
            raw = json.dumps(body if status == 200 else {"error": text}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(raw)))
            if status == 429:
                self.send_header("Retry-After", "0")
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", seen
    finally:
        server.shutdown()
        server.server_close()
