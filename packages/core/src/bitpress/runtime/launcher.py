"""Starting the ranks of a run on this machine, with what torchrun itself is made of."""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
import tempfile
import uuid
from collections.abc import Iterator, Sequence

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from bitpress.errors import BitpressError
from bitpress.runtime.process_group import RESUME_HINT

# Seconds between two looks at the ranks.
MONITOR_SECONDS = 0.2

# Signals that the ranks are sent too. An interrupt ends them without a word: who started them says
# it once.
FORWARDED_SIGNALS = "SIGTERM,SIGHUP,SIGQUIT"


def choose_rank_device(names: Sequence[str]) -> str | None:
    """The device that this process takes of those that ranks share; None where its ranks have to be
    started first.

    Raises:
        BitpressError: torchrun has started more ranks on this machine than there are devices.
    """
    if not dist.is_torchelastic_launched():
        return names[0] if len(names) == 1 else None
    local_rank = dist.get_node_local_rank()
    if local_rank >= len(names):
        raise BitpressError(
            f"--devices names {len(names)} devices, and torchrun has started more ranks on this "
            "machine: leave torchrun out, or start as many"
        )
    return names[local_rank]


def launch_ranks(count: int, arguments: Sequence[str]) -> int:
    """Run the command in so many processes, until all have ended; returns the exit code.

    A rank that fails says why itself, and the others end without a word.

    Args:
        arguments: of the command `bitpress`.

    Raises:
        BitpressError: a rank has not ended by itself.
        KeyboardInterrupt: there was an interrupt; the ranks have ended.
    """
    if not hasattr(signal, "sigtimedwait"):
        raise BitpressError("several processes need Linux: leave --devices out")
    with tempfile.TemporaryDirectory(prefix="bitpress-ranks-") as folder, _silent_logs():
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=count,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            monitor_interval=MONITOR_SECONDS,
        )
        # torch 2.7 has no such argument, and passes interrupts on
        config.signals_to_handle = FORWARDED_SIGNALS
        try:
            # -P: the current folder may hold modules of a stranger
            elastic_launch(config, sys.executable)("-P", "-m", "bitpress", *arguments)
        except ChildFailedError as e:
            local_rank, failure = e.get_first_failure()
            if failure.exitcode > 0:
                return failure.exitcode
            name = signal.Signals(-failure.exitcode).name
            raise BitpressError(
                f"rank {local_rank} (process {failure.pid}) was ended by {name}, perhaps because "
                f"memory was short; {RESUME_HINT}"
            ) from None
        except SignalException as e:
            if e.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            raise BitpressError(f"stopped by {e.sigval.name}; {RESUME_HINT}") from None
    return 0


@contextlib.contextmanager
def _silent_logs() -> Iterator[None]:
    """Torch's launcher would log a traceback of its own beside what a rank has said."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(level)
