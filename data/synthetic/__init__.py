"""Synthetic text and dialogues, by any served model or function."""
