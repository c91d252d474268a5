"""Signs of life of all ranks, and which rank was lost.

A rank that dies leaves the others in a collective: some get an error that names nobody ("Connection closed by peer"),
which makes them fail and others after them; some wait for ever. So every rank gives a sign of life to a store each
second, also while its main thread waits or has failed, and rank 0 tells all who has given none. That one's process has
ended it knows at once, by a connection (`lifeline`).

Limit: a sign of life is given by a Python thread. A rank that spends longer than `lost_after_s` in one call that keeps
Python's global lock is taken for lost. PyTorch's operations and collectives release it. Stopping all ranks at once
(Ctrl-Z, a paused container) is no loss: time in which a process did not run does not count for it.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Final

from .errors import FAILED, OK, REQUEUE, UserError
from .launch import RankMissing
from .lifeline import Followed, Held
from .running_clock import RunningClock

if TYPE_CHECKING:
    from torch.distributed import Store

EVERY_S: Final = 1.0
"""Time between two signs of life."""

GRACE_S: Final = 3.0
"""How long the main thread has to end by itself, after it is known that a rank was lost."""

ACKNOWLEDGE_WITHIN_S: Final = 10.0
"""How long rank 0 waits for the others to have heard of the loss, before it ends and the store with it."""

START_WITHIN_S: Final = 120.0
"""How long a rank may take to its first sign of life, after that of rank 0."""

START_EXTRA_S: Final = 30.0
"""How much longer than `lost_after_s` silence is borne until all have begun: as long as ranks connect to the store it
may answer late, since its one thread looks up their names, and a lookup that finds no name server takes seconds."""

NOTE_WITHIN_S: Final = 2.0
"""How long the note of a loss may take."""

ENDED: Final = "ended"
FAILED_WITH: Final = "failed: "
DIED: Final = "its process has ended without a word: killed, or out of memory"
STALLED: Final = "no step has ended for"
"""In what a rank has failed with where its watchdog has ended it (`gtddp_dist.watchdog`)."""


def may_come_of_a_loss(error: BaseException) -> bool:
    """Whether an error is of a kind that torch, or `Rendezvous`, raises when another rank is gone."""
    if isinstance(error, UserError):
        return isinstance(error, RankMissing)
    return isinstance(error, (RuntimeError, ConnectionError))


@dataclass(frozen=True)
class Loss:
    """A rank that was lost; -1 stands for a process that is no rank but holds the store."""

    rank: int
    who: str
    why: str


class Heartbeats:
    """Gives signs of life of this rank while the `with` block runs, and ends this process when a rank is lost.

    `store` is shared by all ranks (a TCPStore, or a PrefixStore over one) and is used through a connection of its own.
    `describe` says for messages which rank this is ("segment 2 of 4: stages 3 to 5, replica 1 of 2, host node1"),
    `advice` what to do once a rank is lost. `store_holder` names the process that holds the store where it is not rank
    0's. `address` is where the other ranks reach the host of rank 0.

    Once a rank's process has ended, or has given no sign of life for `lost_after_s` seconds, or has left the block with
    an error, every other rank prints one line on stderr that names it, and ends with the exit code FAILED: by itself
    within a few seconds, else by `os._exit`. Where the store cannot be reached, it is rank 0 that was lost.

    The end of the block is a meeting: rank 0 stays until all ranks have left theirs, since it watches over them and
    holds the store. An error that may come of a lost rank (`may_come_of_a_loss`) leaves the block only once it is known
    that no other rank was lost.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        world: int,
        describe: str,
        *,
        advice: str = "this run cannot go on",
        lost_after_s: float = 30.0,
        store_holder: str | None = None,
        address: str = "127.0.0.1",
    ) -> None:
        self.rank = rank
        self.world = world
        self._describe = describe
        self._advice = advice
        self._note: Callable[[str], None] | None = None
        self._write_stacks: Callable[[], object] | None = None
        self._lost_after_s = lost_after_s
        self._store_holder = store_holder
        self._address = address
        self._lifeline: Held | Followed | None = None
        self._lifeline_failed = False
        self._store = store
        if world > 1:
            # A connection serves one thread at a time, and the main thread waits in its own.
            self._store = store.clone()  # type: ignore[attr-defined]  # missing in torch's stubs
            self._store.set_timeout(timedelta(seconds=max(lost_after_s, 10.0)))
        self._clock = RunningClock(3 * EVERY_S)
        self._beats = 0
        self._last_round = (time.monotonic(), 0.0)
        """When the store answered last, by the wall and by the time that this process was running."""
        self._who_is_first = ""
        self._lock = threading.Lock()
        self._losses: list[Loss] = []
        self._others_told = False
        """Rank 0: whether they can read of the losses."""
        self._known = threading.Event()
        """Set once a loss is known and was printed."""
        self._may_end = threading.Event()
        """Rank 0: set once the others know it too."""
        self._troubles = 0
        """How often the main thread has asked whether a rank was lost."""
        self._asked: dict[tuple[int, int], dict[int, int]] = {}
        """Rank 0: who has asked for the how-manieth time -> the number of each rank's last sign of life then."""
        self._answered = threading.Event()
        """Set once the main thread's question is answered, one way or the other."""
        self._all_here = False
        """Whether all ranks have begun."""
        self._over = threading.Event()
        """Set once all ranks have left their block."""
        self._leaving = False
        self._final: str | None = None
        self._final_given = threading.Event()
        self._quit = threading.Event()
        self._threads = [
            threading.Thread(target=target, name=name, daemon=True)
            for target, name in ((self._keep_beating, "heartbeats"), (self._keep_watching, "heartbeat watch"))
        ]

    # The block.

    def __enter__(self) -> Heartbeats:
        if self.world > 1:
            self._store.set(f"who/{self.rank}", self._describe)
            if self.rank == 0:
                self._lifeline = Held(self._address, self.world, self._have_died)
                self._store.set("lifeline", self._lifeline.where)
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.world == 1:
            return
        well = error is None or (isinstance(error, SystemExit) and error.code in (None, OK, REQUEUE))
        if isinstance(error, Exception):
            self.explain(error, self._lost_after_s + 10 * EVERY_S)
        if self._known.is_set():
            self._end_process()
        self._leaving = not well  # from here on an error of our own is what this process ends with
        self._final = ENDED if well else f"{FAILED_WITH}{_first_line(error)}"
        if well and self.rank == 0:
            while not self._over.wait(EVERY_S) and not self._known.is_set():
                pass
            if self._known.is_set():
                self._end_process()
        else:
            # Said, and to rank 0 also that all have heard it: its end takes the store away.
            self._final_given.wait(EVERY_S * 3)
            if self.rank == 0:
                self._may_end.wait(ACKNOWLEDGE_WITHIN_S)
        self._quit.set()
        self._close_lifeline()
        for thread in self._threads:
            thread.join(2 * EVERY_S)

    @property
    def lost(self) -> list[int]:
        """The ranks known to be lost."""
        with self._lock:
            return [loss.rank for loss in self._losses]

    def explain(self, error: Exception, within_s: float) -> list[int]:
        """The ranks that were lost, for a main thread whose collective failed with `error`: waits until it is known.

        Empty where `error` has nothing to do with other ranks; where nobody was lost, which is known within a few
        seconds as all ranks go on giving signs of life; and where nothing is known within `within_s` seconds (give it
        more than `lost_after_s`). Then `error` is this rank's own. -1 in the list stands for a process that is no rank
        and held the store.

        Meanwhile this rank gives signs of life, so that it is not taken for the lost one. The line for the user has
        been printed when it returns; the process should end with FAILED then.
        """
        if self.world > 1 and not self._known.is_set() and may_come_of_a_loss(error):
            self._answered.clear()
            self._troubles += 1
            deadline = time.monotonic() + within_s
            while not self._known.is_set() and time.monotonic() < deadline and not self._answered.wait(0.05):
                pass
        return self.lost

    # The thread that talks to the store. It may be kept waiting there: the other one notices.

    def _keep_beating(self) -> None:
        seen: dict[int, tuple[str, float]] = {}
        try:
            self._beat()
            while not self._quit.is_set():
                if self.rank == 0:
                    self._watch_all(seen)
                else:
                    self._watch_first(seen)
                self._last_round = (time.monotonic(), self._clock.now)
                # A final word is given at once.
                deadline = time.monotonic() + (EVERY_S if self._all_here else EVERY_S / 10)
                while time.monotonic() < deadline and not self._quit.is_set():
                    if self._final is not None and not self._final_given.is_set():
                        break
                    if self.rank == 0 and self._losses and not self._others_told:
                        break
                    self._quit.wait(0.05)
                if not self._quit.is_set():  # else rank 0, and the store with it, may be gone by now
                    self._beat()
        except RuntimeError as error:  # all errors of a store are
            if not self._quit.is_set():
                self._store_is_gone(_first_line(error))

    def _beat(self) -> None:
        self._beats += 1
        final = self._final
        self._store.set(f"beat/{self.rank}", f"{self._beats} {self._troubles}" if final is None else final)
        if final is not None:
            self._final_given.set()

    def _watch_all(self, seen: dict[int, tuple[str, float]]) -> None:
        """Rank 0: looks at all ranks, and tells the others which are lost."""
        if self._losses:
            self._tell_others(self._losses)
            self._await_acknowledgement()
            return
        beats = self._read_beats(range(1, self.world), seen)
        losses = self._find_losses(beats, seen)
        if losses:
            # Ranks that died together are found a little apart.
            self._quit.wait(1.5 * EVERY_S)
            beats = self._read_beats(range(1, self.world), seen)
            losses = self._find_losses(beats, seen)
        if losses:
            self._tell_others(losses)
            self._declare(losses)
            if self._leaving and self._final_given.is_set():  # this rank has failed as well: nobody else is told
                self._await_acknowledgement()
            return
        if not self._all_here and len(beats) == self.world - 1:
            self._store.set("all here", "")
            self._all_here = True
        self._answer_the_troubled(beats)
        if all(beats.get(rank) == ENDED for rank in range(1, self.world)):
            self._over.set()
        if self._final is not None and self._final != ENDED and self._final_given.is_set():
            self._await_acknowledgement()

    def _tell_others(self, losses: Sequence[Loss]) -> None:
        if not self._others_told:
            self._store.set("lost", json.dumps([[loss.rank, loss.who, loss.why] for loss in losses]))
            self._others_told = True

    def _answer_the_troubled(self, beats: dict[int, str]) -> None:
        """Rank 0: tells ranks whose collective failed that nobody was lost, once all others were alive after that.

        Two signs of life more than when it was heard of: the first may have been on its way when its rank died.
        """
        numbers = {0: self._beats}
        troubles = {0: self._troubles}
        for rank, beat in beats.items():
            if beat != ENDED and not beat.startswith(FAILED_WITH):
                numbers[rank], troubles[rank] = (int(word) for word in beat.split())
        for rank, count in troubles.items():
            then = self._asked.setdefault((rank, count), numbers) if count else numbers
            if count and all(number >= then.get(other, 0) + 2 for other, number in numbers.items()):
                self._store.set(f"nobody lost/{rank}/{count}", "")
        self._hear_answer()

    def _hear_answer(self) -> None:
        if self._troubles and self._store.check([f"nobody lost/{self.rank}/{self._troubles}"]):
            self._answered.set()

    def _read_beats(self, ranks: Sequence[int], seen: dict[int, tuple[str, float]]) -> dict[int, str]:
        """What each rank has given last; those that have not begun are left out."""
        keys = {rank: f"beat/{rank}" for rank in ranks}
        begun = [rank for rank in ranks if rank in seen or self._store.check([keys[rank]])]
        if not begun:
            return {}
        values = self._store.multi_get([keys[rank] for rank in begun])
        return {rank: bytes(value).decode() for rank, value in zip(begun, values, strict=True)}

    def _find_losses(self, beats: dict[int, str], seen: dict[int, tuple[str, float]]) -> list[Loss]:
        """The ranks lost by what they have given last, and by when they gave anything new (`seen`, kept here)."""
        losses = []
        for rank in range(1, self.world) if self.rank == 0 else [0]:
            value = beats.get(rank)
            if value is None:
                if self._clock.now > START_WITHIN_S:
                    losses.append(Loss(rank, "has not begun", f"gave no sign of life in {START_WITHIN_S:.0f} s"))
                continue
            if rank not in seen or seen[rank][0] != value:
                seen[rank] = (value, self._clock.now)
            silent_s = self._clock.now - seen[rank][1]
            if value.startswith(FAILED_WITH):
                losses.append(Loss(rank, self._who(rank), value))
            elif value != ENDED and silent_s > self._limit_s:
                losses.append(Loss(rank, self._who(rank), f"gave no sign of life for {silent_s:.0f} s"))
        return losses

    def prepare_for_loss(self, advice: str, note: Callable[[str], None]) -> None:
        """Once a rank is lost, from now on: `advice` says what to do, and on the first rank that is left `note` is
        called with who it was, in a thread of its own."""
        self._advice, self._note = advice, note

    def once_stalled(self, write: Callable[[], object] | None) -> None:
        """From now on `write` is called, in a thread of its own, once a rank was lost whose watchdog has ended it."""
        self._write_stacks = write

    def give_up(self, reason: str) -> None:
        """Tells the others that this rank has failed, for a thread that is about to end the process: the main thread
        does not come to the end of the block. Returns once they know, or cannot be told."""
        self._leaving = True
        self._final = f"{FAILED_WITH}{reason}"
        self._note_down(reason, set())
        self._final_given.wait(3 * EVERY_S)
        if self.rank == 0:
            self._may_end.wait(ACKNOWLEDGE_WITHIN_S)
        self._close_lifeline()

    @property
    def _limit_s(self) -> float:
        """How long silence is borne."""
        return self._lost_after_s if self._all_here else self._lost_after_s + START_EXTRA_S

    def _who(self, rank: int) -> str:
        return self._store.get(f"who/{rank}").decode()

    def _await_acknowledgement(self) -> None:
        """Rank 0 at its end: lets this process end once the survivors have heard why."""
        beats = self._read_beats(range(1, self.world), {})
        survivors = [
            rank
            for rank in range(1, self.world)  # also those whose first sign of life is still to come
            if rank not in self.lost and not beats.get(rank, "").startswith((ENDED, FAILED_WITH))
        ]
        if all(self._store.check([f"heard/{rank}"]) for rank in survivors):
            self._may_end.set()

    def _watch_first(self, seen: dict[int, tuple[str, float]]) -> None:
        """The other ranks: look at rank 0, and at what it tells."""
        if not self._who_is_first and self._store.check(["who/0"]):
            self._who_is_first = self._who(0)
        if not self._all_here:
            self._all_here = self._store.check(["all here"])
        if self._lifeline is None and not self._lifeline_failed and self._store.check(["lifeline"]):
            self._take_lifeline(self._store.get("lifeline").decode())
        if self._known.is_set():
            return
        if self._store.check(["lost"]):
            told = [Loss(*entry) for entry in json.loads(self._store.get("lost"))]
            if any(loss.rank == self.rank for loss in told):
                told = [Loss(self.rank, self._describe, f"{self._why_me()}, and the others have given it up")]
            self._acknowledge()
            self._declare(told)
            return
        losses = self._find_losses(self._read_beats([0], seen), seen)
        if losses:
            self._acknowledge()
            self._declare(losses)
        self._hear_answer()

    def _take_lifeline(self, where: str) -> None:
        try:
            self._lifeline = Followed(where, self.rank, self._describe, self._have_died)
        except OSError as error:
            self._lifeline_failed = True
            told = json.loads(where)
            os.write(
                2,
                f"gtddp: rank {self.rank} ({self._describe}) does not reach rank 0 at {told['address']}:{told['port']} "
                f"({error}): should either die, the other knows it after {self._lost_after_s:g} s only\n".encode(),
            )

    def _close_lifeline(self) -> None:
        if self._lifeline is not None:
            self._lifeline.close()

    def _acknowledge(self) -> None:
        """Before the main thread hears of a loss: it may end the process at once."""
        self._store.set(f"heard/{self.rank}", "")

    def _suspended_s(self) -> float:
        """For how long this process was not running since the store answered last."""
        wall, running = self._last_round
        return max(0.0, time.monotonic() - wall - (self._clock.now - running))

    def _why_me(self) -> str:
        return f"did not run for {self._suspended_s():.0f} s"

    def _store_is_gone(self, reason: str) -> None:
        """Declares who held the store lost, unless it is this rank that has slept through the end of the others."""
        if self._suspended_s() > self._lost_after_s:
            self._declare_me()
        elif self._store_holder is not None:
            self._declare([Loss(-1, self._store_holder, f"the store it holds cannot be reached: {reason}")])
        else:
            self._declare([Loss(0, self._who_is_first, f"its store cannot be reached: {reason}")])

    def _declare_me(self) -> None:
        self._declare([Loss(self.rank, self._describe, f"{self._why_me()}, and the others have ended")])

    # The thread of the lifeline.

    def _have_died(self, ranks: Mapping[int, str]) -> None:
        if self.rank != 0 and self._suspended_s() > self._lost_after_s:
            self._declare_me()
        else:
            self._declare([Loss(rank, who or self._who_is_first, DIED) for rank, who in sorted(ranks.items())])

    # The thread that never waits for anybody.

    def _keep_watching(self) -> None:
        while not self._quit.wait(EVERY_S / 2):
            self._clock.tick()
            if self._known.is_set() and not self._leaving:
                if not self._quit.wait(GRACE_S):
                    self._end_process()
                return
            silent_s = self._clock.now - self._last_round[1]
            if silent_s > self._limit_s:
                self._store_is_gone(f"no answer for {silent_s:.0f} s")

    def _declare(self, losses: list[Loss]) -> None:
        """Prints who was lost, once, and lets the main thread know."""
        with self._lock:
            if self._losses or self._leaving or self._quit.is_set():
                return
            self._losses = losses
        named = "; ".join(_named(loss) for loss in losses)
        # Past Python's own buffers, whose locks the main thread may hold, and in one piece.
        os.write(2, f"gtddp: lost {named}. {self._advice}\n".encode())
        self._note_down(f"lost {named}", {loss.rank for loss in losses})
        if self._write_stacks is not None and any(STALLED in loss.why for loss in losses):
            self._write_stacks()
        self._known.set()

    def _note_down(self, text: str, lost: set[int]) -> None:
        if self._note is not None and self.rank == min(set(range(self.world)) - lost, default=-1):
            noting = threading.Thread(target=self._note, args=(text,), daemon=True)
            noting.start()
            noting.join(NOTE_WITHIN_S)  # a file system may hang with the host that was lost

    def _end_process(self) -> None:
        """Ends this process with FAILED, without what torch does at the end: it would abort on broken connections."""
        if self.rank == 0:
            self._may_end.wait(ACKNOWLEDGE_WITHIN_S)
        flush = threading.Thread(target=_flush, daemon=True)
        flush.start()
        flush.join(1.0)  # the main thread may hold a buffer's lock for ever
        os._exit(FAILED)


def _named(loss: Loss) -> str:
    if loss.rank < 0:
        return f"{loss.who}: {loss.why}"
    return f"rank {loss.rank}{f' ({loss.who})' if loss.who else ''}: {loss.why}"


def _first_line(error: BaseException | None) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
