"""`parity COMMAND`, or `python -m parity COMMAND`: the commands of the harness."""

from nanollama import program

COMMANDS = {
    "check": "does an implementation compute what Meta's code and transformers compute?",
    "ci": "check, with the reports that a forge shows: JUnit, SARIF, job summary, annotation, badge",
    "kit": "expected values in a folder, for a port in any language; or judge one by it",
    "synth": "a seeded checkpoint of any published shape",
    "mutants": "the kill matrix: is every known way of being wrong noticed?",
    "mismatch": "which is wrong, the trainer's log-probabilities or the engine's?",
    "peers": "public implementations, judged one by one",
}


def main() -> int:
    return program.run("parity", COMMANDS, needs=("httpx",))


if __name__ == "__main__":
    raise SystemExit(main())
