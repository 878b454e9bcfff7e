"""Answers that are errors, in the shape of the API that was asked: OpenAI's or Anthropic's."""

from __future__ import annotations

import re
from typing import Any

from serve.request import RequestError

_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "overloaded_error",
}
_ANTHROPIC_KINDS = _KINDS | {413: "request_too_large", 504: "timeout_error"}
ANTHROPIC_PATH = "/v1/messages"  # and all below it


class ApiError(Exception):
    """An answer that is an error."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": self.message, "type": _KINDS.get(self.status, kind)}
        return {"error": {**error, "param": self.param, "code": self.code}}

    def anthropic_body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "api_error"
        error = {"type": _ANTHROPIC_KINDS.get(self.status, kind), "message": self.message}
        return {"type": "error", "error": error}

    def body_for(self, path: str) -> dict[str, Any]:
        """The body that clients of the API at this path read."""
        anthropic = path == ANTHROPIC_PATH or path.startswith(f"{ANTHROPIC_PATH}/")
        return self.anthropic_body() if anthropic else self.body()


def refusal(error: RequestError) -> ApiError:
    """The engine's reason as an answer with status 400.

    On `context_length_exceeded` clients shorten the prompt, so it is for what counts the tokens ("40 tokens") alone:
    not for a max_tokens that is no number of tokens, nor for an empty prompt.
    """
    too_long = error.field in ("prompt", "max_tokens") and re.search(r"\d tokens", str(error))
    code = "context_length_exceeded" if too_long else None
    return ApiError(400, str(error), error.field, code)
