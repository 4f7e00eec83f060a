"""The steps of action.yml, run as a runner runs them: expressions filled in, a shell a step, files for outputs."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
EXPRESSION = re.compile(r"\$\{\{\s*(.+?)\s*\}\}")


def action() -> dict[str, Any]:
    return yaml.safe_load((REPOSITORY / "action.yml").read_text(encoding="utf-8"))


@dataclass
class Runner:
    """One job. `workspace`: the port's repository; `temp` holds what steps keep between them."""

    workspace: Path
    temp: Path
    inputs: dict[str, str]
    outputs: dict[str, dict[str, str]] = field(default_factory=dict)  # of each step

    def value(self, expression: str) -> str:
        """Of an expression in `${{ }}`: a name with dots, no operators. KeyError for one that is not known."""
        context, _, rest = expression.partition(".")
        if context == "inputs":
            return self.inputs.get(rest, str(action()["inputs"][rest].get("default", "")))
        if context == "steps":
            step, _, name = rest.partition(".outputs.")
            return self.outputs[step].get(name, "")
        return {"runner.temp": str(self.temp), "github.action_path": str(REPOSITORY)}[expression]

    def fill(self, text: str) -> str:
        return EXPRESSION.sub(lambda found: self.value(found[1]), text)

    def run(self, step: dict[str, Any]) -> subprocess.CompletedProcess[str]:
        """A `run:` step; its outputs are kept. The command that Actions has for `shell: bash`."""
        assert step["shell"] == "bash"
        script, files = self.temp / "step.sh", {}
        script.write_text(self.fill(step["run"]))
        for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY"):
            files[name] = str(self.temp / name.lower())
            Path(files[name]).touch()
        given = {name: self.fill(value) for name, value in step.get("env", {}).items()}
        settings = {"GITHUB_ACTIONS": "true", "GITHUB_WORKSPACE": str(self.workspace), **files, **given}
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", str(script)],
            cwd=self.workspace / self.fill(step.get("working-directory", ".")),
            env=kept | settings,
            capture_output=True,
            text=True,
        )
        self.outputs[step.get("id", "")] = read_outputs(Path(files["GITHUB_OUTPUT"]))
        return done

    def judge(self) -> subprocess.CompletedProcess[str]:
        """The steps that need no network, with this Python as the environment that was installed."""
        home = self.temp / "llama-parity" / "venv" / "bin"
        home.mkdir(parents=True, exist_ok=True)
        if not (home / "python").exists():  # not a link: Python finds its packages by its own path
            (home / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
            (home / "python").chmod(0o755)
        steps = {step["id"]: step for step in action()["runs"]["steps"] if "id" in step}
        key = self.run(steps["key"])
        assert key.returncode == 0 and len(self.outputs["key"]["key"]) == 64, key.stderr
        return self.run(steps["judge"])


def read_outputs(file: Path) -> dict[str, str]:
    """As a runner reads them: NAME=VALUE, or NAME<<MARK, lines, MARK."""
    found, lines = {}, iter(file.read_text(encoding="utf-8").splitlines())
    for line in lines:
        name, mark, rest = re.match(r"([\w-]+)(=|<<)(.*)", line).groups()  # type: ignore[union-attr]
        value = [rest] if mark == "=" else list(iter(lambda: next(lines), rest))
        found[name] = "\n".join(value)
    return found
