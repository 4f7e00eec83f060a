"""A program that answers by a table of logits, one row a token, and misbehaves in one of many ways.

python tests/ports/hostile_program.py TABLE.json KIND < requests
"""

import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

ROWS = json.loads(Path(sys.argv[1]).read_text())
KIND = sys.argv[2]
FOREVER = 3600


def write(file: str, ids: list[int]) -> None:
    numbers = [x for i in ids for x in ROWS[i]]
    if KIND == "NaN":
        numbers[0] = float("nan")
    if KIND == "infinite":
        numbers[-1] = float("inf")
    if KIND == "one too few":
        numbers.pop()
    if KIND == "one too many":
        numbers.append(0.0)
    Path(file).write_bytes(struct.pack(f"<{len(numbers)}f", *numbers))


def replace(file: str, kind: str) -> None:
    """Something else in the file's place."""
    path = Path(file)
    right = path.rename(path.with_name("right"))
    if kind == "a link to a file":
        path.symlink_to(right)
    if kind == "a link to a device":
        path.symlink_to("/dev/zero")
    if kind == "a pipe":
        os.mkfifo(path)
    if kind == "a folder":
        path.mkdir()
    if kind == "a terabyte":
        with path.open("wb") as out:
            out.truncate(1 << 40)


def misbehave(line: str) -> str | None:
    """In place of an answer, or of a right one; None: after it, as ever."""
    file = line.split()[1]
    if KIND == "never answers":
        time.sleep(FOREVER)
    if KIND == "a byte at a time":
        while True:
            os.write(1, b".")
            time.sleep(0.02)
    if KIND == "without end":
        while True:
            os.write(1, b"o" * 65536)
    if KIND == "loud beside":
        os.write(2, b"\x1b[2J all is well \n" * 300_000)  # 5 MB: more than any pipe holds
    if KIND == "leaves a child":
        subprocess.Popen(["sleep", str(FOREVER)])  # which holds all of its streams
        sys.exit(3)
    if KIND == "waits for a child":
        subprocess.run(["sleep", str(FOREVER)])
    if KIND == "kills itself":
        os.kill(os.getpid(), signal.SIGSEGV)
    if KIND == "kills its parent":
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(FOREVER)
    if KIND == "closes its output":
        os.close(1)
        time.sleep(FOREVER)
    if KIND == "says it twice":
        os.write(1, b"ok\n")
    if KIND == "orders":
        return "error \x1b]0;owned\x07\x1b[2Jno"
    if KIND == "a shape of words":
        return "ok [1, 3, {}]"
    if KIND == "a deep shape":
        return "ok " + "[" * 100_000
    if KIND == "an immense shape":
        return "ok [1, 99999999999, 99999999999]"
    if KIND == "a file less":
        Path(file).unlink()
    if KIND in ("a link to a file", "a link to a device", "a pipe", "a folder", "a terabyte"):
        replace(file, KIND)
    return None


def main() -> None:
    for line in sys.stdin:
        said = "ok logits"
        if line.startswith("logits"):
            write(line.split()[1], [int(i) for i in line.split()[2:]])
            said = misbehave(line) or "ok"
        elif KIND == "never begins":
            time.sleep(FOREVER)
        print(said, flush=True)
        if KIND == "reads no more":
            time.sleep(FOREVER)


if __name__ == "__main__":
    main()
