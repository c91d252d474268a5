"""Where the ranks of a run meet: they learn that all are there and alike, and exchange small texts.

Imports torch only when a store is needed; under mpirun texts go through MPI.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, ClassVar, Protocol, TypeVar

from ..errors import FAILED, ToldElsewhere, UserError
from .patience import Patience, Wait
from .pause import Pause
from .ranks import Ranks
from .stop import StopRequest

if TYPE_CHECKING:
    from torch.distributed import Store

T = TypeVar("T")

START_WITHIN_S = 180.0
"""How long ranks wait for each other by default: importing torch on many ranks of a busy host takes most of it."""

ANSWER_WITHIN_S = 10.0
"""How much longer others wait for rank 0 than rank 0 for them, so that they hear from it who is missing."""

STOPPED_ANSWER_WITHIN_S = 5.0
"""The same after a stop signal."""

CONNECT_WITHIN_S = 1.0
"""How long one attempt to reach rank 0 may take: a lost host answers nothing, and stop signals are heard in between."""

TELL_WITHIN_S = 1.0
"""How long the others leave to rank 0 to tell what is wrong."""

TOLD_WITHIN_S = 5.0
"""How long a process whose rank was given twice waits for rank 0 to tell of it."""


class RankMissing(UserError, RuntimeError):
    """Ranks have not come within the time, or are gone. The message names them."""

    exit_code = FAILED


class Exchange(Protocol):
    """Texts from all ranks to rank 0 and back. `name` is the same in all ranks, and another for every exchange."""

    def gather(self, name: str, text: str, within_s: float) -> list[str | None]:
        """Rank 0: the text of every rank, its own first; None for those that have not come within the time, or soon
        after it was told to stop."""
        ...

    def answer(self, name: str, text: str, there: Sequence[int]) -> None:
        """Rank 0: hands `text` to the ranks that are `there`; returns when they have it, so that it may end then."""
        ...

    def ask(self, name: str, text: str, within_s: float) -> str | None:
        """The other ranks: hands `text` to rank 0; what it answers, or None where nothing comes within the time.

        Raises StoppedWaiting where nothing comes soon after this rank was told to stop.
        """
        ...


class Rendezvous:
    """The ranks of a run, met. Every rank makes one, and calls its methods in the same order.

    Under mpirun texts go through MPI, else through a store of torch.distributed at the address of `ranks`; `store`
    is there in any case. Once `stop` asks for it, ranks do not wait for each other for long any more, and say for whom
    they wait: `segment_of` tells for people in which segment a rank is. Raises UserError where the port is taken, or
    another process has the same rank, RankMissing where rank 0 cannot be reached, and StoppedWaiting where it has not
    come soon after this rank was told to stop.
    """

    begun: ClassVar[bool] = False
    """Whether this process has begun to meet others."""

    def __init__(
        self,
        ranks: Ranks,
        start_within_s: float = START_WITHIN_S,
        stop: StopRequest | None = None,
        segment_of: Callable[[int], str] | None = None,
    ) -> None:
        self.ranks = ranks
        self._patience = Patience(ranks, stop, segment_of)
        self._within_s = start_within_s
        self._calls: dict[str, int] = {}
        self._store: Store | None = None
        self._exchange: Exchange | None = None
        if ranks.world == 1:
            return
        Rendezvous.begun = True
        if ranks.started_by == "mpirun":
            from .mpi import MpiExchange

            self._exchange = MpiExchange(ranks, self._patience)
        else:
            self._exchange = StoreExchange(self.store, ranks, self._patience)

    @property
    def store(self) -> Store:
        """A store that all ranks share, for torch.distributed and for `Heartbeats`; wrap it in a PrefixStore for each.

        Rank 0's process holds it, under torchrun its agent: rank 0 must be the last to end. Under mpirun it is
        connected when first asked for, by all ranks.
        """
        if self._store is None:
            self._store = connect(self.ranks, self._within_s, self._patience)
        return self._store

    @property
    def store_holder(self) -> str | None:
        """Who holds the store, where that is not rank 0."""
        return f"torchrun's agent at {self.ranks.address}:{self.ranks.port}" if self.ranks.agent_store else None

    def allgather(self, key: str, text: str, within_s: float | None = None) -> list[str]:
        """The texts of all ranks, in their order. For small texts: all go through rank 0.

        `key` says in error messages what was exchanged, and may be used again. Raises RankMissing on every rank that
        is there where one has not come within `within_s` seconds (default: as long as at the start), or StoppedWaiting
        where one has not come soon after a stop signal.
        """
        if self._exchange is None:
            return [text]
        within_s = self._within_s if within_s is None else within_s
        count = self._calls[key] = self._calls.get(key, 0) + 1
        name = f"{key}/{count}"
        if self.ranks.rank == 0:
            texts = self._exchange.gather(name, text, within_s)
            reply = json.dumps({"texts": texts, "stopped": self._patience.reason})
            self._exchange.answer(
                name, reply, [rank for rank, text_of in enumerate(texts) if rank > 0 and text_of is not None]
            )
        else:
            answer = self._exchange.ask(name, text, within_s + ANSWER_WITHIN_S)
            if answer is None:
                host, address = self.ranks.host_of(0), self.ranks.address
                where = f"at {address}" if host in (None, address) else f"on {host}, at {address}"
                raise RankMissing(
                    f"rank 0 ({where}) gave no answer to rank {self.ranks.rank} within "
                    f"{within_s + ANSWER_WITHIN_S:.0f} s ({key}): look for its error"
                )
            reply = answer
        told = json.loads(reply)
        found: list[str | None] = told["texts"]
        missing = [rank for rank, text_of in enumerate(found) if text_of is None]
        if missing and told["stopped"]:
            raise self._patience.stopped(missing, told["stopped"])
        if missing:
            hosts = sorted({host for rank in missing if (host := self.ranks.host_of(rank)) is not None})
            where = f" (on {', '.join(hosts)})" if hosts else ""
            raise RankMissing(
                f"{ranks_named(missing)} of {self.ranks.world} not there after {within_s:.0f} s ({key}): look for "
                f"errors of {'that rank' if len(missing) == 1 else 'those ranks'}{where}, and whether all hosts run "
                f"the same program and reach {self.ranks.address}"
            )
        return [text_of for text_of in found if text_of is not None]

    def barrier(self, key: str = "barrier", within_s: float | None = None) -> None:
        """Returns once all ranks have come here. Raises like `allgather`."""
        self.allgather(key, "", within_s)

    def prepared(self, problem: str = "") -> None:
        """Returns once all ranks are there, and none has found something wrong: `problem` is what this one has.

        Else rank 0 raises UserError, which says what which rank found; the others raise ToldElsewhere.
        """
        problems = self.allgather("preparing the run", problem)
        found = [(rank, text) for rank, text in enumerate(problems) if text]
        if not found:
            return
        if self.ranks.rank != 0:
            raise _told_by_rank_0()
        if len(found) == self.ranks.world and len({text for _, text in found}) == 1:
            raise UserError(found[0][1])
        raise UserError("; ".join(f"rank {rank}: {text}" for rank, text in found))

    def agree(self, facts: Mapping[str, str]) -> None:
        """`agree_on_start` of these ranks."""
        agree_on_start(self.ranks, self.allgather, facts)


def agree_on_start(ranks: Ranks, gather: Callable[[str, str], list[str]], facts: Mapping[str, str]) -> None:
    """Returns where all ranks hold the same facts: name -> value, such as versions and the digest of the config.

    `gather` is `Rendezvous.allgather`. Else rank 0 raises UserError, which names the facts that differ, their values
    and the ranks that hold them; the others raise ToldElsewhere.
    """
    mine = json.dumps({"host": ranks.host, "facts": dict(facts)})
    told = [json.loads(text) for text in gather("start", mine)]
    problems = []
    for fact in sorted({name for rank in told for name in rank["facts"]}):
        holders: dict[str, list[int]] = {}
        for rank, theirs in enumerate(told):
            holders.setdefault(theirs["facts"].get(fact, "not given"), []).append(rank)
        if len(holders) > 1:
            # The most common value first: what differs from it is what to look at.
            parts = sorted(holders.items(), key=lambda item: (-len(item[1]), item[1]))
            problems.append(
                f"{fact}: "
                + "; ".join(
                    f"{value} on {ranks_named(who)} ({', '.join(sorted({told[rank]['host'] for rank in who}))})"
                    for value, who in parts
                )
            )
    if problems and ranks.rank != 0:
        raise _told_by_rank_0()
    if problems:
        raise UserError(
            "the ranks are not alike. "
            + ". ".join(problems)
            + ". All ranks need the same configuration and the same versions: compare files and environments there"
        )


def _told_by_rank_0() -> ToldElsewhere:
    """Gives rank 0 the time to tell it: whoever has started the ranks may end all once one has ended."""
    time.sleep(TELL_WITHIN_S)
    return ToldElsewhere()


def ranks_named(ranks: list[int]) -> str:
    """ "rank 1", or "ranks 1, 2"."""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def connect(ranks: Ranks, within_s: float, patience: Patience | None = None) -> Store:
    """The store of these ranks: held by rank 0, unless torchrun's agent does. For one rank, one in memory.

    Raises UserError where rank 0 finds its port taken, RankMissing where it cannot be reached in time, and
    StoppedWaiting where it was not reached soon after this rank was told to stop.
    """
    from torch.distributed import DistError, HashStore, PrefixStore, TCPStore

    patience = patience or Patience(ranks, None, None)
    prefix = f"gtddp/{ranks.attempt}"
    if ranks.world == 1:
        return HashStore()
    timeout = timedelta(seconds=within_s)
    if ranks.rank == 0 and not ranks.agent_store:
        try:
            held = TCPStore(
                ranks.address,
                ranks.port,
                None,
                is_master=True,
                timeout=timeout,
                wait_for_workers=False,
                master_listen_fd=_loopback_listener(ranks) if ranks.listen_fd is None else ranks.listen_fd,
            )
        except (DistError, OSError) as error:
            if "EADDRINUSE" not in str(error) and getattr(error, "errno", None) != errno.EADDRINUSE:
                raise
            raise UserError(
                f"port {ranks.port} of {ranks.host}, where the ranks are to meet, is in use by another process: "
                f"end that, or choose another port ({_PORT_ADVICE[ranks.started_by]})"
            ) from error
        return PrefixStore(prefix, held)
    wait = patience.wait(within_s, lambda: [0])
    _wait_for_port(ranks, wait, within_s)
    # Under gtddp and mpirun somebody listens there before rank 0 has come so far as to answer.
    early = ranks.started_by in ("gtddp", "mpirun")
    answer_s = max(wait.left_s, 1.0) if early else min(ANSWER_WITHIN_S, within_s)

    def join() -> TCPStore:
        wait = timedelta(seconds=answer_s)
        return TCPStore(ranks.address, ranks.port, None, is_master=False, timeout=wait, wait_for_workers=False)

    try:
        joined = _within(patience.wait(answer_s + 1.0, lambda: [0]), join)
    except DistError as error:
        raise _unreachable(ranks, within_s, str(error).splitlines()[0]) from error
    if joined is None:
        raise RankMissing(
            f"rank {ranks.rank} on {ranks.host} found a process at {ranks.address}:{ranks.port} that is not "
            f"{_holder(ranks)}: it gave no answer within {answer_s:.0f} s. Look for the error of rank 0, and whether "
            f"another program has that port ({_PORT_ADVICE[ranks.started_by]})"
        )
    joined.set_timeout(timeout)
    return PrefixStore(prefix, joined)


def _loopback_listener(ranks: Ranks) -> int | None:
    """A descriptor of a socket that listens at the address of `ranks` alone, where that is a loopback one; else None,
    and TCPStore listens on all networks, since other hosts are to reach it."""
    if not ranks.address.startswith("127."):
        return None
    with socket.create_server((ranks.address, ranks.port), backlog=ranks.world + 128) as listener:
        return listener.detach()


def _within(wait: Wait, work: Callable[[], T]) -> T | None:
    """What `work` returns or raises; None where that takes longer than `wait`. TCPStore waits for ever for an answer to
    its first words, whatever its time-out."""
    results: list[T] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            results.append(work())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="join the store", daemon=True)
    thread.start()
    while thread.is_alive() and not wait.is_over():
        thread.join(0.1)
    if errors:
        raise errors[0]
    if not results:
        wait.raise_if_stopped()
    return results[0] if results else None


_PORT_ADVICE = {
    "alone": "MASTER_PORT",
    "gtddp": "start again",
    "torchrun": "torchrun --master-port",
    "mpirun": "MASTER_PORT of rank 0",
    "srun": "MASTER_PORT in the job's script",
}


def _wait_for_port(ranks: Ranks, wait: Wait, within_s: float) -> None:
    """Returns once somebody listens there. TCPStore's own attempts print a page for each that fails."""
    while True:
        try:
            socket.create_connection((ranks.address, ranks.port), timeout=CONNECT_WITHIN_S).close()
            return
        except OSError as error:
            if wait.is_over():
                wait.raise_if_stopped()
                raise _unreachable(ranks, within_s, str(error)) from error
        time.sleep(0.2)


def _unreachable(ranks: Ranks, within_s: float, reason: str) -> RankMissing:
    return RankMissing(
        f"rank {ranks.rank} on {ranks.host} did not reach {_holder(ranks)} at {ranks.address}:{ranks.port} within "
        f"{within_s:.0f} s ({reason}): look for its error, and whether hosts can connect to each other at that port"
    )


class StoreExchange:
    """Texts through a store of torch.distributed (`Exchange`).

    It asks again and again rather than waiting in the store: a wait that runs out prints warnings from torch, and
    keeps signals from being heard.
    """

    def __init__(self, store: Store, ranks: Ranks, patience: Patience) -> None:
        self._store = store
        self._ranks = ranks
        self._patience = patience
        self._met = False
        here = f"process {os.getpid()} on {socket.gethostname()}"
        if store.add(f"joined/{ranks.rank}", 1) > 1:
            there = store.get(f"who/{ranks.rank}").decode()
            store.set("twice", f"rank {ranks.rank} was given to two processes: {there}, and {here}")
            raise self._twice()
        store.set(f"who/{ranks.rank}", here)

    def gather(self, name: str, text: str, within_s: float) -> list[str | None]:
        keys = {rank: f"{name}/{rank}" for rank in range(1, self._ranks.world)}
        texts: list[str | None] = [text, *[None] * len(keys)]
        wait = self._patience.wait(
            within_s, lambda: [rank for rank, key in keys.items() if not self._store.check([key])]
        )
        pause = Pause(1e-3, 0.1)
        while not self._store.check(list(keys.values())):
            if self._is_twice():
                self._store.set("twice is told", "")
                time.sleep(1.0)  # the others shall read it before the store goes with this process
                raise UserError(f"{self._store.get('twice').decode()}. {_TWICE_ADVICE}")
            if wait.is_over():
                keys = {rank: key for rank, key in keys.items() if self._store.check([key])}
                break
            pause()
        for rank, key in keys.items():
            texts[rank] = self._store.get(key).decode()
            self._store.delete_key(key)
        self._met = True
        return texts

    def answer(self, name: str, text: str, there: Sequence[int]) -> None:
        self._store.set(name, text)
        deadline, pause = time.monotonic() + ANSWER_WITHIN_S, Pause(1e-3, 0.1)
        while self._store.add(f"{name}/read", 0) < len(there) and time.monotonic() < deadline:
            pause()
        for key in (name, f"{name}/read"):
            self._store.delete_key(key)

    def ask(self, name: str, text: str, within_s: float) -> str | None:
        from torch.distributed import DistError

        wait = self._patience.wait(within_s, self._not_joined, after_others_s=STOPPED_ANSWER_WITHIN_S)
        pause = Pause(1e-3, 0.1)
        try:
            self._store.set(f"{name}/{self._ranks.rank}", text)
            while not self._store.check([name]):
                if self._is_twice():
                    raise self._twice()
                if wait.is_over():
                    wait.raise_if_stopped()
                    return None
                pause()
            answer = self._store.get(name).decode()
            self._store.add(f"{name}/read", 1)
        except DistError as error:
            raise RankMissing(
                f"{_holder(self._ranks)} is gone: its store at {self._ranks.address}:{self._ranks.port} cannot be "
                f"reached any more from rank {self._ranks.rank}. Look for its error"
            ) from error
        self._met = True
        return answer

    def _not_joined(self) -> list[int]:
        return [rank for rank in range(self._ranks.world) if not self._store.check([f"joined/{rank}"])]

    def _is_twice(self) -> bool:
        """Only until all have met: a process that strays in later must not end a run that goes well."""
        return not self._met and self._store.check(["twice"])

    def _twice(self) -> UserError:
        """Rank 0 tells of a rank that was given twice; unless it goes on without heeding it, or is not there yet."""
        from torch.distributed import DistError

        deadline, pause = time.monotonic() + TOLD_WITHIN_S, Pause(1e-3, 0.1)
        try:
            twice = self._store.get("twice").decode()
            while not self._store.check(["twice is told"]):
                if time.monotonic() > deadline:
                    return UserError(f"{twice}. {_TWICE_ADVICE}")
                pause()
        except DistError:  # rank 0 has ended, and the store with it
            pass
        return _told_by_rank_0()


def _holder(ranks: Ranks) -> str:
    return "torchrun's agent" if ranks.agent_store else "rank 0"


_TWICE_ADVICE = "Two runs may have met at the same port (set MASTER_PORT apart), or RANK was set by hand"
