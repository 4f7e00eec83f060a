"""Processes of ours, `python -m reference.hf ...`, forked from one that has the libraries loaded already.

Importing torch, transformers and Meta's code takes a process 3 to 8 s of CPU, and a check starts four: most of what the
suite once took. A process forked here is what a fresh one is: its own memory, arguments, environment, folder, standard
streams and exit code, and every module of ours is imported anew. What starts in any other way starts as ever, and so
does everything in a test that asks for the fixture `cold_processes`.

`warm` is the side of the tests; this file run as a script is the process that forks.
"""

import atexit
import contextlib
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

OURS = ("reference", "parity", "nanollama", "finetune")
LIBRARIES = {
    "": ("torch", "safetensors.torch", "numpy"),
    "reference.hf": ("transformers.models.llama.modeling_llama", "tokenizers"),
    "reference.meta": ("fairscale.nn.model_parallel.layers", "llama_models.llama3.model"),
}
# What the libraries read when they are imported: a process that asks for other values is started cold.
READ_AT_IMPORT = ("OMP_", "MKL_", "KMP_", "TORCH", "PYTORCH_", "HF_", "TRANSFORMERS_", "CUDA_", "PYTHONHASHSEED")
ALWAYS = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}  # as parity starts its processes
RealPopen = subprocess.Popen


def settings(environment: dict[str, str]) -> dict[str, str]:
    return {key: value for key, value in (environment | ALWAYS).items() if key.startswith(READ_AT_IMPORT)}


class Zygote:
    """The forking process, started when it is first needed; it ends when its standard input does."""

    def __init__(self) -> None:
        self.settings = settings(dict(os.environ))
        ours, theirs = socket.socketpair()
        environment = {k: v for k, v in (os.environ | ALWAYS).items() if k != "PYTHONPATH"}
        with theirs:
            line = [sys.executable, __file__, str(theirs.fileno())]
            self.process = RealPopen(line, stdin=subprocess.PIPE, env=environment, pass_fds=[theirs.fileno()])
        self.door = ours

    def fork(self, request: dict[str, Any], streams: list[int]) -> tuple[socket.socket, int]:
        """The connection on which the exit status will come, and the process's id."""
        mine, its = socket.socketpair()
        with its:
            socket.send_fds(self.door, [b"x"], [its.fileno(), *streams])
        mine.sendall(json.dumps(request).encode() + b"\n")
        return mine, int(read_line(mine))

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.door.close()
        self.process.wait()


def read_line(connection: socket.socket) -> bytes:
    """A line; what was read before the other side closed its end, if that comes first."""
    line = b""
    while not line.endswith(b"\n") and (more := connection.recv(1)):
        line += more
    return line


class WarmPopen(RealPopen):  # type: ignore[type-arg]
    """`subprocess.Popen` that asks the zygote for processes of ours. Overrides what differs: birth and death."""

    zygote: Zygote | None = None
    connection: socket.socket | None = None

    def _execute_child(self, args: Any, executable: Any, preexec_fn: Any, close_fds: Any, *rest: Any) -> None:
        pass_fds, cwd, env, _, _, shell, p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, *others = rest
        request = None if executable or preexec_fn or pass_fds or shell or unusual(others) else asked(args, cwd, env)
        if request is not None:
            request["session"] = bool(others[5])
        if request is None:
            super()._execute_child(args, executable, preexec_fn, close_fds, *rest)  # type: ignore[misc]
            return
        if WarmPopen.zygote is None:
            WarmPopen.zygote = Zygote()
        streams = [p2cread, c2pwrite, errwrite]
        streams = [own if stream == -1 else stream for own, stream in enumerate(streams)]
        self.connection, self.pid = WarmPopen.zygote.fork(request, streams)
        self._child_created = True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)  # type: ignore[attr-defined]

    def _internal_poll(self, *args: Any, **kwargs: Any) -> int | None:
        if self.connection is None:
            return super()._internal_poll(*args, **kwargs)  # type: ignore[misc,no-any-return]
        if self.returncode is None:
            self._try_wait(os.WNOHANG)
        return self.returncode

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        if self.connection is None:
            return super()._try_wait(wait_flags)  # type: ignore[misc,no-any-return]
        self.connection.setblocking(not wait_flags & os.WNOHANG)
        try:
            said = read_line(self.connection)
        except BlockingIOError:
            return 0, 0
        self.connection.close()
        status = int(said) if said else signal.SIGKILL  # the zygote is gone, and what it forked with it
        self.returncode = os.waitstatus_to_exitcode(status)
        return self.pid, status


def unusual(others: list[Any]) -> bool:
    """restore_signals, gid, gids, uid, umask, start_new_session, process_group: anything but their defaults, or a
    session of its own."""
    return others[1:5] != [None, None, None, -1] or any(group not in (-1, None) for group in others[6:])


def asked(args: Any, cwd: Any, env: Any) -> dict[str, Any] | None:
    """The request, if `args` is `python -m` a module of ours and nothing differs that libraries read at import."""
    if not isinstance(args, list) or len(args) < 3 or list(map(str, args[:2])) != [sys.executable, "-m"]:
        return None
    environment = {os.fsdecode(k): os.fsdecode(v) for k, v in (os.environ if env is None else env).items()}
    here = settings(dict(os.environ)) if WarmPopen.zygote is None else WarmPopen.zygote.settings
    if str(args[2]).partition(".")[0] not in OURS or settings(environment) != here:
        return None
    return {"argv": list(map(str, args[2:])), "cwd": os.fspath(cwd or os.getcwd()), "env": environment}


@contextlib.contextmanager
def warm() -> Iterator[None]:
    """Inside, processes of ours are forked. One zygote for the session; `stop` ends it."""
    subprocess.Popen = WarmPopen  # type: ignore[misc]
    try:
        yield
    finally:
        subprocess.Popen = RealPopen  # type: ignore[misc]


def stop() -> None:
    if WarmPopen.zygote is not None:
        WarmPopen.zygote.close()
        WarmPopen.zygote = None


# --- The process that forks ------------------------------------------------------------------------------------------


def serve(door: socket.socket) -> None:
    """Until standard input ends: fork for each request, tell each exit status."""
    wakes, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    born: dict[int, socket.socket] = {}
    with selectors.DefaultSelector() as selector:
        for file in (door, wakes, 0):
            selector.register(file, selectors.EVENT_READ)
        while True:
            ready = [key.fileobj for key, _ in selector.select()]
            if 0 in ready:
                return
            if wakes in ready:
                os.read(wakes, 4096)
                reap(born)
            if door in ready and not admit(door, born):
                return


def reap(born: dict[int, socket.socket]) -> None:
    while born:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        with born.pop(pid) as connection, contextlib.suppress(OSError):  # nobody waits for it any longer
            connection.sendall(b"%d\n" % status)


def admit(door: socket.socket, born: dict[int, socket.socket]) -> bool:
    """One request; False when the door was closed. In the child this does not return."""
    message, fds, _, _ = socket.recv_fds(door, 1, 4)
    if not message:
        return False
    connection = socket.socket(fileno=fds[0])
    request = json.loads(read_line(connection))
    for name in LIBRARIES[""] + LIBRARIES.get(request["argv"][0], ()):
        importlib.import_module(name)
    pid = os.fork()
    if pid == 0:
        door.close()
        for other in (*born.values(), connection):
            other.close()
        become(request, fds[1:])
    for fd in fds[1:]:
        os.close(fd)
    born[pid] = connection
    connection.sendall(b"%d\n" % pid)
    return True


def become(request: dict[str, Any], streams: list[int]) -> None:
    """The life of a forked process, to its exit."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if request["session"]:
        os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin = sys.__stdin__ = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = sys.__stdout__ = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    more = [os.path.abspath(p) for p in request["env"].get("PYTHONPATH", "").split(os.pathsep) if p]
    sys.path[:] = [request["cwd"], *more, *sys.path[1:]]
    sys.argv = request["argv"]
    os._exit(outcome(request["argv"][0]))


def outcome(module: str) -> int:
    """What an interpreter makes of a module's end."""
    code: Any = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as leaving:
        code = leaving.code
        if code is not None and not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    return (code or 0) & 0xFF


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as door, contextlib.suppress(KeyboardInterrupt):
        serve(door)
