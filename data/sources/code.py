"""What the name and the text of a source file say: its language, its licence, whether people wrote it."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

LANGUAGES = {
    ".py": "python", ".pyi": "python", ".js": "javascript", ".mjs": "javascript",
    ".jsx": "javascript", ".ts": "typescript", ".tsx": "typescript", ".java": "java", ".kt": "kotlin",
    ".scala": "scala", ".c": "c", ".h": "c", ".cc": "c++", ".cpp": "c++", ".cxx": "c++", ".hpp": "c++", ".hh": "c++",
    ".cu": "cuda", ".cuh": "cuda", ".cs": "c#", ".go": "go", ".rs": "rust", ".rb": "ruby", ".php": "php",
    ".swift": "swift", ".m": "objective-c", ".mm": "objective-c", ".pl": "perl", ".pm": "perl", ".r": "r",
    ".jl": "julia", ".lua": "lua", ".hs": "haskell", ".ml": "ocaml", ".mli": "ocaml", ".ex": "elixir",
    ".exs": "elixir", ".erl": "erlang", ".clj": "clojure", ".dart": "dart", ".zig": "zig", ".f90": "fortran",
    ".f": "fortran", ".sh": "shell", ".bash": "shell", ".zsh": "shell", ".ps1": "powershell", ".sql": "sql",
    ".css": "css", ".scss": "css", ".vue": "vue", ".proto": "protobuf", ".lean": "lean", ".v": "verilog",
    ".sv": "verilog", ".vhd": "vhdl", ".asm": "assembly", ".s": "assembly", ".el": "lisp", ".lisp": "lisp",
    ".scm": "scheme", ".tex": "latex", ".cmake": "cmake", ".toml": "toml", ".yaml": "yaml", ".yml": "yaml",
    ".tf": "terraform", ".nix": "nix", ".gradle": "gradle", ".groovy": "groovy", ".vim": "vim",
}  # fmt: skip
NAMES = {
    "makefile": "make",
    "dockerfile": "dockerfile",
    "cmakelists.txt": "cmake",
    "rakefile": "ruby",
    "gemfile": "ruby",
}
PROSE = {".md": "markdown", ".markdown": "markdown", ".rst": "restructuredtext", ".txt": "text"}

LOCKS = frozenset(
    "package-lock.json yarn.lock pnpm-lock.yaml poetry.lock pipfile.lock cargo.lock composer.lock gemfile.lock go.sum "
    "uv.lock flake.lock bun.lockb mix.lock pubspec.lock packages.lock.json npm-shrinkwrap.json".split()
)
VENDORED = frozenset(
    "node_modules bower_components vendor vendors vendored third_party third-party thirdparty 3rdparty external "
    "externals site-packages dist-packages .venv venv pods carthage godeps _vendor jspm_packages".split()
)
BUILT = frozenset(
    "dist build out target __pycache__ .git .hg .svn .idea .vscode .tox .eggs coverage .next".split()
)

_PERMISSIVE = frozenset(
    "MIT BSD-2-Clause BSD-3-Clause Apache-2.0 ISC Unlicense CC0-1.0 PSF-2.0 Zlib BSL-1.0 0BSD MIT-0 Python-2.0".split()
)
_TEXTS = (  # in this order: a text of the LGPL names the GPL, one of the BSD's holds that of ISC's kind
    ("LGPL-3.0", r"gnu lesser general public license.{0,40}version 3"),
    ("LGPL-2.1", r"gnu (?:lesser|library) general public license.{0,40}version 2"),
    ("AGPL-3.0", r"gnu affero general public license.{0,40}version 3"),
    ("GPL-3.0", r"gnu general public license.{0,40}version 3"),
    ("GPL-2.0", r"gnu general public license.{0,40}version 2"),
    ("MPL-2.0", r"mozilla public license.{0,20}(?:version |v\. ?)2\.0"),
    ("Apache-2.0", r"apache license.{0,20}version 2\.0"),
    ("EPL-2.0", r"eclipse public license.{0,10}v(?:ersion)? ?2\.0"),
    ("PSF-2.0", r"python software foundation license version 2"),
    ("Unlicense", r"this is free and unencumbered software released into the public domain"),
    ("CC0-1.0", r"creative commons.{0,20}cc0 1\.0|cc0 1\.0 universal"),
    ("BSL-1.0", r"boost software license.{0,10}version 1\.0"),
    ("Zlib", r"this software is provided 'as-is', without any express or implied warranty.{0,400}misrepresented"),
    (
        "BSD-3-Clause",
        r"redistribution and use in source and binary forms.{0,1500}(?:neither the name|may not be used to endorse)",
    ),
    ("BSD-2-Clause", r"redistribution and use in source and binary forms"),
    ("ISC", r"permission to use, copy, modify, and(?:/or)? distribute this software for any purpose"),
    ("MIT", r"permission is hereby granted, free of charge, to any person obtaining a copy"),
)  # fmt: skip
_LICENCE_FILE = re.compile(r"(?:un)?licen[cs]e|copying|copyright", re.I)
_SPDX = re.compile(r"SPDX-License-Identifier:\s*([A-Za-z0-9.+() -]{2,100})")
_GENERATED = re.compile(
    r"@generated|\bdo not (?:edit|modify)\b|\bauto-?generated\b|\bautomatically generated\b"
    r"|\bgenerated (?:by|from|with) |code generated .{0,80}do not edit",
    re.I,
)
_GENERATED_NAMES = re.compile(
    r"(?:_pb2(?:_grpc)?\.pyi?|\.pb\.(?:go|cc|h)|\.g\.dart|\.designer\.cs|\.generated\.\w+|_generated\.\w+|\.min\.(?:js|css)"
    r"|\.bundle\.js|\.map)$",
    re.I,
)


def language_of(path: str) -> str | None:
    """The language by the file's name; None for what is neither code nor prose."""
    name = PurePosixPath(path).name.lower()
    suffix = PurePosixPath(name).suffix
    return NAMES.get(name) or LANGUAGES.get(suffix) or PROSE.get(suffix)


def is_licence_file(path: str) -> bool:
    name = PurePosixPath(path).name
    return bool(_LICENCE_FILE.match(name)) and PurePosixPath(name).suffix.lower() not in LANGUAGES


def licence_of(text: str) -> str | None:
    """The SPDX name of a licence's text, None where it is none that we know."""
    flat = re.sub(r"[\s*#/;]+", " ", text[:50_000]).lower()
    return next((name for name, pattern in _TEXTS if re.search(pattern, flat)), None)


def licence_in_header(text: str) -> str | None:
    """What a file's first lines say of its licence: an SPDX tag, or the opening of a licence."""
    head = text[:3000]
    if found := _SPDX.search(head):
        return re.sub(r"-(?:only|or-later)\b|\+", "", found[1]).strip(" ()-")
    return licence_of(head)


def is_permissive(licence: str) -> bool:
    """Whether every part of an SPDX expression joined by AND, or one joined by OR, is."""
    choices = [part.strip(" ()") for part in re.split(r"\bOR\b", licence)]
    return any(
        all(name.strip(" ()") in _PERMISSIVE for name in re.split(r"\bAND\b", part)) for part in choices
    )


def unwanted_path(path: str) -> str | None:
    """Why a file goes by its path within the repository."""
    *folders, name = path.lower().split("/")
    if VENDORED & set(folders):
        return "vendored"
    if BUILT & set(folders):
        return "built"
    if name in LOCKS:
        return "lock file"
    return "generated" if _GENERATED_NAMES.search(name) else None


def unwanted_text(text: str) -> str | None:
    """Why a file goes by what is in it."""
    if not text.strip():
        return "empty"
    if _GENERATED.search("\n".join(text[:2000].split("\n")[:8])):
        return "generated"
    lines = text.split("\n")
    if len(text) / len(lines) > 200 or max(map(len, lines)) > 10_000:
        spaces = sum(map(text.count, " \n\t"))
        return "minified" if spaces < len(text) * 0.1 or len(text) / len(lines) > 1000 else "long lines"
    return None
