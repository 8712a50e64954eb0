"""Devices, threads and memory of a run, and what it may do, once they are chosen."""

from __future__ import annotations

import torch
from attrs import frozen

from bitpress.runtime.process_group import SINGLE_PROCESS, ProcessGroup


@frozen
class Resources:
    """Devices, threads and memory of one process.

    Attributes:
        devices: which share work that can be split; the first does what cannot.
        num_threads: of the process; they share the devices.
        max_memory: bytes of the process; None: no limit.
        max_device_memory: bytes of a GPU; None: what is free there.
        trust_remote_code: whether code in the model's folder may run.
        process_group: the processes that share the run.
        is_proved: whether what is stored is measured before it is written.
    """

    devices: tuple[torch.device, ...] = (torch.device("cpu"),)
    num_threads: int = 1
    max_memory: int | None = None
    max_device_memory: int | None = None
    trust_remote_code: bool = False
    process_group: ProcessGroup = SINGLE_PROCESS
    is_proved: bool = True

    @property
    def device(self) -> torch.device:
        """The one that does what cannot be split: a calibrated run uses no other."""
        return self.devices[0]
