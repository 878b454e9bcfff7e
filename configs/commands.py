"""Command lines of several commands, `python -m data.quality train ...`: their parsers, and what a user is told."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from configs.typed import ConfigError


class _Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """None and False go without saying."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return super()._get_help_string(action) if action.default else action.help


class Commands:
    """Each command is a function of the parsed options that returns an exit code."""

    def __init__(self, program: str, description: str | None):
        raw = argparse.RawDescriptionHelpFormatter
        self._parser = argparse.ArgumentParser(program, description=description, formatter_class=raw)
        self._commands = self._parser.add_subparsers(required=True, metavar="COMMAND")

    def add(
        self, name: str, run: Callable[[argparse.Namespace], int], about: str, more: str = ""
    ) -> argparse.ArgumentParser:
        """The parser of one command, for its options; its help says `more`, and their defaults."""
        described = f"{about} {more}".strip()
        added = self._commands.add_parser(name, help=about, description=described, formatter_class=_Defaults)
        added.set_defaults(run=run)
        return added

    def parse(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        """The options; ends the program as argparse does for a command line that it does not take."""
        return self._parser.parse_args(argv)

    def run(self, argv: Sequence[str] | None = None) -> int:
        """The exit code, for `sys.exit`. What a user has to mend is one paragraph on stderr and exit code 2."""
        options = self.parse(argv)
        return exit_code(lambda: options.run(options), "Interrupted; nothing was written.")


def exit_code(work: Callable[[], int], interrupted: str) -> int:
    """What `work` returns; 2 after an error that a user has to mend, 130 after an interrupt."""
    try:
        return work()
    except (ConfigError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{interrupted}", file=sys.stderr)
        return 130
