"""Launching: one machine, one pod, many pods; the whole life of a model in one command."""
