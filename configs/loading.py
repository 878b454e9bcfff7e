"""The one front door of every stage: `python -m STAGE --config=FILE --workdir=FOLDER --config.key=value`.

A config file is Python with `get_config() -> ml_collections.ConfigDict` (or any mapping), or a saved
`config.json`, or the run folder that holds one. Its values are laid over the defaults of the stage's
dataclass; overrides go through absl and ml_collections' `config_flags`, typed by the dataclass.
"""

from __future__ import annotations

import dataclasses
import errno
import importlib.util
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import ml_collections
from absl import flags as absl_flags
from ml_collections import config_flags

from configs import overrides
from configs.exits import DONE, STOPPED, Stopped, stop_on_sigterm
from configs.help import help_text
from configs.typed import ConfigError, build, overlay, to_dict

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Flag:
    """A flag of one stage beside --config and --workdir: its type (int, float, str or bool), default and
    meaning.
    """

    type: type
    default: Any
    doc: str


class Parsed(NamedTuple, Generic[T]):
    """What a command line said; `workdir` is None only where the stage does not require one."""

    config: T
    workdir: Path | None
    flags: dict[str, Any]


def parse(
    cls: type[T],
    argv: Sequence[str] | None = None,
    description: str = "",
    *,
    flags: Mapping[str, Flag] | None = None,
    default_config: str | None = None,
    workdir_required: bool = True,
    program: str | None = None,
) -> Parsed[T]:
    """Reads a command line (`sys.argv[1:]` unless given) into an instance of the dataclass `cls`.

    `default_config` is used where no --config is given; without it --config is required. --help prints every
    key and exits 0. Raises ConfigError, in one paragraph, for anything that the user has to mend.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    program = program or _program()
    source, argv = _take_config(argv)
    source = source or default_config
    if any(arg in ("--help", "-help", "-h", "--helpfull", "--helpshort") for arg in argv):
        mapping = _chosen_kinds(cls, _read(cls, source) if source else overlay(cls, {}), argv)
        _show(help_text(cls, mapping, description, program, flags or {}, default_config, workdir_required))
        raise SystemExit(0)
    if source is None:
        _refuse_unknown_flags(argv, flags or {}, program)  # --confg=FILE is misspelt, not missing
        raise ConfigError(
            f"--config is missing. Give a file, e.g. {program} --config=configs/NAME.py; see --help."
        )
    mapping = _read(cls, source)
    wanted = overrides.find(cls, mapping, argv)
    values, stage_flags = _parse_flags(argv, wanted, flags or {}, program)
    mapping = overrides.apply(cls, mapping, wanted, values)
    workdir = stage_flags.pop("workdir")
    if workdir is None and workdir_required:
        raise ConfigError(
            f"--workdir is missing. Give the folder of this run, e.g. {program} --workdir=runs/NAME."
        )
    if workdir is not None and re.match(r"\w+://", workdir):
        raise ConfigError(
            f"--workdir={workdir}: a run's folder lies in a file system. Mount the bucket (gcsfuse, mountpoint-s3) "
            "and give the folder that it is mounted at."
        )
    if workdir and (file := next((p for p in [Path(workdir), *Path(workdir).parents] if p.is_file()), None)):
        raise ConfigError(f"--workdir={workdir}: {file} is a file. Give a folder, or a path that is free.")
    return Parsed(build(cls, mapping), Path(workdir) if workdir else None, stage_flags)


def load(cls: type[T], source: str | Path) -> T:
    """An instance of `cls` from what --config takes: FILE.py, FILE.py:argument, a config.json, or a run
    folder.
    """
    return build(cls, _read(cls, str(source)), str(source))


def run(
    main: Callable[..., int | None],
    cls: type,
    argv: Sequence[str] | None = None,
    description: str = "",
    **parse_options: Any,
) -> int:
    """Parses the command line, calls `main(config, workdir, **flags)`, and returns the exit code for
    `sys.exit`.

    What a user has to mend (ConfigError, a missing file, a full or read-only disk) is one paragraph on stderr and
    exit code 2; an interrupt says that the same command resumes, exit code 130, and so does SIGTERM, exit code 75. Any
    other exception is a defect and keeps its trace.
    """
    try:
        config, workdir, stage_flags = parse(cls, argv, description, **parse_options)
        with stop_on_sigterm():
            return main(config, workdir, **stage_flags) or DONE
    except Stopped as stopped:
        print(f"\n{stopped}", file=sys.stderr)
        return STOPPED
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except FileNotFoundError as error:
        print(f"error: {_missing_file(error)}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror}. {_UNWRITABLE[error.errno]}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "\nInterrupted. The same command, given again, goes on from where this stopped.", file=sys.stderr
        )
        return 130


def _show(text: str) -> None:
    """Prints a page; the program that reads it, such as `head`, may close the pipe early."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the program's end


_UNWRITABLE = {
    errno.ENOSPC: "Free some space; the same command, given again, goes on from what is saved.",
    errno.EDQUOT: "Free some space; the same command, given again, goes on from what is saved.",
    errno.EROFS: "Give a --workdir that can be written.",
    errno.EACCES: "Give a path that this user may read and write.",
}


def _chosen_kinds(cls: type, mapping: dict[str, Any], argv: list[str]) -> dict[str, Any]:
    """The config for `--help`, with the variants that the command line chooses."""
    kinds = [arg for arg in argv if re.match(r"--?config\.[^=]*\bkind=", arg)]
    wanted = overrides.find(cls, mapping, kinds)
    return overrides.apply(
        cls, mapping, wanted, {item.path: kinds[i].split("=", 1)[1] for i, item in enumerate(wanted)}
    )


def _program() -> str:
    """How the running command was started, as a user would type it: `python -m train`."""
    main = sys.modules.get("__main__")
    spec = getattr(main, "__spec__", None)
    if spec is None or not spec.name:
        return f"python {Path(sys.argv[0]).name}"
    return f"python -m {spec.name.removesuffix('.__main__')}"


def _take_config(argv: list[str]) -> tuple[str | None, list[str]]:
    """Splits `--config=X` or `--config X` (the last one wins) from the other arguments."""
    source, rest, i = None, [], 0
    while i < len(argv):
        if re.fullmatch(r"--?config", argv[i]):
            if i + 1 == len(argv):
                raise ConfigError("--config needs a value: a config file, a config.json or a run folder.")
            source, i = argv[i + 1], i + 1
        elif match := re.match(r"--?config=", argv[i]):
            source = argv[i][match.end() :]
        else:
            rest.append(argv[i])
        i += 1
    return source, rest


def _parse_flags(
    argv: list[str], wanted: list[overrides.Override], stage: Mapping[str, Flag], program: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """({override path: value}, {flag name: value}) as absl reads the command line."""
    values = absl_flags.FlagValues()
    absl_flags.DEFINE_string("workdir", None, "the folder of this run", flag_values=values)
    define = {
        int: absl_flags.DEFINE_integer,
        float: absl_flags.DEFINE_float,
        str: absl_flags.DEFINE_string,
        bool: absl_flags.DEFINE_bool,
    }
    for name, flag in stage.items():
        define[flag.type](name, flag.default, flag.doc, flag_values=values)
    config_flags.DEFINE_config_dict(
        "config",
        overrides.flag_tree(wanted),
        flag_values=values,
        sys_argv=[program, *argv],
        lock_config=False,
    )
    try:
        rest = values([program, *argv])
    except absl_flags.UnrecognizedFlagError as error:
        raise _unknown_flag(error.flagname, stage, program) from None
    except absl_flags.Error as error:
        raise ConfigError(_flag_error(str(error), wanted)) from None
    if rest[1:]:
        raise ConfigError(
            f"{rest[1]!r} is not a flag. Write --workdir=FOLDER, --config=FILE or --config.key=value."
        )
    names = ["workdir", *stage]
    return config_flags.get_override_values(values["config"]), {name: values[name].value for name in names}


def _refuse_unknown_flags(argv: list[str], stage: Mapping[str, Flag], program: str) -> None:
    known = {"workdir", *stage, *(f"no{name}" for name, flag in stage.items() if flag.type is bool)}
    for arg in argv:
        match = re.match(r"--?([A-Za-z][^=]*)", arg)
        if match and match[1] not in known and not match[1].startswith("config."):
            raise _unknown_flag(match[1], stage, program)


def _unknown_flag(name: str, stage: Mapping[str, Flag], program: str) -> ConfigError:
    hint = overrides.did_you_mean(name, ["config", "workdir", "help", *stage])
    return ConfigError(f"--{name} is not a flag of {program}. {hint}")


def _flag_error(message: str, wanted: list[overrides.Override]) -> str:
    """absl's message about a value, with the type that the key has."""
    for item in wanted:
        if match := re.match(rf"flag --{re.escape('config.' + item.path)}=(.*?): ", message, re.DOTALL):
            return f"--config.{item.path}={match[1]} is ill-typed; wanted {item.wanted}."
    return message.rstrip(".") + "."


def _read(cls: type, source: str) -> dict[str, Any]:
    """The defaults of `cls` overlaid with what the file says."""
    match = re.fullmatch(r"(.*\.py):(.*)", source, re.DOTALL)
    path = Path(match[1] if match else source)
    if path.is_dir():
        path = path / "config.json"
        if not path.exists():
            raise ConfigError(
                f"--config={source}: the folder holds no config.json, so it is not a run folder."
            )
    if not path.exists():
        raise ConfigError(f"--config={source}: no such file. {_files_nearby(path)}")
    if path.suffix == ".py":
        mapping = _call_get_config(path, match[2] if match else None)
    elif path.suffix == ".json":
        mapping = _read_json(path)
    else:
        raise ConfigError(f"--config={source}: wanted a .py file, a saved config.json or a run folder.")
    if dataclasses.is_dataclass(mapping) and not isinstance(mapping, type):
        mapping = to_dict(mapping)
    if not isinstance(mapping, (Mapping, ml_collections.ConfigDict)):
        raise ConfigError(f"{path}: get_config() returned a {type(mapping).__name__}; wanted a ConfigDict.")
    return overlay(cls, overrides.plain(mapping), f"{path}: config")


def _read_json(path: Path) -> Any:
    try:
        mapping = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: not a JSON file: {error}") from None
    if not isinstance(mapping, dict):
        raise ConfigError(f"{path}: holds a JSON {type(mapping).__name__}; wanted an object of config keys.")
    return mapping


def _call_get_config(path: Path, argument: str | None) -> Any:
    name = "crucible_config_" + re.sub(r"\W", "_", str(path.resolve()))
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path}: cannot be read as Python.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look a class' module up by name
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise ConfigError(f"{path}: defines no get_config().")
        return module.get_config() if argument is None else module.get_config(argument)
    except ConfigError:
        raise
    except SyntaxError as error:
        raise ConfigError(f"{error.filename}:{error.lineno}: {error.msg}") from None
    except Exception as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line = f":{frames[-1].lineno}" if frames else ""
        raise ConfigError(f"{path}{line}: {type(error).__name__}: {error}") from error


def _files_nearby(path: Path) -> str:
    folder = next(parent for parent in [path.parent, *path.parents, Path(".")] if parent.is_dir())
    found = sorted(str(item) for item in folder.rglob("*.py") if item.name[0] not in "._")[:200]
    if near := overrides.nearest_strings(str(path), found):
        return "Did you mean " + " or ".join(near) + "?"
    return f"{folder.resolve()} is there, without such a file in it."


def _missing_file(error: FileNotFoundError) -> str:
    if error.filename is None:
        return str(error)
    path = Path(str(error.filename))
    hint = "" if path.parent.is_dir() else f" Its folder {path.parent} does not exist either."
    return f"{error.filename}: no such file or folder.{hint}"
