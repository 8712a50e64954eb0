"""Running any decoder block by block, with its weights read when they are needed, gives what the
whole model gives.
"""

from __future__ import annotations

import gc
import os
import weakref
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from fixtures.fake_gpu import GPU, Pretended
from fixtures.forked import ForkedCommand
from fixtures.small_models import build_small_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from bitpress import CheckpointError
from bitpress.checkpoint.reader import Reader, open_checkpoint
from bitpress.compression.calibration.activation_streams import (
    ActivationStreams,
    ReferenceStates,
    StreamLimits,
)
from bitpress.compression.calibration.resumable_forward import Breakpoints, trace_forward
from bitpress.modeling.capture import capture_inputs, open_head
from bitpress.modeling.decoder import Decoder, DecoderOptions
from bitpress.modeling.hidden_states import HiddenStates
from bitpress.runtime import operating_system

COMMON = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "head_dim": 8,
    "pad_token_id": 0,
    "max_position_embeddings": 64,
}
SLIDING = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
# by what is special: the container of the blocks, and the config's own keys
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("model.layers", {}),
    "qwen3": ("model.layers", {}),
    "mistral": ("model.layers", {"sliding_window": 4}),
    "gemma2": ("model.layers", SLIDING),
    "gemma3_text": ("model.layers", SLIDING),
    "phi3": ("model.layers", {}),
    "gpt_neox": ("gpt_neox.layers", {}),
    "olmo2": ("model.layers", {}),
    "falcon": (
        "transformer.h",
        {"head_dim": None, "new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "granite": ("model.layers", {}),
    "opt": ("model.decoder.layers", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
}
# two batches of three sequences of twelve tokens
BATCHES = (torch.arange(72).reshape(2, 3, 12) * 7 % 95 + 1).unbind(0)
CPU, FLOAT = torch.device("cpu"), torch.float32


@pytest.fixture(scope="module", params=FAMILIES)
def family(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """A made-up model on disk, and the name of its list of blocks."""
    container, extra = FAMILIES[request.param]
    torch.manual_seed(0)
    keys = {key: value for key, value in (COMMON | extra).items() if value is not None}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(request.param, **keys))
    folder = tmp_path_factory.mktemp(request.param)
    for parameter in model.parameters():
        # so that norms and biases are not all alike
        parameter.data += 0.05 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    return folder, container


def last_hidden(folder: Path, container: str, batch: Tensor) -> Tensor:
    """What the last block of the whole model returns."""
    model, captured = AutoModelForCausalLM.from_pretrained(folder, dtype=FLOAT).eval(), []
    model.get_submodule(container)[-1].register_forward_hook(
        lambda module, arguments, output: captured.append(output)
    )
    with torch.no_grad():
        model(input_ids=batch, use_cache=False)
    return captured[0][0] if isinstance(captured[0], tuple) else captured[0]


@pytest.mark.parametrize("spilled", [False, True], ids=["in memory", "on disk"])
def test_blocks_run_alone_give_what_the_whole_model_gives(
    family: tuple[Path, str], tmp_path: Path, spilled: bool
) -> None:
    folder, container = family
    with Reader() as reader, torch.no_grad():
        decoder = Decoder(open_checkpoint(folder), container, reader)
        captured = capture_inputs(decoder, BATCHES, tmp_path if spilled else None)
        states = captured.hidden_states
        streams = ActivationStreams(states, CPU, StreamLimits(0))
        for index in range(len(decoder)):
            streams.enter_block(decoder.load_block(index), None, captured.calls[index])
            streams.leave_block()
    for i, batch in enumerate(BATCHES):
        assert torch.equal(states[i], last_hidden(folder, container, batch))


def test_the_head_makes_of_the_last_block_s_outputs_what_the_whole_model_makes(
    family: tuple[Path, str],
) -> None:
    folder, container = family
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=FLOAT).eval()
    with Reader() as reader, torch.no_grad():
        decoder = Decoder(open_checkpoint(folder), container, reader)
        with open_head(decoder, () if container == "transformer.h" else None) as logits:
            hidden = last_hidden(folder, container, BATCHES[0]).flatten(0, 1)
            result = torch.cat([logits(piece) for piece in hidden.split(7)])
        expected = model(input_ids=BATCHES[0], use_cache=False).logits.flatten(0, 1)
    torch.testing.assert_close(result, expected)


def linear_names(block: nn.Module) -> list[str]:
    return [name for name, module in block.named_modules() if isinstance(module, nn.Linear)]


def test_a_forward_that_waits_at_every_layer_sees_what_one_that_starts_anew_sees(
    family: tuple[Path, str],
) -> None:
    folder, container = family
    with Reader() as reader, torch.no_grad():
        decoder = Decoder(open_checkpoint(folder), container, reader)
        captured = capture_inputs(decoder, BATCHES)
        block, calls = decoder.load_block(0), captured.calls[0]
        trace = trace_forward(block, linear_names(block), calls[0], captured.hidden_states[0])
        names = trace.called_layers
        assert set(names) == set(linear_names(block))
        breakpoints = Breakpoints(block, names)
        inputs_by_limit: dict[int, list[Tensor | None]] = {}
        # of two batches
        for max_resumable in (2, 1, 0):
            streams = ActivationStreams(
                HiddenStates(list(captured.hidden_states)), CPU, StreamLimits(max_resumable)
            )
            streams.enter_block(block, None, calls)
            inputs = [
                batch.inputs
                for number in range(len(names))
                for batch in streams.group_inputs(number, False)
            ]
            streams.leave_block()
            inputs_by_limit[max_resumable] = [*inputs, streams.states[0], streams.states[1]]
        breakpoints.remove()
    for both, one, none in zip(*inputs_by_limit.values(), strict=True):
        assert both is not None
        assert torch.equal(both, one)
        assert torch.equal(both, none)


def test_a_waiting_forward_goes_on_with_the_weights_that_a_layer_has_by_then(
    family: tuple[Path, str],
) -> None:
    folder, container = family
    with Reader() as reader, torch.no_grad():
        decoder = Decoder(open_checkpoint(folder), container, reader)
        captured = capture_inputs(decoder, BATCHES)
        outputs = []
        for early in (True, False):
            block, calls = decoder.load_block(0), captured.calls[0]
            trace = trace_forward(block, linear_names(block), calls[0], captured.hidden_states[0])
            names = trace.called_layers
            if early:
                for name in names:
                    block.get_parameter(f"{name}.weight").mul_(0.5)
            breakpoints = Breakpoints(block, names)
            streams = ActivationStreams(
                HiddenStates(list(captured.hidden_states)), CPU, StreamLimits(9)
            )
            streams.enter_block(block, None, calls)
            for number, name in enumerate(names):
                list(streams.group_inputs(number, False))
                if not early:
                    block.get_parameter(f"{name}.weight").mul_(0.5)
            streams.leave_block()
            breakpoints.remove()
            outputs.append(streams.states[0])
    assert torch.equal(*outputs)


def test_no_weight_is_in_memory_before_it_is_needed(family: tuple[Path, str]) -> None:
    folder, container = family
    with Reader() as reader, torch.no_grad():
        decoder = Decoder(open_checkpoint(folder), container, reader)
        assert all(parameter.is_meta for parameter in decoder.model.parameters())
        capture_inputs(decoder, BATCHES)
        assert all(parameter.is_meta for parameter in decoder.model.parameters())


def test_the_system_is_asked_for_all_bytes_of_the_block_after_one_that_is_loaded(
    family: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: set[int] = set()

    def note(descriptor: int, start: int, num_bytes: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        asked.update(range(start, start + num_bytes))

    monkeypatch.setattr(os, "posix_fadvise", note)
    # several pieces of a tensor
    monkeypatch.setattr(operating_system, "READ_AHEAD_BYTES", 100)
    folder, container = family
    checkpoint = open_checkpoint(folder)
    with Reader() as reader:
        Decoder(checkpoint, container, reader).load_block(0)
    of_block = [e for name, e in checkpoint.entries.items() if name.startswith(f"{container}.1.")]
    assert of_block
    for entry in of_block:
        assert asked.issuperset(range(entry.start, entry.start + entry.nbytes)), entry.name


def test_buffers_of_modules_without_weights_are_on_the_device(family: tuple[Path, str]) -> None:
    folder, container = family
    with Reader() as reader, torch.no_grad(), Pretended():
        decoder = Decoder(open_checkpoint(folder), container, reader, DecoderOptions(GPU))
        buffers = {name for name, _ in decoder.model.named_buffers() if container not in name}
        capture_inputs(decoder, BATCHES)
        devices = {decoder.model.get_buffer(name).device for name in buffers}
    assert devices <= {GPU}


def test_a_copy_of_a_block_is_another_one_and_nothing_is_read_for_it(
    family: tuple[Path, str],
) -> None:
    folder, container = family
    with Reader() as reader:
        decoder = Decoder(open_checkpoint(folder), container, reader)
        block = decoder.load_block(0)
        with patch.object(reader, "rows", side_effect=AssertionError):
            copied = decoder.copy_block(0, block)
    numbers, others = block.state_dict(), copied.state_dict()
    assert list(numbers) == list(others)
    for name, tensor in numbers.items():
        assert torch.equal(others[name], tensor), name
        assert others[name].data_ptr() != tensor.data_ptr(), name


def test_hidden_states_that_go_to_disk_are_not_held_while_others_are_recorded(
    family: tuple[Path, str], tmp_path: Path
) -> None:
    folder, container = family
    shape = (*BATCHES[0].shape, COMMON["hidden_size"])
    with Reader() as reader, torch.no_grad():
        decoder = Decoder(open_checkpoint(folder), container, reader)
        captured = capture_inputs(decoder, BATCHES, tmp_path)
        gc.collect()
        held = [
            o for o in gc.get_objects() if type(o) is Tensor and o.shape == shape and not o.is_meta
        ]
    assert len(captured.hidden_states) == len(BATCHES)
    assert not held


def test_forwards_that_do_not_wait_hold_nothing(family: tuple[Path, str], tmp_path: Path) -> None:
    folder, container = family
    with Reader() as reader, torch.no_grad():
        decoder = Decoder(open_checkpoint(folder), container, reader)
        captured = capture_inputs(decoder, BATCHES, tmp_path)
        block, source, calls = decoder.load_block(0), decoder.load_block(0), captured.calls[0]
        trace = trace_forward(block, linear_names(block), calls[0], captured.hidden_states[0])
        breakpoints = [
            Breakpoints(b, trace.called_layers, trace.residual_layers) for b in (block, source)
        ]
        source_states = HiddenStates((captured.hidden_states[i] for i in range(2)), tmp_path)
        reference = ReferenceStates(source_states, [0, 1])
        streams = ActivationStreams(captured.hidden_states, CPU, StreamLimits(0), reference)
        streams.enter_block(block, source, calls)
        last = len(trace.called_layers) - 1
        assert all(batch.residual is not None for batch in streams.group_inputs(last, True))
        gc.collect()
        size = captured.hidden_states[0].numel()
        held = [
            o for o in gc.get_objects() if type(o) is Tensor and o.numel() == size and not o.is_meta
        ]
        for block_breakpoints in breakpoints:
            block_breakpoints.remove()
    assert not held


def test_a_forward_that_is_given_up_lets_go_of_its_block_at_once(family: tuple[Path, str]) -> None:
    folder, container = family
    # a block may take gigabytes: they cannot wait until garbage is looked for
    gc.disable()
    try:
        with Reader() as reader, torch.no_grad():
            decoder = Decoder(open_checkpoint(folder), container, reader)
            captured = capture_inputs(decoder, BATCHES)
            block, calls = decoder.load_block(0), captured.calls[0]
            held = weakref.ref(block)
            breakpoints = Breakpoints(block, linear_names(block)[:1])
            streams = ActivationStreams(captured.hidden_states, CPU, StreamLimits(2))
            streams.enter_block(block, None, calls)
            # both wait there
            assert len(list(streams.group_inputs(0, False))) == 2
            breakpoints.remove()
            del block
            streams.enter_block(decoder.load_block(1), None, calls)
            assert held() is None
    finally:
        gc.enable()


AFTERWARDS = """
import sys, transformers
from pathlib import Path
from bitpress.modeling.decoder import Decoder
from bitpress import CheckpointError
from bitpress.checkpoint.reader import Reader, open_checkpoint
decoder = Decoder(open_checkpoint(Path(sys.argv[1])), "model.layers", Reader())
config = transformers.AutoConfig.for_model("gemma2", **eval(sys.argv[2]))
model = transformers.AutoModelForCausalLM.from_config(config)
print(model.model.layers[0].mlp.up_proj.weight.std().item())
sys.exit()
"""


def test_models_that_a_program_builds_afterwards_are_initialized_as_ever(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **COMMON)).save_pretrained(
        tmp_path / "m"
    )
    done = ForkedCommand(tmp_path / "m", COMMON, setup=AFTERWARDS)
    stdout, stderr = done.communicate(timeout=120)
    assert done.returncode == 0, stderr
    # the config's 0.02
    assert 0.01 < float(stdout) < 0.04


# norms between a layer and the stream, or a factor, make it none
RESIDUAL_LAYERS = {
    "gemma2": set(),
    "gemma3_text": set(),
    "olmo2": set(),
    "gpt_neox": {"attention.dense", "mlp.dense_4h_to_h"},
    "falcon": {"self_attention.dense", "mlp.dense_4h_to_h"},
    "opt": {"self_attn.out_proj", "fc2"},
}


def test_the_layers_whose_outputs_a_block_adds_to_its_input_are_found(
    family: tuple[Path, str],
) -> None:
    folder, container = family
    with Reader() as reader, torch.no_grad():
        decoder = Decoder(open_checkpoint(folder), container, reader)
        captured = capture_inputs(decoder, BATCHES)
        for index in range(2):
            block = decoder.load_block(index)
            trace = trace_forward(
                block, linear_names(block), captured.calls[index][0], captured.hidden_states[0]
            )
            kind = AutoConfig.from_pretrained(folder).model_type
            expected = RESIDUAL_LAYERS.get(kind, {"self_attn.o_proj", "mlp.down_proj"})
            assert set(trace.residual_layers) == expected


# Of an architecture the container of its blocks, and why transformers cannot run it block by block.
NOT_IN_ORDER = {
    "DoryForCausalLM": (
        "backbone.layers",
        "runs its 3 blocks in the order 0, 1, 1, 2: only a model that runs each once",
    ),
    "BailingHybridForCausalLM": (
        "model.layers",
        "is made of model.layers.0.attention.k_conv1d.weight and",
    ),
}


@pytest.mark.parametrize("architecture", NOT_IN_ORDER)
def test_a_model_that_cannot_be_run_block_by_block_is_refused_with_the_reason(
    tmp_path: Path, architecture: str
) -> None:
    container, words = NOT_IN_ORDER[architecture]
    checkpoint = open_checkpoint(build_small_model(architecture, tmp_path / "model"))
    with pytest.raises(CheckpointError, match=words), Reader() as reader:
        capture_inputs(Decoder(checkpoint, container, reader), BATCHES)
