"""The files of a calibrated run's shards, each with what was measured of it beside it."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType

from torch import Tensor

from bitpress.checkpoint.filenames import BLOCK_RESULT_SUFFIX
from bitpress.checkpoint.reader import Reader
from bitpress.checkpoint.signed_json import is_signed, sign_json
from bitpress.checkpoint.writer import OutputFolder, copy_entry
from bitpress.compression.calibration.block import WriteTensor
from bitpress.compression.calibration.block_result import BlockResult
from bitpress.compression.resources import Resources
from bitpress.output.rescaling import rescale
from bitpress.planning.layout import Shard

# Is given what writes a stored tensor.
Compress = Callable[[WriteTensor], BlockResult]


class FittedShards(AbstractContextManager["FittedShards"]):
    """Shards that are fitted to data. A finished one has its result beside it.

    A GPU goes on with the next block while a shard is written and digested in a thread: what is
    stored of one block waits in the host's memory. On a CPU, a tensor is written as soon as it is
    there, and takes no memory any longer.
    """

    def __init__(self, output: OutputFolder, resources: Resources) -> None:
        self._output, self._resources = output, resources
        self._thread = ThreadPoolExecutor(1, "writer")
        self._writing: Future[BlockResult] | None = None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # a block that is computed is not lost with the next one
        self._thread.shutdown()
        if error is None:
            self._wait()

    def read_finished(self, shard: Shard) -> BlockResult | None:
        """What an earlier run has measured of a shard that it has finished, the same for all ranks;
        None where none has.
        """
        process_group, file = self._resources.process_group, self._result_file(shard)
        # rank 0 looks, since another host may see a file later
        is_finished = (
            process_group.is_rank_zero
            and self._output.has_shard(shard.name, shard.header, self._resources.num_threads)
            and file.is_file()
            and is_signed(file.read_bytes())
        )
        if not process_group.broadcast_object(is_finished):
            return None
        return BlockResult.from_json(json.loads(file.read_text()))

    def write(self, shard: Shard, compress: Compress) -> BlockResult:
        """Let every rank compress a shard's layers, and rank 0 write it.

        Raises:
            OutputError: it cannot be written, or the shard before it could not.
        """
        if not self._resources.process_group.is_rank_zero:
            return compress(lambda name, tensor: None)
        if self._resources.device.type == "cpu":
            return self._write_file(shard, compress)

        stored: list[tuple[str, Tensor]] = []
        result = compress(lambda name, tensor: stored.append((name, tensor.cpu())))

        def write_stored(write_tensor: WriteTensor) -> BlockResult:
            for name, tensor in stored:
                write_tensor(name, tensor)
            return result

        self._wait()
        self._writing = self._thread.submit(self._write_file, shard, write_stored)
        return result

    def _wait(self) -> None:
        """Wait for what the thread writes; raises what it has raised."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write_file(self, shard: Shard, write_layers: Compress) -> BlockResult:
        """Write a shard, and what was measured of it, which is what writes its layers returns."""
        entries = {entry.name: entry for entry in shard.header.entries}
        with (
            self._output.shard(shard.name, shard.header) as writer,
            # a reader is one thread's
            Reader() as reader,
        ):
            result = write_layers(lambda name, tensor: writer.write(entries[name], tensor))
            for entry in shard.copies:
                if entry.name in result.rescaled:
                    rescaled = rescale(reader.whole(entry), result.rescaled[entry.name])
                    writer.write(entries[entry.name], rescaled)
                else:
                    copy_entry(entry, entries[entry.name], reader, writer)
            # before the shard has its name: a finished shard has its result beside it
            self._output.write_text(self._result_file(shard).name, sign_json(result.as_json()))
        return result

    def _result_file(self, shard: Shard) -> Path:
        return self._output.folder / f"{shard.name}{BLOCK_RESULT_SUFFIX}"
