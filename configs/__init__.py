"""What one run is: `get_config()` files, read and overridden into frozen dataclasses that every stage takes.

This folder is the floor of the house: its own code (`typed`, `files`, `loading`, `paths`, `gguf` ...) imports
nothing of the other stages, and every other file or folder in it describes one run.
"""

from configs.files import atomic_write, save
from configs.loading import Flag, Parsed, load, parse, run
from configs.typed import ConfigError, build, overlay, to_dict

__all__ = [
    "ConfigError",
    "Flag",
    "Parsed",
    "atomic_write",
    "build",
    "load",
    "overlay",
    "parse",
    "run",
    "save",
    "to_dict",
]
