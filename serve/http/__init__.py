"""The HTTP server over an engine: OpenAI's and Anthropic's API, limits on all that clients send, metrics."""
