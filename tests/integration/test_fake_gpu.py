"""Every scheme works on numbers that lie on a GPU, though the GPU is pretended (`elsewhere`)."""

from __future__ import annotations

import errno
import io
import math
import pickle
import re
import threading
import warnings
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from fixtures.architectures import build
from fixtures.fake_gpu import GPU, Elsewhere, Pretended, Stream, bare
from fixtures.learner_scheme import CONFIG, runnable_model
from torch import Tensor

import bitpress
from bitpress import Layer, numerics
from bitpress.checkpoint.filenames import BLOCK_RESULT_SUFFIX
from bitpress.checkpoint.reader import Reader, open_checkpoint
from bitpress.compression.calibration.activation_streams import ActivationStreams
from bitpress.compression.calibration.fitted_shards import FittedShards
from bitpress.conformance import trial
from bitpress.conformance.models import files_of
from bitpress.modeling import decoder
from bitpress.modeling.capture import BlockCall
from bitpress.modeling.decoder import Decoder, DecoderOptions
from bitpress.modeling.hidden_states import HiddenStates
from bitpress.modeling.host_weights import BroughtWeights, HostLinear
from bitpress.numerics import kernel_trial, output_hessian, scale_search, wavefront
from bitpress.output import verify
from bitpress.output.compressed_model import DequantizingReader
from bitpress.planning import memory_estimate
from bitpress.runtime import devices, operating_system
from bitpress.runtime.devices import CopyStream
from bitpress.runtime.process_group import ProcessGroup
from bitpress.schemes import attention_cache, pipeline
from bitpress.schemes.activation_quantizer import find_activation_quantizer
from bitpress.schemes.registry import Step, discover
from bitpress.schemes.values import StoredLayer

VARIANTS = {
    f"{name}, {label}": step
    for name in sorted(discover().schemes)
    for label, step in trial.variants(name, (), discover()).items()
}
STEPS = {name: step for name, step in VARIANTS.items() if not step.scheme.quantizes_cache}
CACHES = {name: step for name, step in VARIANTS.items() if step.scheme.quantizes_cache}
TOKENS = 160


@pytest.fixture(autouse=True)
def without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels do not find the numbers of a GPU that is not there."""
    monkeypatch.setattr(kernel_trial, "can_fuse", lambda device: False)


@pytest.fixture(autouse=True)
def few_row_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every operation goes through Python here: two groups follow each other as sixteen do."""
    monkeypatch.setattr(output_hessian, "FEW_ROW_GROUPS", 2)


def everything(step: Step, weight: Tensor, move: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """All tensors that a scheme's hooks give back for a layer whose weight and inputs lie
    somewhere.
    """
    draw = torch.Generator().manual_seed(0)
    out, width = weight.shape
    layer, stats = Layer("layer", move(weight), torch.bfloat16), {}
    for _ in range(2 if step.calibrated else 0):
        # as a model in bfloat16 makes them, with many powers of two among them
        inputs = torch.randn(TOKENS, width, generator=draw).bfloat16().float()
        reference = inputs + 0.01 * torch.randn(TOKENS, width, generator=draw)
        residual = torch.randn(TOKENS, out, generator=draw)
        pipeline.merge(
            stats,
            pipeline.observe(step, layer.weight, move(inputs), move(reference), move(residual)),
        )
    if step.scheme.takes_argument("observe", "weight"):
        pipeline.merge(stats, pipeline.observe(step, layer.weight))
    record = pipeline.serialize(
        pipeline.pack(pipeline.quantize(layer, [step], [stats]), [step]), [step]
    )
    result = {"restored": pipeline.dequantize(record.tensors, record.config, [step], (out, width))}
    if step.rescales and (factors := pipeline.rescale(layer, [step], [stats])) is not None:
        result["factors"] = factors
    if (quantizer := find_activation_quantizer(record.tensors, record.config, [step])) is not None:
        result["inputs"] = quantizer(move(torch.randn(TOKENS, width, generator=draw)))
    return {**record.tensors, **result}


@pytest.mark.parametrize("name", STEPS)
def test_hooks_give_on_a_gpu_what_they_give_on_the_cpu(name: str) -> None:
    step = STEPS[name]
    weight = trial.weights(step)["normal"]
    expected = everything(step, weight, torch.clone)
    with Pretended():
        result = everything(step, weight, lambda tensor: tensor.to(GPU))
    assert result.keys() == expected.keys()
    for key in ("restored", *({"inputs", "factors"} & result.keys())):
        assert result[key].device == GPU, key
    for key, tensor in expected.items():
        assert trial.are_equal(bare(result[key]), tensor), key


@pytest.mark.parametrize("name", CACHES)
def test_hooks_for_a_cache_give_on_a_gpu_what_they_give_on_the_cpu(name: str) -> None:
    step, draw = CACHES[name], torch.Generator().manual_seed(0)
    states = [torch.randn(2, heads, 9, 16, generator=draw).bfloat16() for heads in (6, 2, 2)]

    def everything_of(states: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        statistics = [attention_cache.observe(step, x) for x in states]
        stats = dict(zip(attention_cache.STATES, statistics, strict=True))
        stored = attention_cache.serialize(step, stats, torch.bfloat16)
        quantize = attention_cache.cache_quantizer(step, stored.tensors, stored.config)
        return [*stored.tensors.values(), *quantize(*states)]

    expected = everything_of(states)
    with Pretended():
        result = everything_of([x.to(GPU) for x in states])
    for tensor, own in zip(expected, result, strict=True):
        assert own.device == GPU
        assert trial.are_equal(bare(own), tensor)


# Kernels do not know what statistics and weights are made of, and groups of 64 are as those of 32.
RULES = [
    name
    for name, step in STEPS.items()
    if step.calibrated and not re.search("reference=|rotate=|group_size=(64|auto)", name)
]


# of rows that a program has and the weight has not
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", RULES)
def test_a_gpu_with_triton_gives_what_the_cpu_gives(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fixtures.interpreted_triton import interpret_on_fake_gpu

    interpret_on_fake_gpu(monkeypatch, block=64)
    step = STEPS[name]
    # the interpreter takes 10 ms for each column
    weight = trial.weights(step)["normal"][:16, :128]
    expected = everything(step, weight, torch.clone)
    with Pretended():
        result = everything(step, weight, lambda tensor: tensor.to(GPU))
    for key, tensor in expected.items():
        assert trial.are_equal(bare(result[key]), tensor), key


def test_a_gpu_chooses_the_scales_of_more_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale_search, "WEIGHTS_PER_CHUNK", 1 << 10)
    weight, calls = torch.randn(64, 64), []

    def fit(weight: Tensor) -> Tensor:
        with patch.object(
            scale_search, "embedding_bag", wraps=scale_search.embedding_bag
        ) as look_up:
            grid = numerics.fit_symmetric(weight, None, 4, 32, (0.8, 0.9, 1.0))
        calls.append(look_up.call_count)
        return grid.scale

    expected = fit(weight)
    with Pretended():
        assert torch.equal(bare(fit(weight.to(GPU))), expected)
    assert calls == [4, 1]


RUNS = {
    "fp8": ("fp8", ()),
    "fp8 with keys and values in FP8": ("fp8+kv-fp8", ()),
    "int8": ("int8", ("smoothing=0.5",)),
    "w4a16 by GPTQ": ("w4a16", ("group_size=32",)),
    "mxfp4": ("mxfp4", ()),
    "nvfp4": ("nvfp4", ()),
    "2:4, then fp8": ("sparse-2of4+fp8", ()),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = runnable_model(
        tmp_path_factory.mktemp("elsewhere") / "model", config=CONFIG | {"num_hidden_layers": 2}
    )
    (folder.parent / "check.txt").write_text((folder.parent / "text.txt").read_text()[:2000])
    return folder


@pytest.fixture(autouse=True)
def room(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU has 16 GiB, all of them free."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 34, 1 << 34))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    Stream.install(monkeypatch)


@pytest.fixture
def threads_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads of a pool have the GPU as well."""
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    assign = devices.ThreadDevices.assign

    def assign_pretended(self: devices.ThreadDevices) -> None:
        assign(self)
        # as long as the thread lives
        Pretended().__enter__()

    monkeypatch.setattr(devices.ThreadDevices, "assign", assign_pretended)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_on_a_gpu_is_proved_and_as_good_as_on_the_cpu(
    model: Path, tmp_path: Path, threads_too: None, name: str
) -> None:
    scheme, settings = RUNS[name]
    text = model.parent / "check.txt"
    options = {
        "calibration": model.parent / "text.txt",
        "samples": 12,
        "sequence_length": 32,
        "threads": 1,
    }
    # blocks run in bfloat16 there: what is drawn for gradients follows from the last digits
    with patch("bitpress.compression.calibrated.has_cpu_feature", lambda *names: True):
        here = bitpress.compress(
            model, tmp_path / "cpu", scheme=scheme, settings=settings, **options
        )
    with Pretended():
        on_gpu = bitpress.compress(
            model,
            tmp_path / "gpu",
            scheme=scheme,
            settings=settings,
            device="cuda:0",
            check=text,
            **options,
        )
    assert on_gpu.check is not None
    assert not [warning for warning in on_gpu.warnings if "backward" in warning]
    for module, layer in here.layers.items():
        assert on_gpu.layers[module].error == pytest.approx(layer.error, rel=0.05), module
    assert on_gpu.check.kl == pytest.approx(
        bitpress.eval(tmp_path / "cpu", against=model, text=text).kl, rel=0.3
    )


class WithoutTensors(pickle.Pickler):
    """Refuses to pickle a tensor."""

    def reducer_override(self, value: Any) -> Any:
        assert not isinstance(value, Tensor)
        return NotImplemented


@pytest.mark.usefixtures("threads_too")
def test_no_tensor_goes_to_other_ranks_as_an_object(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # unpickled there, it would lie on the GPU of the rank that sent it
    sent = 0

    def send(self: ProcessGroup, value: Any, source: int = 0) -> Any:
        nonlocal sent
        WithoutTensors(io.BytesIO()).dump(value)
        sent += 1
        return value

    monkeypatch.setattr(ProcessGroup, "broadcast_object", send)
    monkeypatch.setattr(ProcessGroup, "all_gather_object", lambda *given: [send(*given)])
    # factors are chosen on one rank, and folded on all
    scheme, settings = RUNS["int8"]
    manifest = compress_on_gpu(model, tmp_path / "o", scheme=scheme, settings=settings)
    assert manifest.rescaled
    assert sent


def compress_on_gpu(model: Path, out: Path, **options: Any) -> bitpress.Manifest:
    with Pretended():
        return bitpress.compress(
            model,
            out,
            calibration=model.parent / "text.txt",
            samples=12,
            sequence_length=32,
            device="cuda:0",
            **{"scheme": "w4a16", "settings": ["group_size=32"], **options},
        )


@pytest.mark.usefixtures("threads_too")
def test_what_is_read_back_is_decoded_and_compared_on_the_gpu(model: Path, tmp_path: Path) -> None:
    places: dict[str, list[torch.device]] = {"proof": [], "check": []}
    measure, read = verify.measure_stored, DequantizingReader.rows

    def noted_measure(stored: StoredLayer, steps: Any, shape: Any, source: Any) -> Any:
        tensors = [*stored.tensors.values(), source]
        places["proof"] += [tensor.device for tensor in tensors if tensor.ndim]
        return measure(stored, steps, shape, source)

    def noted_read(*arguments: Any) -> Tensor:
        rows = read(*arguments)
        places["check"].append(rows.device)
        return rows

    with (
        patch.object(verify, "measure_stored", noted_measure),
        patch.object(DequantizingReader, "rows", noted_read),
    ):
        compress_on_gpu(model, tmp_path / "o", check=model.parent / "check.txt")
    assert set(places["proof"]) == set(places["check"]) == {GPU}


@pytest.mark.parametrize("name", RUNS)
def test_a_folder_is_proved_on_the_gpu_as_on_the_cpu(
    model: Path, tmp_path: Path, threads_too: None, name: str
) -> None:
    scheme, _ = RUNS[name]
    bitpress.compress(model, tmp_path / "o", scheme=scheme, effort="low", progress=False)
    here = bitpress.verify(tmp_path / "o", model)
    places, measure = set[torch.device](), verify.measure_stored

    def noted_measure(stored: StoredLayer, steps: Any, shape: Any, source: Any) -> Any:
        tensors = [*stored.tensors.values(), source]
        places.update(tensor.device for tensor in tensors if tensor.ndim)
        return measure(stored, steps, shape, source)

    with Pretended(), patch.object(verify, "measure_stored", noted_measure):
        on_gpu = bitpress.verify(tmp_path / "o", model, device="cuda:0")
    assert on_gpu == here
    assert not here.faults
    assert places == {GPU}


@pytest.mark.usefixtures("threads_too")
def test_where_hidden_states_are_kept_changes_no_byte(model: Path, tmp_path: Path) -> None:
    plan = bitpress.plan(model, scheme="w4a16", settings=["group_size=32"])
    estimate = memory_estimate.estimate_device(plan, 12 * 32, 32)
    kept: dict[str, list[torch.device]] = {"all": [], "least": []}
    append = HiddenStates.append
    for name, limit in (("all", 2 * estimate.in_memory), ("least", estimate.on_disk)):

        def noted(states: HiddenStates, tensor: Tensor, name: str = name) -> None:
            append(states, tensor)
            kept[name].append(states[len(states) - 1].device)

        with patch.object(HiddenStates, "append", noted):
            compress_on_gpu(model, tmp_path / name, max_device_memory=limit)
    assert set(kept["all"]) == {GPU}
    assert set(kept["least"]) == {torch.device("cpu")}
    assert files_of(tmp_path / "all") == files_of(tmp_path / "least")


def test_the_host_waits_for_a_gpu_once_for_each_tensor_that_it_reads(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits, dispatch = 0, Elsewhere.__torch_dispatch__

    def counted(cls: type[Elsewhere], func: Any, *others: Any) -> Any:
        nonlocal waits
        waits += func.overloadpacket.__name__ in ("_local_scalar_dense", "is_nonzero")
        return dispatch(func, *others)

    monkeypatch.setattr(Elsewhere, "__torch_dispatch__", classmethod(counted))
    # each weight in many parts
    monkeypatch.setattr(decoder, "NUMBERS_PER_READ", 512)
    checkpoint = open_checkpoint(model)
    with Pretended(), Reader(pinned=True) as reader:
        loaded = Decoder(checkpoint, "model.layers", reader, DecoderOptions(GPU)).load_block(0)
    parameters = list(loaded.parameters())
    assert max(parameter.numel() for parameter in parameters) > 10 * 512
    assert waits == len(parameters)


@pytest.mark.parametrize("spilled", [False, True], ids=["in memory", "on disk"])
def test_the_hidden_states_of_the_next_batch_are_copied_while_this_one_is_computed_with(
    tmp_path: Path, spilled: bool
) -> None:
    batches = [torch.full((1, 2, 4), float(i)) for i in range(4)]
    copied = []

    def begin(stream: CopyStream, tensor: Tensor) -> Tensor:
        copied.append(int(tensor[0, 0, 0]))
        return begin_copy(stream, tensor)

    begin_copy = CopyStream.begin
    with Pretended(), patch.object(CopyStream, "begin", begin):
        states = HiddenStates(batches, tmp_path if spilled else None)
        for i in range(4):
            brought = states.bring(i, GPU, i + 1)
            assert copied == list(range(min(i + 2, 4)))
            assert torch.equal((brought + 1).cpu(), batches[i] + 1)
        # others than were expected, or others by now
        states.bring(0, GPU, 1)
        assert torch.equal(states.bring(2, GPU, 3).cpu(), batches[2])
        states[3] = batches[0].to(GPU)
        assert torch.equal(states.bring(3, GPU).cpu(), batches[0])
        assert copied[4:] == [0, 1, 2, 3, 0]

        # the fake GPU notices a copy that nobody has waited for
        with pytest.raises(RuntimeError, match="another stream"):
            _ = CopyStream(GPU).begin(batches[0]) + 1


@pytest.mark.usefixtures("threads_too")
def test_a_shard_is_written_while_the_next_block_is_computed(model: Path, tmp_path: Path) -> None:
    enter_block, flush = ActivationStreams.enter_block, operating_system.flush_to_disk
    entered, second_block, is_entered = [], threading.Event(), []

    def noted_enter(streams: ActivationStreams, block: torch.nn.Module, *others: Any) -> None:
        entered.append(type(block))
        if len(entered) == 2:
            second_block.set()
        enter_block(streams, block, *others)

    def slow_flush(descriptor: int) -> None:
        if threading.current_thread() is not threading.main_thread():
            is_entered.append(second_block.wait(timeout=60))
        flush(descriptor)

    with (
        patch.object(ActivationStreams, "enter_block", noted_enter),
        patch.object(operating_system, "flush_to_disk", slow_flush),
    ):
        compress_on_gpu(model, tmp_path / "o")
    assert is_entered
    assert all(is_entered)
    assert not bitpress.verify(tmp_path / "o", model).faults


@pytest.mark.usefixtures("threads_too")
def test_a_disk_that_fills_up_while_the_next_block_is_computed_ends_the_run_which_goes_on_later(
    model: Path, tmp_path: Path
) -> None:
    flush = operating_system.flush_to_disk

    def full(descriptor: int) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise OSError(errno.ENOSPC, "No space left on device")
        flush(descriptor)

    with (
        patch.object(operating_system, "flush_to_disk", full),
        pytest.raises(bitpress.BitpressError, match="the disk is full; make room and run the same"),
    ):
        compress_on_gpu(model, tmp_path / "o")
    assert not list((tmp_path / "o").glob("*.part"))
    assert not (tmp_path / "o" / "config.json").exists()
    compress_on_gpu(model, tmp_path / "o")
    compress_on_gpu(model, tmp_path / "whole")
    assert files_of(tmp_path / "o") == files_of(tmp_path / "whole")


@pytest.mark.usefixtures("threads_too")
def test_a_run_asks_for_hidden_states_in_the_order_in_which_they_are_copied_ahead(
    model: Path, tmp_path: Path
) -> None:
    plan = bitpress.plan(model, scheme="w4a16", settings=["group_size=32"])
    asked, late = set(), set()
    bring = HiddenStates.bring

    def noted(states: HiddenStates, index: int, *others: Any) -> Tensor:
        asked.add(index)
        if index not in states._ahead:
            late.add(index)
        return bring(states, index, *others)

    with (
        patch.object(memory_estimate, "BATCH_TOKENS", 64),
        patch.object(HiddenStates, "bring", noted),
    ):
        limit = memory_estimate.estimate_device(plan, 32, 32).on_disk
        compress_on_gpu(model, tmp_path / "o", max_device_memory=limit)
    assert asked == set(range(12 * 32 // 64))
    # of each pass the first batch
    assert late == {0}


@pytest.mark.usefixtures("threads_too")
def test_blocks_that_do_not_fit_are_brought_expert_by_expert_to_the_same_bytes(
    tmp_path: Path,
) -> None:
    model = build("qwen3_moe", tmp_path / "model")
    # scales are folded, and gradients taken: all that is done with a block's weights
    recipe = {"scheme": "int8", "settings": ["smoothing=0.5"]}
    data = {"calibration": tmp_path / "text.txt", "samples": 6, "sequence_length": 32}
    plan = bitpress.plan(model, **recipe)
    whole = memory_estimate.estimate_device(plan, 6 * 32, 32)
    by_layer = memory_estimate.estimate_device(plan, 6 * 32, 32, by_layer=True)
    held = Held()
    with Pretended(), patch.object(BroughtWeights, "copy", held.note(BroughtWeights.copy)):
        for name, limit in (("whole", whole.on_disk), ("by layer", by_layer.on_disk)):
            bitpress.compress(
                model,
                tmp_path / name,
                device="cuda:0",
                max_device_memory=limit,
                **recipe,
                **data,
            )
            assert bool(held.most_bytes) == (name == "by layer")
    assert held.most_bytes <= memory_estimate.brought_bytes(plan)
    assert held.most_bytes < memory_estimate.host_block_bytes(plan) / 4
    assert files_of(tmp_path / "whole") == files_of(tmp_path / "by layer")


@pytest.mark.usefixtures("threads_too")
def test_experts_that_a_gpu_solves_together_become_what_they_become_one_by_one(
    tmp_path: Path,
) -> None:
    model = build("qwen3_moe", tmp_path / "model")
    plan = bitpress.plan(model, scheme="w4a16", settings=["group_size=32"])
    alone = memory_estimate.estimate_device(plan, 12 * 32, 32).on_disk
    for name, limit, num_experts in (("alone", alone, 1), ("together", None, 2)):
        with patch.object(wavefront, "_sweep_layers", wraps=wavefront._sweep_layers) as sweep:
            compress_on_gpu(model, tmp_path / name, max_device_memory=limit)
        assert max(len(call.args[0]) for call in sweep.call_args_list) == num_experts
    assert files_of(tmp_path / "together") == files_of(tmp_path / "alone")


class Held:
    """Counts the bytes of the copies that are there at once."""

    def __init__(self) -> None:
        self.most_bytes = self._bytes = 0

    def note(self, copy: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def noted(*args: Any) -> Tensor:
            result = copy(*args)
            self._add(result.nbytes)
            weakref.finalize(result, self._add, -result.nbytes)
            return result

        return noted

    def _add(self, num_bytes: int) -> None:
        self._bytes += num_bytes
        self.most_bytes = max(self.most_bytes, self._bytes)


def search_on_gpu(model: Path, tmp_path: Path) -> object:
    result = bitpress.search(
        model,
        tmp_path / f"{len(list(tmp_path.iterdir()))}.toml",
        schemes=("int8:smoothing=0.5", "w4a16:group_size=32"),
        budget=6,
        calibration=model.parent / "text.txt",
        samples=4,
        sequence_length=16,
        device="cuda:0",
    )
    return result.divergences


def search_by_bytes_on_gpu(model: Path, tmp_path: Path) -> object:
    result = bitpress.search(
        model,
        tmp_path / f"{len(list(tmp_path.iterdir()))}.toml",
        schemes=("w8a16:group_size=32", "fp8", "kv-fp8"),
        budget="1GB",
        cache_tokens=100,
        calibration=model.parent / "text.txt",
        samples=4,
        sequence_length=16,
        device="cuda:0",
    )
    assert {"lm_head", "cache"} < result.choice.keys()
    return result.divergences


def evaluate_on_gpu(model: Path, tmp_path: Path) -> object:
    out, text = tmp_path / "compressed", model.parent / "check.txt"
    if not out.exists():
        bitpress.compress(model, out, scheme="fp8")
    return bitpress.eval(out, text, model, max_tokens=256, sequence_length=64, device="cuda:0")


@pytest.mark.parametrize("measure", [search_on_gpu, search_by_bytes_on_gpu, evaluate_on_gpu])
@pytest.mark.usefixtures("threads_too")
def test_blocks_that_do_not_fit_while_they_are_measured_are_brought_to_the_same_figures(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    measure: Callable[[Path, Path], object],
) -> None:
    # of a vocabulary this small, logits take less than a block
    monkeypatch.setattr(memory_estimate, "MAX_LOGITS", 1 << 10)
    held = Held()
    with Pretended(), patch.object(BroughtWeights, "copy", held.note(BroughtWeights.copy)):
        whole = measure(model, tmp_path)
        assert not held.most_bytes
        give(monkeypatch, 0)
        with (
            patch.object(devices, "require_memory", side_effect=InterruptedError) as required,
            pytest.raises(InterruptedError),
        ):
            measure(model, tmp_path)
        # what is asked for is enough
        give(monkeypatch, required.call_args.args[1])
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".*may run out of memory")
            assert measure(model, tmp_path) == whole
    # of a block in bfloat16
    block_bytes = memory_estimate.host_block_bytes(bitpress.plan(model, scheme="int8"))
    assert 0 < held.most_bytes < 2 * block_bytes / 2


def give(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    """Let a run take so many bytes of the GPU's memory."""
    free_bytes = math.ceil(num_bytes / devices.DEVICE_SHARE)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free_bytes, free_bytes))


@pytest.mark.usefixtures("threads_too")
def test_a_check_needs_no_more_of_a_gpu_than_it_may_take(model: Path, tmp_path: Path) -> None:
    # the largest layer while the check computes, but not what it makes of a batch
    plan = bitpress.plan(model, scheme="w4a16", settings=["group_size=32"])
    limit = memory_estimate.estimate_device(plan, 32, 32, by_layer=True).on_disk
    with pytest.raises(bitpress.BitpressError, match="max-device-memory allows"):
        compress_on_gpu(
            model, tmp_path / "o", max_device_memory=limit, check=model.parent / "check.txt"
        )
    assert not (tmp_path / "o").exists()


@pytest.mark.usefixtures("threads_too")
def test_a_gpu_that_runs_out_of_memory_is_given_less_at_a_time(model: Path, tmp_path: Path) -> None:
    finished: dict[Path, int] = {}
    call_block, write = BlockCall.__call__, FittedShards.write

    def write_at_once(shards: FittedShards, *arguments: Any) -> Any:
        # whether the first block is finished must not depend on how fast a disk is
        result = write(shards, *arguments)
        shards._wait()
        return result

    def short_of_memory(call: BlockCall, block: torch.nn.Module, states: Tensor) -> Any:
        # the second block has room for four sequences
        for note in (tmp_path / "short").glob(f"*{BLOCK_RESULT_SUFFIX}"):
            shard = note.with_name(note.name.removesuffix(BLOCK_RESULT_SUFFIX))
            finished.setdefault(shard, shard.stat().st_mtime_ns)
        if finished and len(states) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return call_block(call, block, states)

    with (
        patch.object(FittedShards, "write", write_at_once),
        patch.object(BlockCall, "__call__", short_of_memory),
        pytest.warns(UserWarning, match="cuda:0 has run out of memory.*96 tokens at a time"),
    ):
        manifest = compress_on_gpu(model, tmp_path / "short")
    first = min(finished, key=lambda shard: finished[shard])
    assert first.stat().st_mtime_ns == finished[first]
    whole = compress_on_gpu(model, tmp_path / "whole")
    for module, layer in whole.layers.items():
        assert manifest.layers[module].error == pytest.approx(layer.error, rel=0.05), module


@pytest.mark.usefixtures("threads_too")
def test_a_gpu_that_has_no_room_for_a_block_is_given_it_layer_by_layer_at_last(
    model: Path, tmp_path: Path
) -> None:
    call_block = BlockCall.__call__

    def short_of_memory(call: BlockCall, block: torch.nn.Module, states: Tensor) -> Any:
        if not any(isinstance(module, HostLinear) for module in block.modules()):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return call_block(call, block, states)

    with (
        patch.object(BlockCall, "__call__", short_of_memory),
        pytest.warns(UserWarning, match="32 tokens at a time, its weights brought layer by layer"),
    ):
        short = compress_on_gpu(model, tmp_path / "short")
    whole = compress_on_gpu(model, tmp_path / "whole")
    for module, layer in whole.layers.items():
        assert short.layers[module].error == pytest.approx(layer.error, rel=0.05), module


def test_a_gpu_that_may_not_give_enough_is_refused_before_work_starts(
    model: Path, tmp_path: Path
) -> None:
    with pytest.raises(bitpress.BitpressError) as error:
        compress_on_gpu(model, tmp_path / "o", max_device_memory="1MB")
    assert "MB of cuda:0's memory, more than the 1 MB that --max-device-memory allows" in str(
        error.value
    )
    assert not (tmp_path / "o").exists()


def test_tensors_on_two_devices_do_not_meet() -> None:
    with Pretended():
        x = torch.ones(3).to(GPU)
        assert isinstance(x, Elsewhere)
        assert (x + x).cpu().tolist() == [2.0, 2.0, 2.0]
        for wrong in (
            lambda: x + torch.ones(3),
            lambda: x.numpy(),
            lambda: torch.where(x > 0, x, torch.ones(3)),
        ):
            with pytest.raises((RuntimeError, TypeError)):
                wrong()
