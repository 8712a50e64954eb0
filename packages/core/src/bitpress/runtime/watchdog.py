"""Joining the ranks that torchrun has started, and ending with them: no rank waits for one that is
gone.

Every rank is watched by a thread of its own. It sends a beat each second through
torch.distributed's store, which torchrun keeps; the first rank listens to all others, and they to
it. On one machine torchrun itself sees a death at once.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import NoReturn

import torch.distributed as dist
from attrs import define, field
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from bitpress.errors import VerificationError, first_line, plain
from bitpress.runtime.process_group import ALONE, GOES_ON, RankError, Ranks

# seconds between two beats
BEAT = 1.0

# beats of its own after which a rank takes one for lost that it has not heard in the meantime
LOST = 20

# seconds that whoever failed first has to tell it, be that another rank or another thread of this
# one
GRACE = 2.0

# in collectives: others may work for long, and the dead are found otherwise
PATIENCE = datetime.timedelta(days=30)

UNHEARD = "torchrun on the first machine, which all ranks meet through, does not answer any more"

# for an answer of the store, which is never busy
STORE = datetime.timedelta(seconds=30)


@contextlib.contextmanager
def started(device: str) -> Iterator[Ranks]:
    """The ranks of the run, if torchrun has started this process, and until the block ends;
    otherwise a run of one.

    Of all ranks that fail, the first to do so raises; the others end without a word.

    Args:
        device: what computes.
    """
    if not dist.is_torchelastic_launched():
        yield ALONE
        return
    # before there are threads: it is waited for by the watch
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    store, rank, count = next(rendezvous("env://"))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo",
        store=PrefixStore("group", store),
        rank=rank,
        world_size=count,
        timeout=PATIENCE,
    )
    names = Ranks(rank, count).gather((socket.gethostname(), os.getpid()))
    here = [i for i, (host, _) in enumerate(names) if host == names[rank][0]]
    ranks = Ranks(rank, count, len(here), here.index(rank))
    # a connection that only the watch uses: it must not wait behind a collective's
    own, _, _ = next(rendezvous("env://"))
    watch = _Watch(PrefixStore("watch", own), ranks, names)
    watch.start()
    try:
        yield ranks
    except BaseException as e:
        if isinstance(e, RankError):
            watch.find()
        if not watch.tells():
            _leave(1 if isinstance(e, VerificationError) else 2)
        watch.over(first_line(e))
        raise
    finally:
        watch.stop()
    dist.destroy_process_group()


@define(eq=False)
class _Watch:
    """One rank's watch over the others."""

    store: Store
    ranks: Ranks
    names: list[tuple[str, int]]
    _done: threading.Event = field(factory=threading.Event)
    _rounds: int = 0
    _threads: list[threading.Thread] = field(factory=list)

    def start(self) -> None:
        """Begin, together with all others."""
        self.store.set_timeout(STORE)
        self._beat(-1)
        self.ranks.wait()
        self._threads = [
            threading.Thread(target=target, daemon=True) for target in (self._run, self._talk)
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """The run is over for this rank."""
        self._done.set()
        if self._threads and self._threads[0].ident is not None:
            # which it waits for
            signal.pthread_kill(self._threads[0].ident, signal.SIGTERM)
        for thread in self._threads:
            # Python must not end under a thread that talks to the store
            thread.join(LOST * BEAT)

    def tells(self) -> bool:
        """Whether this rank is the first that has a fault to tell."""
        try:
            return bool(self.store.add("told", 1) == 1)
        except RuntimeError:
            # torchrun, which keeps the store, has ended
            return True

    def find(self) -> None:
        """Wait until the watch has found which rank it is that does not come any more, which ends
        this process.
        """
        for thread in self._threads:
            thread.join(2 * LOST * BEAT)

    def over(self, fault: str) -> None:
        """Let the others end, on other machines with a word."""
        with contextlib.suppress(RuntimeError):
            self.store.set("over", f"{self.ranks.rank} {fault}")

    def _repeat(self) -> None:
        """What another rank has told, where that was on another machine."""
        rank, _, fault = self.store.get("over").decode().partition(" ")
        host = self.names[int(rank)][0]
        if self.ranks.local == 0 and host != self.names[self.ranks.rank][0]:
            _say(f"rank {rank} on {host}: {plain(fault)}")

    def _beat(self, number: int) -> None:
        self.store.set(f"beat {self.ranks.rank}", str(number))

    def _run(self) -> None:
        """Until the run is over: torchrun may stop this process, and the store may be out of
        reach.
        """
        heard, silent = 0, 0
        while True:
            stopped = signal.sigtimedwait([signal.SIGTERM], BEAT)
            if self._done.is_set():
                return
            if stopped:
                self._end("stopped by torchrun, which says which rank has ended and why")
            heard, silent = self._rounds, (0 if self._rounds != heard else silent + 1)
            if silent >= LOST:
                if self.ranks.local == 0:
                    _say(f"{UNHEARD}; {GOES_ON}")
                _leave()

    def _talk(self) -> None:
        """A round each beat: be heard, and see whether the others are. Without a connection it may
        take for ever.
        """
        others = (
            [i for i in range(self.ranks.count) if i != self.ranks.rank]
            if self.ranks.first
            else [0]
        )
        heard, silent = dict.fromkeys(others, b""), dict.fromkeys(others, 0)
        while not self._done.wait(BEAT):
            try:
                self._beat(self._rounds)
                if self.store.check(["over"]):
                    self._repeat()
                    _leave()
                beats = {i: self.store.get(f"beat {i}") for i in others}
            except RuntimeError:
                self._end(UNHEARD)
            # counted in beats of our own: all may be held up together
            for i, beat in beats.items():
                silent[i] = 0 if beat != heard[i] else silent[i] + 1
                if silent[i] >= LOST:
                    host, process = self.names[i]
                    self._end(
                        f"rank {i} (process {process} on {host}) has not been heard of for {LOST} "
                        "seconds"
                    )
            heard = beats
            self._rounds += 1

    def _end(self, fault: str) -> None:
        """Tell it, and end this process, wherever it waits."""
        if self.tells():
            _say(f"{fault}; {GOES_ON}")
            self.over(f"{fault}; {GOES_ON}")
        _leave()


def _say(fault: str) -> None:
    print(f"bitpress: {fault}", file=sys.stderr, flush=True)


def _leave(code: int = 2) -> NoReturn:
    """End this process without a word, wherever it waits."""
    time.sleep(GRACE)
    sys.stderr.flush()
    os._exit(code)
