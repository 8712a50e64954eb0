"""Devices are found by the names that people and machines have for them."""

from __future__ import annotations

import pytest

from bitpress.errors import BitpressError
from bitpress.schemes.hardware import DEVICES, Hardware, find_device


@pytest.mark.parametrize(
    ("printed", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", "NVIDIA A100"),
        ("NVIDIA A100 80GB PCIe", "NVIDIA A100"),
        ("NVIDIA H100 80GB HBM3", "NVIDIA H100"),
        ("NVIDIA H100 NVL", "NVIDIA H100"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA H100"),
        ("NVIDIA GH200 480GB", "NVIDIA GH200"),
        ("NVIDIA GeForce RTX 4090", "NVIDIA RTX 4090"),
        ("NVIDIA GeForce RTX 2080 Ti", "NVIDIA RTX 2080 Ti"),
        ("NVIDIA RTX 6000 Ada Generation", "NVIDIA RTX 6000 Ada"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "NVIDIA RTX PRO 6000"),
        ("NVIDIA GB10", "NVIDIA DGX Spark"),
        ("Tesla V100-SXM2-16GB", "NVIDIA V100"),
        ("Tesla T4", "NVIDIA T4"),
        ("AMD Instinct MI300X", "AMD MI300X"),
        ("AMD Radeon RX 7900 XTX", "AMD RX 7900 XTX"),
        ("Intel(R) Data Center GPU Max 1550", "Intel Data Center GPU Max"),
        ("cpu x86 with amx", "CPU x86 with AMX"),
        ("rtx 4090", "NVIDIA RTX 4090"),
        ("9.0", "NVIDIA H100"),
        ("sm_90", "NVIDIA H100"),
        ("12.1", "NVIDIA DGX Spark"),
        ("sm_100a", "NVIDIA B200"),
        ("gfx942", "AMD MI300X"),
    ],
)
def test_a_device_is_found_by_what_machines_print(printed: str, name: str) -> None:
    assert find_device(printed).name == name


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
def test_every_device_is_found_by_its_own_name(device: Hardware) -> None:
    assert find_device(device.name) is device
    assert find_device(device.name.split(maxsplit=1)[1].upper()) is device


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("H101", "NVIDIA H100"),
        ("MI300", "AMD MI300X"),
        ("NVIDIA GeForce RTX 4080", "NVIDIA RTX 4090"),
    ],
)
def test_on_a_miss_the_three_nearest_are_named(name: str, nearest: str) -> None:
    with pytest.raises(BitpressError, match="no known device") as error:
        find_device(name)
    assert nearest in str(error.value)
    assert len([device for device in DEVICES if f" {device.name}" in str(error.value)]) >= 3


@pytest.mark.parametrize("name", ["AMD A100", "NVIDIA A100 B200", "GeForce", "", "RTX"])
def test_what_names_no_device_is_refused(name: str) -> None:
    with pytest.raises(BitpressError, match="no known device"):
        find_device(name)


def test_an_unknown_capability_is_answered_with_the_known_ones() -> None:
    with pytest.raises(BitpressError, match=r"capability 8\.7 \(known: 6\.0, 7\.0"):
        find_device("8.7")
