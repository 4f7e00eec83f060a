"""Argument parsing for parity's commands: argparse, with one-line errors that name the nearest known flag."""

import argparse
import difflib
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from parity.contract import UsageError


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations; every usage error is one line and exit code 2, before any work starts."""

    def __init__(self, prog: str, doc: str | None) -> None:
        text = (doc or "").strip()
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=prog, description=text, allow_abbrev=False, formatter_class=formatter)

    def error(self, message: str) -> NoReturn:
        print(f"error: {self._with_nearest(message)} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)

    def _with_nearest(self, message: str) -> str:
        if not message.startswith("unrecognized arguments:"):
            return message
        unknown = message.split(": ", 1)[1].split()[0]
        known = [flag for action in self._actions for flag in action.option_strings]
        near = difflib.get_close_matches(unknown.split("=")[0], known, n=1, cutoff=0.5)
        return f"unknown flag {unknown}" + (f"; did you mean {near[0]}?" if near else "")

    def run(self, main: Callable[[argparse.Namespace], int], argv: list[str] | None) -> int:
        """Parse, call main, and turn what a user can mend into one line and exit code 2."""
        args = self.parse_args(argv)
        try:
            return main(args)
        except UsageError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
