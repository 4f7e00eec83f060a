"""The console script of a package of commands: `parity check ...` is `python -m parity.check ...`.

sys.exit(run("parity", {"check": "a verdict about an implementation"}, needs=("httpx",)))
"""

import difflib
import importlib.util
import runpy
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from nanollama import __version__
from nanollama.printable import complain


def run(package: str, commands: Mapping[str, str], *, needs: Sequence[str] = ()) -> int:
    """Runs the module that the first argument names, as `python -m` does; else says which there are.

    needs: what the package's own extra brings, and its commands import. Exit code 2 for an unknown command, without
    the extra, and where another project's package of this name is found in place of ours.
    """
    word, *_ = [*sys.argv[1:], "--help"]
    if word in ("--version", "--help", "-h", "help"):
        print(__version__ if word == "--version" else listing(package, commands))
        return 0
    if word not in commands:
        near = difflib.get_close_matches(word, commands, n=1)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(commands)}"
        complain(f"unknown command {word}; {hint} (see {package} --help)")
        return 2
    if foreign := not_ours(package):
        complain(f"the package {package} that Python finds is another project's ({foreign}): install into a clean venv")
        return 2
    if missing := [name for name in needs if importlib.util.find_spec(name) is None]:
        complain(f"{package} needs the package {missing[0]}: pip install 'llama-parity[{package}]'")
        return 2
    del sys.argv[1]
    runpy.run_module(f"{package}.{word}", run_name="__main__", alter_sys=True)
    return 0


def listing(package: str, commands: Mapping[str, str]) -> str:
    width = max(map(len, commands))
    lines = [f"  {package} {name:{width}}  {what}" for name, what in commands.items()]
    return "\n".join([f"usage: {package} COMMAND [--flag value ...]; COMMAND --help says more", "", *lines])


def not_ours(package: str) -> str | None:
    """The place of a package of this name that does not lie beside this one."""
    spec = importlib.util.find_spec(package)
    places = list(spec.submodule_search_locations or ()) if spec else []
    ours = Path(__file__).resolve().parent.parent / package
    return None if str(ours) in [str(Path(p).resolve()) for p in places] else ", ".join(places) or "none"
