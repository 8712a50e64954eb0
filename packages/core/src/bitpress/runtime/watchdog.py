"""Joining the ranks that torchrun has started, and ending with them: no rank waits for one that is
gone.

Every rank has a thread that sends a heartbeat each second through torch.distributed's store, which
torchrun keeps; rank 0 listens to all others, and they to it. On one machine torchrun itself sees a
death at once.
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

from bitpress.errors import BitpressError, VerificationError, first_line, printable_line
from bitpress.runtime.process_group import RESUME_HINT, SINGLE_PROCESS, ProcessGroup, RankError

# Seconds between two heartbeats.
HEARTBEAT_SECONDS = 1.0

# Heartbeats of its own after which a rank takes one for lost from which none came in the meantime.
MAX_MISSED_HEARTBEATS = 20

# Seconds that whoever failed first has to report it, be that another rank or another thread of this
# one.
REPORT_SECONDS = 2.0

# Of collectives: other ranks may compute for long, and the dead are found by their heartbeats.
COLLECTIVE_TIMEOUT = datetime.timedelta(days=30)

# Of an answer of the store, which is never busy.
STORE_TIMEOUT = datetime.timedelta(seconds=30)

# Keys of the store. That of the heartbeats is followed by a rank.
HEARTBEAT_KEY = "heartbeat"
NUM_FAULTS_KEY = "num_faults"
FAULT_KEY = "fault"

STORE_LOST = (
    "what has started the ranks (torchrun, or bitpress --devices) does not answer any more on the "
    "first machine"
)


@contextlib.contextmanager
def join_process_group(device: str, has_reporter: bool = False) -> Iterator[ProcessGroup]:
    """The processes of the run, if torchrun has started this one, and until the block ends;
    otherwise a group of one.

    Of all ranks that fail, the first to do so raises; the others end without a word.

    Args:
        device: what computes: cpu, cuda or cuda:N.
        has_reporter: whether who has started the ranks says which of them has ended.
    """
    if not dist.is_torchelastic_launched():
        yield SINGLE_PROCESS
        return

    if not hasattr(signal, "sigtimedwait"):
        raise BitpressError(
            "several processes need Linux: start the command without torchrun, with --threads"
        )

    # before there are threads, which inherit it: the watchdog's waits for this signal
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    store, rank, world_size = next(rendezvous("env://"))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo",
        store=PrefixStore("group", store),
        rank=rank,
        world_size=world_size,
        timeout=COLLECTIVE_TIMEOUT,
    )
    processes = ProcessGroup(rank, world_size).all_gather_object(
        (socket.gethostname(), os.getpid())
    )
    local_ranks = [i for i, (host, _) in enumerate(processes) if host == processes[rank][0]]
    process_group = ProcessGroup(rank, world_size, len(local_ranks), local_ranks.index(rank))

    # a connection that only the watchdog uses: it must not wait behind a collective's
    watchdog_store, _, _ = next(rendezvous("env://"))
    watchdog = _Watchdog(
        PrefixStore("watch", watchdog_store), process_group, processes, has_reporter
    )
    watchdog.start()
    try:
        yield process_group
    except BaseException as e:
        if isinstance(e, RankError):
            watchdog.wait_for_end()
        if not watchdog.is_first_to_fail():
            _exit(1 if isinstance(e, VerificationError) else 2)
        watchdog.publish_fault(first_line(e))
        raise
    finally:
        watchdog.stop()
    dist.destroy_process_group()


@define(eq=False)
class _Watchdog:
    """One rank's watch over the others.

    Attributes:
        processes: host name and process number of every rank.
        has_reporter: whether who has started the ranks says which of them has ended.
    """

    store: Store
    process_group: ProcessGroup
    processes: list[tuple[str, int]]
    has_reporter: bool
    _stopping: threading.Event = field(factory=threading.Event)
    _num_rounds: int = 0
    _threads: list[threading.Thread] = field(factory=list)

    def start(self) -> None:
        """Begin, together with all others."""
        self.store.set_timeout(STORE_TIMEOUT)
        self._send_heartbeat(-1)
        # then every rank's key is in the store
        self.process_group.barrier()
        self._threads = [
            threading.Thread(target=target, daemon=True)
            for target in (self._watch_torchrun, self._watch_ranks)
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """The run is over for this rank."""
        self._stopping.set()
        if self._threads and self._threads[0].ident is not None:
            # the signal that it waits for
            signal.pthread_kill(self._threads[0].ident, signal.SIGTERM)
        for thread in self._threads:
            # Python must not end under a thread that talks to the store
            thread.join(MAX_MISSED_HEARTBEATS * HEARTBEAT_SECONDS)

    def is_first_to_fail(self) -> bool:
        """Whether no rank has failed before this one, whose fault is then the one that is
        reported.
        """
        try:
            return bool(self.store.add(NUM_FAULTS_KEY, 1) == 1)
        except RuntimeError:
            # torchrun, which keeps the store, has ended
            return True

    def wait_for_end(self) -> None:
        """Wait until the watchdog has found which rank is lost, which ends this process."""
        for thread in self._threads:
            thread.join(2 * MAX_MISSED_HEARTBEATS * HEARTBEAT_SECONDS)

    def publish_fault(self, fault: str) -> None:
        """Let the other ranks end; those on other machines report the fault."""
        with contextlib.suppress(RuntimeError):
            self.store.set(FAULT_KEY, f"{self.process_group.rank} {fault}")

    def _report_published_fault(self) -> None:
        """Report another rank's fault where that is on another machine, once on each machine."""
        rank, _, fault = self.store.get(FAULT_KEY).decode().partition(" ")
        host = self.processes[int(rank)][0]
        own_host = self.processes[self.process_group.rank][0]
        if self.process_group.local_rank == 0 and host != own_host:
            _report(f"rank {rank} on {host}: {printable_line(fault)}")

    def _send_heartbeat(self, number: int) -> None:
        self.store.set(f"{HEARTBEAT_KEY} {self.process_group.rank}", str(number))

    def _watch_torchrun(self) -> None:
        """End this process when torchrun stops it, or when the other thread gets no answer from the
        store.
        """
        num_rounds, num_silent = 0, 0
        while True:
            signaled = signal.sigtimedwait([signal.SIGTERM], HEARTBEAT_SECONDS)
            if self._stopping.is_set():
                return
            if signaled and self.has_reporter:
                _exit()
            if signaled:
                self._fail("stopped by torchrun, which says which rank has ended and why")

            num_silent = 0 if self._num_rounds != num_rounds else num_silent + 1
            num_rounds = self._num_rounds
            if num_silent >= MAX_MISSED_HEARTBEATS:
                if self.process_group.local_rank == 0:
                    _report(f"{STORE_LOST}; {RESUME_HINT}")
                _exit()

    def _watch_ranks(self) -> None:
        """Send a heartbeat each second, and look for those of others.

        Without a connection a round may take for ever.
        """
        num_ranks, own_rank = self.process_group.world_size, self.process_group.rank
        others = [0]
        if self.process_group.is_rank_zero:
            others = [rank for rank in range(num_ranks) if rank != own_rank]

        last_heartbeats = dict.fromkeys(others, b"")
        num_missed = dict.fromkeys(others, 0)
        while not self._stopping.wait(HEARTBEAT_SECONDS):
            try:
                self._send_heartbeat(self._num_rounds)
                if self.store.check([FAULT_KEY]):
                    self._report_published_fault()
                    _exit()
                heartbeats = {rank: self.store.get(f"{HEARTBEAT_KEY} {rank}") for rank in others}
            except RuntimeError:
                self._fail(STORE_LOST)

            # counted in this rank's rounds and not by a clock: all may be held up together
            for rank, heartbeat in heartbeats.items():
                is_alive = heartbeat != last_heartbeats[rank]
                num_missed[rank] = 0 if is_alive else num_missed[rank] + 1
                if num_missed[rank] >= MAX_MISSED_HEARTBEATS:
                    host, process = self.processes[rank]
                    self._fail(
                        f"rank {rank} (process {process} on {host}) has sent no heartbeat for "
                        f"{MAX_MISSED_HEARTBEATS} seconds"
                    )
            last_heartbeats = heartbeats
            self._num_rounds += 1

    def _fail(self, fault: str) -> NoReturn:
        """Report a fault unless another rank has, and end this process, wherever it waits."""
        if self.is_first_to_fail():
            _report(f"{fault}; {RESUME_HINT}")
            self.publish_fault(f"{fault}; {RESUME_HINT}")
        _exit()


def _report(fault: str) -> None:
    print(f"bitpress: {fault}", file=sys.stderr, flush=True)


def _exit(code: int = 2) -> NoReturn:
    """End this process without a word, wherever it waits."""
    time.sleep(REPORT_SECONDS)
    sys.stderr.flush()
    os._exit(code)
