"""What computes: devices, and how many threads."""

from __future__ import annotations

import itertools
import os
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from bitpress.errors import BitpressError, RecipeError, first_line
from bitpress.runtime import cgroup
from bitpress.runtime.logger import warn

CPU = torch.device("cpu")

# The name that takes a GPU where there is one.
AUTO = "auto"

# Part of a GPU's free memory that is taken by itself: torch's allocator leaves holes in it, and its
# libraries need some.
DEVICE_SHARE = 0.85


def resolve_name(name: str) -> str:
    """The name of a device, where it may be "auto": "cuda" if torch can use a GPU, else "cpu"."""
    if name != AUTO:
        return name
    if not torch.cuda.is_available():
        return "cpu"
    try:
        find_device("cuda")
    except BitpressError:
        # a GPU that torch counts and cannot use, as with too old a driver
        return "cpu"
    return "cuda"


def describe_choice(name: str) -> str:
    """A line that says which device "auto" has taken."""
    if name == "cpu":
        return "--device auto: computes on the CPU; torch finds no GPU that it can use"
    others = torch.cuda.device_count() - 1
    more = f" and {others} more" if others else ""
    return f"--device auto: computes on {name} ({torch.cuda.get_device_name()}{more})"


def find_device(name: str) -> torch.device:
    """The device of that name.

    Raises:
        BitpressError: there is none, or torch cannot use it.
    """
    name = resolve_name(name)
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise BitpressError(f"--device {name}: it is auto, cpu, cuda or cuda:N")
    try:
        device = torch.device(name)
        # only an allocation shows whether the driver works
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise BitpressError(f"--device {name}: {first_line(e)}") from None
    return device


def find_all_devices(name: str) -> tuple[torch.device, ...]:
    """The devices that share work which can be split, `cuda` being all GPUs there are.

    The first of them does what cannot be split.
    """
    name = resolve_name(name)
    first = find_device(name)
    if name != "cuda":
        return (first,)
    return tuple(find_device(f"cuda:{i}") for i in range(torch.cuda.device_count()))


def read_names(text: str) -> tuple[str, ...]:
    """The devices of this machine that ranks share, one each, as `--devices` names them: GPUs by
    their numbers, "auto" for all of them, or the CPU where there is none.

    Nothing is allocated on them: only the ranks do.

    Raises:
        BitpressError: a name is none, or torch finds no such GPU.
    """
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if text == AUTO:
        return tuple(f"cuda:{i}" for i in range(num_gpus)) or ("cpu",)
    names = [name.strip() for name in text.split(",")]
    if set(names) == {"cpu"}:
        return tuple(names)
    if not all(re.fullmatch(r"\d{1,4}", name) for name in names):
        raise BitpressError(
            f"--devices {text}: it is auto, or numbers of GPUs such as 0,1 (or cpu,cpu)"
        )
    numbers = [int(name) for name in names]
    for number in numbers:
        if number >= num_gpus:
            raise BitpressError(f"--devices {text}: torch finds no GPU {number}, but {num_gpus}")
        if numbers.count(number) > 1:
            raise BitpressError(f"--devices {text}: GPU {number} is named twice")
    return tuple(f"cuda:{number}" for number in numbers)


def free_memory(device: torch.device) -> int:
    """Bytes of a GPU that can be allocated: those that nobody has, and those that torch has and
    does not use.
    """
    free_bytes, _ = torch.cuda.mem_get_info(device)
    unused_bytes = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free_bytes + unused_bytes


def usable_memory(device: torch.device, limit: int | None = None) -> int:
    """Bytes of a GPU's memory that may be taken: a limit, or most of what is free."""
    return int(free_memory(device) * DEVICE_SHARE) if limit is None else limit


def require_memory(device: torch.device, num_bytes: int, limit: int | None = None) -> None:
    """Raise RecipeError where a limit of a GPU's memory is too low; warn where it has not as much
    as is needed at least.
    """
    device_bytes = usable_memory(device, limit)
    if num_bytes <= device_bytes:
        return
    text = (
        f"the run needs about {num_bytes / 1e6:,.0f} MB of {device}'s memory, more than the "
        f"{device_bytes / 1e6:,.0f} MB"
    )
    if limit is not None:
        raise RecipeError(f"{text} that --max-device-memory allows")
    warn(f"{text} that are free there: it may run out of memory", stacklevel=4)


def release_memory(device: torch.device) -> None:
    """Give what torch holds of a GPU's memory, and does not use, back to it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


class ThreadDevices:
    """Devices in turn for the threads of a pool: each thread keeps one, and on a GPU a stream of
    its own.

    A stream runs what it is given in order, beside what other streams run: one thread's weights are
    copied while another's are computed with. Nothing that a thread has on a GPU may be given to
    another thread, whose stream would not wait for it.
    """

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self._next_device = itertools.cycle(devices)
        self._thread = threading.local()

    def assign(self) -> None:
        """Give the calling thread the next device, for as long as it lives: a pool's
        initializer.
        """
        device = self._thread.device = next(self._next_device)
        # the current device and the current stream are a thread's own in torch
        if device.type == "cuda":
            torch.cuda.set_device(device)
            torch.cuda.set_stream(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]

    @property
    def device(self) -> torch.device:
        """The calling thread's."""
        return self._thread.device  # type: ignore[no-any-return]


class CopyStream:
    """Copies from the host's memory to a GPU that run beside what a thread's own stream computes;
    from pinned memory, the host does not wait for them.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def begin(self, tensor: Tensor) -> Tensor:
        """A copy that may not have arrived yet: it is used after `receive`."""
        with torch.cuda.stream(self._stream):
            return tensor.to(self._device, non_blocking=True)

    def receive(self, copy: Tensor) -> Tensor:
        """The same, once the calling thread's stream waits for it."""
        stream = torch.cuda.current_stream(self._device)
        stream.wait_stream(self._stream)
        # its memory is the copying stream's, which must not reuse it before it has been used
        copy.record_stream(stream)
        return copy


def count_cores() -> int:
    """CPU cores that this process may use, at least one: those of its affinity, or fewer where a
    container is given less time.
    """
    has_affinity = hasattr(os, "sched_getaffinity")
    num_cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    quota = cgroup.cpu_quota()
    return num_cores if quota is None else min(num_cores, quota)


@contextmanager
def torch_threads(num_threads: int) -> Iterator[None]:
    """Let torch compute one operation with so many threads of its own, until the block ends."""
    num_threads_before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads_before)
