"""A connection of every rank to rank 0 that nothing is sent over: the kernel closes it with the process.

Signs of life (`liveness`) find a rank that hangs, and take `lost_after_s` for it. A rank that dies, by kill -9 or for
want of memory, is known at once by its connection. A host that is lost closes nothing; there signs of life have to do.
(MPICH's mpirun ends the other ranks a millisecond after one has died, and so leaves no time to say anything.)
"""

from __future__ import annotations

import contextlib
import json
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

GOODBYE = b"."
TOGETHER_S = 0.02
"""Ranks that die together, as those of a node do, are told of together if they do it within this time."""
CONNECT_WITHIN_S = 5.0
LONGEST_HELLO = 2**12

OnDeath = Callable[[Mapping[int, str]], None]
"""Called, in a thread of its own, with the ranks whose processes have ended without a goodbye, and who they were."""


@dataclass
class _Caller:
    """One that has connected to rank 0.

    Attributes:
        heard: what it has sent until its hello is complete.
        rank: who it is; None until its hello, and where that is no rank's.
        who: the same for people.
        well: whether it has said goodbye.
    """

    connection: socket.socket
    heard: bytes = b""
    rank: int | None = None
    who: str = ""
    well: bool = False


class Held:
    """Rank 0's end of all connections.

    Args:
        address: where the other ranks reach this host; a loopback address is listened at alone.
        world: the number of ranks.
        on_death: see `OnDeath`.
    """

    def __init__(self, address: str, world: int, on_death: OnDeath) -> None:
        if address.startswith("127."):
            self._server = socket.create_server((address, 0), backlog=world + 16)
        else:
            both = socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if both else socket.AF_INET
            self._server = socket.create_server(("", 0), family=family, backlog=world + 16, dualstack_ipv6=both)
        self._server.setblocking(False)
        self._word = secrets.token_hex(16)
        self.where = json.dumps({"address": address, "port": self._server.getsockname()[1], "word": self._word})
        """For :class:`Followed`. Whoever does not know the word, such as a port scanner, is no rank."""
        self._on_death = on_death
        self._wake, self._woken = socket.socketpair()
        self._thread = threading.Thread(target=self._watch, name="lifelines", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Says goodbye: this process is about to end, and the others know why or need not."""
        self._wake.close()
        self._thread.join(1.0)

    def _watch(self) -> None:
        callers: dict[int, _Caller] = {}
        dead: dict[int, str] = {}
        tell_at: float | None = None
        with selectors.DefaultSelector() as selector:
            selector.register(self._server, selectors.EVENT_READ)
            selector.register(self._woken, selectors.EVENT_READ)
            while True:
                left = None if tell_at is None else max(0.0, tell_at - time.monotonic())
                ready = [key.fd for key, _ in selector.select(left)]
                if self._woken.fileno() in ready:
                    break
                for fd in ready:
                    if fd == self._server.fileno():
                        with contextlib.suppress(OSError):  # it has gone again
                            connection, _ = self._server.accept()
                            connection.setblocking(False)
                            callers[connection.fileno()] = _Caller(connection)
                            selector.register(connection, selectors.EVENT_READ)
                    elif not self._hear(callers[fd]):
                        caller = callers.pop(fd)
                        selector.unregister(caller.connection)
                        caller.connection.close()
                        if caller.rank is not None and not caller.well:
                            dead[caller.rank] = caller.who
                            tell_at = tell_at or time.monotonic() + TOGETHER_S
                if tell_at is not None and time.monotonic() >= tell_at:
                    self._on_death(dict(dead))
                    dead, tell_at = {}, None
            for caller in callers.values():
                with contextlib.suppress(OSError):
                    caller.connection.sendall(GOODBYE)
                caller.connection.close()
            self._server.close()
            self._woken.close()

    def _hear(self, caller: _Caller) -> bool:
        """Takes in what one has sent; whether it is still there."""
        try:
            heard = caller.connection.recv(LONGEST_HELLO)
        except BlockingIOError:
            return True
        except OSError:  # reset: its process is gone all the same
            return False
        if caller.rank is None:
            caller.heard += heard
            hello, end, heard_after = caller.heard.partition(b"\n")
            if end:
                with contextlib.suppress(ValueError, KeyError, TypeError):  # a stranger's
                    told = json.loads(hello)
                    if secrets.compare_digest(told["word"], self._word):
                        caller.rank, caller.who = int(told["rank"]), str(told["who"])
                if caller.rank is None:
                    return False
                caller.well = GOODBYE in heard_after
            return bool(heard) and len(caller.heard) <= LONGEST_HELLO
        caller.well = caller.well or GOODBYE in heard
        return bool(heard)


class Followed:
    """Another rank's end of its connection.

    Args:
        where: of rank 0's :class:`Held`.
        rank: this one's.
        who: this one, for people.
        on_death: see `OnDeath`; rank 0 is told of by an empty text.

    Raises:
        OSError: rank 0 cannot be reached there.
    """

    def __init__(self, where: str, rank: int, who: str, on_death: OnDeath) -> None:
        told = json.loads(where)
        self._connection = socket.create_connection((told["address"], told["port"]), timeout=CONNECT_WITHIN_S)
        self._connection.settimeout(None)
        hello = {"word": told["word"], "rank": rank, "who": who[: LONGEST_HELLO // 8]}
        self._connection.sendall(json.dumps(hello).encode() + b"\n")
        self._on_death = on_death
        self._over = False
        self._thread = threading.Thread(target=self._watch, name="lifeline", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Says goodbye: this process is about to end, and rank 0 knows why or need not."""
        self._over = True
        with contextlib.suppress(OSError):
            self._connection.sendall(GOODBYE)
            self._connection.shutdown(socket.SHUT_RDWR)
        self._thread.join(1.0)
        self._connection.close()

    def _watch(self) -> None:
        try:
            heard = self._connection.recv(1)
        except OSError:
            heard = b""
        if heard != GOODBYE and not self._over:
            self._on_death({0: ""})
