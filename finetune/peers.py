"""The other ranks of a run: who died, who left, who does not come. One thread a rank, connected to rank 0's.

    torchrun --nproc_per_node 4 -m finetune.text --data notes/ --out out/notes     # in another window: kill -9 4242
    error: rank 2 of 4 (process 4242 on host) died, killed or out of memory; the last good checkpoint is ...

A process that dies closes its connections, whatever it died of, so the others know at once and without a false alarm; a
machine that vanishes is noticed by TCP keepalive. The thread ends its process, since the main one may wait in a
collective that nothing else ends. Nothing here computes, and no torch is needed: a store is any object with set, get
and check, as torch.distributed's.
"""

import atexit
import faulthandler
import json
import os
import secrets
import selectors
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn, Protocol

ANSWER_S = 5.0  # for a rank to send its stacks, to end by itself, to hear why a collective broke
SEEN_S = 1.0  # for torchrun to see which rank was the first to end, before the others do
DIED = 1  # exit code of the ranks that are left
ADDRESS = "nanollama/peers"  # in the store
# An idle connection is asked after 5 s, and given up after 3 more questions: a vanished machine is noticed in 20 s.
KEEPALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 20_000}


class Store(Protocol):
    def set(self, key: str, value: str, /) -> None: ...
    def get(self, key: str, /) -> bytes: ...
    def check(self, keys: list[str], /) -> bool: ...


class Peers:
    """This rank's connections to the others: rank 0 has one to each, the others have one to rank 0.

    Each also has one to itself, by which its main thread speaks to its own watching one.
    """

    def __init__(self, rank: int, size: int, local_rank: int, limit_s: float, links: dict[int, socket.socket]) -> None:
        self.rank, self.size, self.local_rank, self.limit_s = rank, size, local_rank, limit_s
        self.advice: Callable[[], str] = lambda: ""  # what to do next, for the line about a dead rank
        self.left: dict[int, int] = {}  # ranks that have said that they end, with their exit codes
        self.names: dict[int, str] = {}
        self.late: set[int] = set()  # ranks whose collective came to no end
        self.stacks: dict[int, str] = {}
        self.verdict_at: float | None = None  # of a hang, when all have had time to answer
        self.broken_at = ""  # the stack of this rank's error
        self.told = threading.Event()  # the others know that this rank leaves
        self.ready_to_end = threading.Event()  # the main thread has nothing left to do or to say
        self.own, mine = socket.socketpair()
        self.links = {**links, rank: mine}
        self.unread: dict[int, bytes] = dict.fromkeys(self.links, b"")
        os.register_at_fork(after_in_child=self._close_links)  # a child that lives on would hide this rank's death
        self.thread = threading.Thread(target=self._watch, name="peers", daemon=True)

    # --- The main thread -----------------------------------------------------------------------------------------

    def guard(self, act: Callable[[], int]) -> int:
        """`act()`, whose exit code the others are told; its errors, too, unless another rank's end is their cause."""
        try:
            code = act()
        except BaseException as error:
            self._explain(error)
            raise
        self.leave(code)
        return code

    def leave(self, code: int) -> None:
        """Tell the others that this rank's end is no accident."""
        if code:  # what the launcher does about the first rank that ends must not change the code of this one
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self.ready_to_end.set()
        self._tell_own({"kind": "left", "code": code})
        self.told.wait(ANSWER_S)

    def _explain(self, error: BaseException) -> None:
        """Wait for the thread to end this process, where the error is but the echo of what another rank did."""
        code = {KeyboardInterrupt: 130, SystemExit: getattr(error, "code", 1)}.get(type(error), 1)
        code = 2 if isinstance(error, ValueError) else code
        wait_s = 0.0 if isinstance(error, (KeyboardInterrupt, SystemExit)) else ANSWER_S / 2 + SEEN_S
        if isinstance(error, ValueError):
            wait_s = 1.0 if self.rank else 0.0  # most likely rank 0 refuses the same, and its line is enough
        if wait_s:
            self.broken_at = "".join(traceback.format_exception(error))
            if isinstance(error, RuntimeError) and (
                "timed out" in str(error).lower() or "timeout" in str(error).lower()
            ):
                self._tell_own({"kind": "late", "stack": self.broken_at})
            self.ready_to_end.set()
            self._wait_for_the_thread(wait_s)
        # When its message or traceback is out: the launcher may end us as soon as another rank has ended.
        atexit.register(self.leave, code)

    def _wait_for_the_thread(self, wait_s: float) -> None:
        """It ends the process if another rank is the cause; a hang takes it longer to judge."""
        began = time.monotonic()
        while time.monotonic() < began + wait_s or (self.late and time.monotonic() < began + 3 * ANSWER_S):
            time.sleep(0.05)

    def _tell_own(self, message: dict[str, Any]) -> None:
        _send(self.own, {**message, "rank": self.rank})

    # --- The watching thread -------------------------------------------------------------------------------------

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for rank, link in self.links.items():
                selector.register(link, selectors.EVENT_READ, rank)
            while True:
                for key, _ in selector.select(0.2 if self.late else None):
                    if not self._hear(key.data):
                        selector.unregister(key.fileobj)
                        self._closed(key.data)
                if self.verdict_at and time.monotonic() > self.verdict_at:
                    self._judge_hang()

    def _hear(self, link: int) -> bool:
        """Take what came by this link; False when it was closed."""
        try:
            came = self.links[link].recv(65536)
        except OSError:
            came = b""
        *whole, self.unread[link] = (self.unread[link] + came).split(b"\n")
        for line in whole:
            self._take(json.loads(line))
        return bool(came)

    def _take(self, message: dict[str, Any]) -> None:
        kind, rank = message["kind"], message["rank"]
        if rank == self.rank and rank and kind != "end":  # of the main thread
            self._send_to(0, message)
        if kind == "left":
            self._take_leave(rank, message["code"])
        elif kind == "late":
            self.late.add(rank)
            self.stacks[rank] = message["stack"]
            self._gather_stacks()
        elif kind == "stacks":
            self.stacks.setdefault(rank, message["stack"])
        elif kind == "send stacks":
            self.late.add(rank)
            kind = "late" if self.broken_at else "stacks"
            self._send_to(0, {"kind": kind, "rank": self.rank, "stack": self.broken_at or _stacks()})
        elif kind == "end":
            self._end(message["code"], message["said"], message["gone"])

    def _take_leave(self, rank: int, code: int) -> None:
        """A rank has said that it ends: the others go on where it has done its part, and follow where it has not."""
        self.left[rank] = code
        if self.rank == 0 and (code or rank == 0):
            self._send_all({"kind": "left", "rank": rank, "code": code})
        if rank == self.rank:
            self.told.set()
        elif code:
            self._end(code, "", [])

    def _closed(self, rank: int) -> None:
        """The process behind this link is no more."""
        if rank in self.left or rank == self.rank:
            return
        name = f"rank {rank} of {self.size} ({self.names.get(rank, 'it')})"
        said = f"error: {name} died, killed or out of memory{self._advice()}"
        self._end_all(DIED, said, [rank])

    def _gather_stacks(self) -> None:
        """The first late rank makes rank 0 ask the others where they are; without rank 0, each is on its own."""
        if self.verdict_at:
            return
        self.verdict_at = time.monotonic() + (ANSWER_S if self.rank == 0 else 2 * ANSWER_S)
        if self.rank == 0:
            self.stacks.setdefault(0, self.broken_at or _stacks())
            self._send_all({"kind": "send stacks", "rank": min(self.late)})

    def _judge_hang(self) -> None:
        """Every stack, and the line that says who waited for whom."""
        if self.broken_at:
            self.late.add(self.rank)
        waited = sorted(self.late)
        if self.rank:
            missing, silent = "rank 0, which does not answer", [0]
        else:
            others = [rank for rank in range(self.size) if rank not in self.late]
            silent = [rank for rank in others if rank not in self.stacks]
            missing = ", ".join(f"rank {r}" + ", which does not answer" * (r in silent) for r in others) or "each other"
        stacks = "".join(f"--- stack of rank {r}\n{text.rstrip()}\n" for r, text in sorted(self.stacks.items()))
        names = f"rank{'s' * (len(waited) > 1)} {', '.join(map(str, waited))}"
        said = (
            f"{stacks}error: {names} waited {self.limit_s:g} s (--collective_timeout_s) in a collective for {missing}"
        )
        self._end_all(DIED, said + self._advice(), silent)

    def _end_all(self, code: int, said: str, gone: list[int]) -> NoReturn:
        if self.rank == 0:
            self._send_all({"kind": "end", "rank": 0, "code": code, "said": said, "gone": gone})
        self.ready_to_end.set()
        self._end(code, said, gone)

    def _end(self, code: int, said: str, gone: list[int]) -> NoReturn:
        """End this process; the first rank of a machine that is left speaks, unless nothing has to be said."""
        speaks = self.local_rank == 0 or (self.local_rank == 1 and self.rank - 1 in gone)
        if said and speaks:
            os.write(2, f"\n{said}\n".encode())  # behind the progress bar, which ends in no newline
        if said:
            time.sleep(SEEN_S)
        else:  # another rank has said its own: this one may have a last word, too
            self.ready_to_end.wait(ANSWER_S)
            self._send_all({"kind": "left", "rank": self.rank, "code": code})
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)

    def _advice(self) -> str:
        with suppress(OSError):
            return self.advice()
        return ""

    def _send_all(self, message: dict[str, Any]) -> None:
        for rank in self.links:
            if rank != self.rank and rank not in self.left:
                self._send_to(rank, message)

    def _send_to(self, rank: int, message: dict[str, Any]) -> None:
        with suppress(OSError):  # its end is heard by the link itself
            _send(self.links[rank], message)

    def _close_links(self) -> None:
        for link in self.links.values():
            link.close()


def meet(store: Store, rank: int, size: int, local_rank: int, host: str, limit_s: float) -> Peers:
    """Connect with the other ranks, which call this too, and start to watch.

    host: by which rank 0 is reached; limit_s: of the process group's collectives, for messages.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminated)
    try:
        links, names = _serve(store, size, host) if rank == 0 else _join(store, rank)
    except SystemExit:
        if rank and local_rank < 2:
            print(f"error: stopped while rank 0 of {size} had not come yet", file=sys.stderr, flush=True)
        raise
    peers = Peers(rank, size, local_rank, limit_s, links)
    peers.names = names
    for link in links.values():
        _keep_alive(link)
    peers.thread.start()
    return peers


def _terminated(number: int, frame: object) -> NoReturn:
    """SIGTERM outside the loop. The launcher sends it when a rank died: then the thread has a line to say first."""
    time.sleep(0.5)
    raise SystemExit(128 + number)


def _serve(store: Store, size: int, host: str) -> tuple[dict[int, socket.socket], dict[int, str]]:
    token, names = secrets.token_hex(16), {0: _own_name()}
    links: dict[int, socket.socket] = {}
    with _listening(host) as server:
        port = server.getsockname()[1]
        store.set(ADDRESS, json.dumps({"host": host, "port": port, "token": token, "name": names[0]}))
        try:
            while len(links) < size - 1:
                link = _accept(server)
                if link and (hello := _hello(link)) and secrets.compare_digest(str(hello["token"]), token):
                    links[hello["rank"]], names[hello["rank"]] = link, hello["name"]
        except SystemExit:
            absent = ", ".join(str(rank) for rank in range(1, size) if rank not in links)
            print(f"error: stopped while rank {absent} of {size} had not come yet", file=sys.stderr, flush=True)
            raise
    return links, names


def _listening(host: str) -> socket.socket:
    family, _, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    server = socket.socket(family, socket.SOCK_STREAM)
    try:
        server.bind(address)
    except OSError:  # the name is a router's, or another machine's that forwards to this one
        server.bind(("", 0))
    server.listen()
    server.settimeout(0.5)
    return server


def _accept(server: socket.socket) -> socket.socket | None:
    try:
        link, _ = server.accept()
    except TimeoutError:
        return None
    link.settimeout(ANSWER_S)
    return link


def _hello(link: socket.socket) -> dict[str, Any] | None:
    """What a rank says first; None for a stranger."""
    try:
        said = b""
        while not said.endswith(b"\n") and len(said) < 4096 and (more := link.recv(4096)):
            said += more
        hello = json.loads(said)
        link.settimeout(None)
        return hello if isinstance(hello, dict) and {"token", "rank", "name"} <= hello.keys() else None
    except (OSError, ValueError):
        return None


def _join(store: Store, rank: int) -> tuple[dict[int, socket.socket], dict[int, str]]:
    wait_for(store, ADDRESS)
    there = json.loads(store.get(ADDRESS))
    link = socket.create_connection((there["host"], there["port"]), timeout=60)
    link.settimeout(None)
    _send(link, {"token": there["token"], "rank": rank, "name": _own_name()})
    return {0: link}, {0: there["name"]}


def wait_for(store: Store, key: str) -> None:
    """Until the key is set, however long it takes: whoever should set it and dies is heard of by the peers' thread."""
    pause_s = 0.001
    while not store.check([key]):  # not store.wait, in which no signal is handled
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 0.1)


def _own_name() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _keep_alive(link: socket.socket) -> None:
    if link.family not in (socket.AF_INET, socket.AF_INET6):
        return
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _send(link: socket.socket, message: dict[str, Any]) -> None:
    link.sendall(json.dumps(message).encode() + b"\n")


def _stacks() -> str:
    """Where every thread of this process is."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()
