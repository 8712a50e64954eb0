"""One process with several devices: its threads take them in turn, and what they write does not
depend on how many there are.

No GPU is needed, and none was ever seen: devices are the CPU under several numbers.
"""

from __future__ import annotations

import itertools
import re
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import bitpress
from bitpress.checkpoint.reader import Reader
from bitpress.compression import data_free, run
from bitpress.conformance.models import files_of, write_model
from bitpress.errors import BitpressError
from bitpress.planning.layout import Stack
from bitpress.runtime import devices
from bitpress.runtime.devices import ThreadDevices, find_all_devices, find_device, read_names

CPUS = tuple(torch.device("cpu", number) for number in range(3))


@pytest.mark.parametrize(("name", "numbers"), [("cuda", [0, 1, 2]), ("cuda:1", [1])])
def test_cuda_is_every_gpu_and_a_number_is_one(
    monkeypatch: pytest.MonkeyPatch, name: str, numbers: list[int]
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    # which would look for them
    monkeypatch.setattr(devices, "find_device", torch.device)
    assert find_all_devices(name) == tuple(torch.device("cuda", number) for number in numbers)


@pytest.mark.parametrize(
    ("num_gpus", "works", "name"), [(0, True, "cpu"), (2, True, "cuda"), (2, False, "cpu")]
)
def test_auto_is_a_gpu_where_torch_can_use_one(
    monkeypatch: pytest.MonkeyPatch, num_gpus: int, works: bool, name: str
) -> None:
    def allocate(size: int, device: torch.device) -> None:
        if not works and device.type == "cuda":
            raise RuntimeError("the driver is too old")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: num_gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    monkeypatch.setattr(torch, "empty", allocate)
    assert devices.resolve_name("auto") == name
    assert devices.resolve_name("cuda:1") == "cuda:1"
    assert find_device("auto") == torch.device(name)
    assert len(find_all_devices("auto")) == (2 if name == "cuda" else 1)
    line = devices.describe_choice(name)
    assert line.startswith("--device auto: computes on ")
    assert ("cuda (NVIDIA H100 and 1 more)" in line) == (name == "cuda")


@pytest.mark.parametrize("threads", [1, 2, 3, 4, 7])
def test_each_thread_keeps_a_device_and_devices_have_as_many_threads_as_one_another(
    threads: int,
) -> None:
    thread_devices, meet = ThreadDevices(CPUS), threading.Barrier(threads)

    def task(_: int) -> tuple[int, torch.device]:
        # no thread works twice before all have worked once
        meet.wait(60)
        return threading.get_ident(), thread_devices.device

    with ThreadPoolExecutor(threads, initializer=thread_devices.assign) as pool:
        result = list(pool.map(task, range(3 * threads)))
    device_of = dict(result)
    assert len(device_of) == threads
    assert set(device_of.items()) == set(result)
    counts = Counter(device_of.values())
    assert len(counts) == min(threads, len(CPUS))
    assert max(counts.values()) - min(counts.values()) <= 1


def test_every_device_has_stacks_and_the_bytes_are_those_of_one(
    tmp_path: Path, with_toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_model(tmp_path / "model", shards=2)
    bitpress.compress(model, tmp_path / "one", scheme="toy", threads=1)
    used, number, meet, compress_stack = (
        set(),
        itertools.count(),
        threading.Barrier(len(CPUS)),
        data_free.compress_stack,
    )

    def on(stack: Stack, reader: Reader, device: torch.device, is_proved: bool) -> Iterator[object]:
        if next(number) < len(CPUS):
            # or one thread might be done before another has begun
            meet.wait(60)
        used.add(device)
        yield from compress_stack(stack, reader, device, is_proved)

    monkeypatch.setattr(data_free, "compress_stack", on)
    monkeypatch.setattr(run, "find_all_devices", lambda name: CPUS)
    bitpress.compress(model, tmp_path / "three", scheme="toy", threads=len(CPUS))
    assert used == set(CPUS)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "three")


def test_tiles_of_any_size_give_the_same_bytes(
    tmp_path: Path, with_toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, result = write_model(tmp_path / "model"), []
    for size in (1, 1000, 1 << 18, data_free.GPU_TILE_WEIGHTS):
        monkeypatch.setattr("bitpress.schemes.stored_layout.WEIGHTS_PER_TILE", size)
        bitpress.compress(model, tmp_path / str(size), scheme="toy", threads=1, verify=False)
        result.append(files_of(tmp_path / str(size)))
    assert all(files == result[0] for files in result)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("auto", ("cuda:0", "cuda:1", "cuda:2")),
        ("2, 0", ("cuda:2", "cuda:0")),
        ("1", ("cuda:1",)),
        ("cpu,cpu", ("cpu", "cpu")),
    ],
)
def test_ranks_share_the_devices_that_are_named(
    text: str, names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert read_names(text) == names


@pytest.mark.parametrize("text", ["3", "0,3", "0,0", "cuda", "cpu,0", "0,", "", "-1"])
def test_devices_that_ranks_cannot_share_are_refused(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    with pytest.raises(BitpressError, match=f"--devices {re.escape(text)}: "):
        read_names(text)


def test_without_a_gpu_all_devices_are_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert read_names("auto") == ("cpu",)
