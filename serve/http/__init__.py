"""The HTTP server over an engine: OpenAI's API, limits on all that clients send, metrics."""
