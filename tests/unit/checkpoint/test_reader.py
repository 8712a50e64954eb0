"""safetensors files are read and written as the safetensors library does, and a header is believed
in nothing unchecked.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bitpress import CheckpointError
from bitpress.checkpoint.hub import resolve
from bitpress.checkpoint.reader import DTYPES, NAMES, Reader, open_checkpoint
from bitpress.checkpoint.safetensors import TensorSpec, lay_out, make_index, read_header
from bitpress.checkpoint.writer import OutputFolder
from bitpress.conformance.models import llama_tensors, write_model

KINDS = sorted(DTYPES.values(), key=str)
tensors = st.dictionaries(
    st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=20).filter(
        lambda name: name != "__metadata__"
    ),
    st.tuples(st.sampled_from(KINDS), st.lists(st.integers(0, 5), max_size=3)),
    max_size=8,
)


def numbers(dtype: torch.dtype, shape: list[int]) -> torch.Tensor:
    """Any bits at all, but for booleans, which have two."""
    raw = torch.randint(
        0, 2 if dtype == torch.bool else 256, (*shape, dtype.itemsize), dtype=torch.uint8
    )
    return raw.view(dtype).reshape(shape)


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(tensors, st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=2))
def test_a_file_written_here_is_what_the_library_reads(
    tmp_path_factory: pytest.TempPathFactory, kinds: Any, metadata: dict[str, str]
) -> None:
    folder, originals = (
        tmp_path_factory.mktemp("file"),
        {name: numbers(*kind) for name, kind in kinds.items()},
    )
    header = lay_out(
        folder / "f",
        {name: TensorSpec(NAMES[t.dtype], tuple(t.shape)) for name, t in originals.items()},
        metadata,
    )
    with OutputFolder(folder).shard("f", header) as writer:
        # in any order
        for entry in reversed(header.entries):
            writer.write(entry, originals[entry.name])
    assert (folder / "f").stat().st_size == header.nbytes
    written = read_header(folder / "f")
    assert written.is_same_layout(header)
    assert written.digests == {
        name: hashlib.sha256(raw(tensor).numpy().tobytes()).hexdigest()
        for name, tensor in originals.items()
    }
    with safe_open(folder / "f", "pt") as f:
        assert {k: v for k, v in f.metadata().items() if k != "sha256"} == metadata
    stored = load_file(folder / "f")
    assert stored.keys() == originals.keys()
    for name, tensor in originals.items():
        assert (stored[name].dtype, stored[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(raw(stored[name]), raw(tensor))


@settings(derandomize=True, deadline=None, max_examples=100)
@given(tensors)
def test_a_file_written_by_the_library_is_read_here(
    tmp_path_factory: pytest.TempPathFactory, kinds: Any
) -> None:
    file, originals = (
        tmp_path_factory.mktemp("file") / "f",
        {name: numbers(*kind) for name, kind in kinds.items()},
    )
    save_file(originals, file, metadata={"format": "pt"})
    header = read_header(file)
    assert header.metadata == {"format": "pt"}
    assert header.nbytes == file.stat().st_size
    assert {e.name for e in header.entries} == originals.keys()
    with Reader() as reader:
        for entry in header.entries:
            result = reader.whole(entry)
            assert (result.dtype, result.shape) == (
                originals[entry.name].dtype,
                originals[entry.name].shape,
            )
            assert torch.equal(raw(result), raw(originals[entry.name]))


def test_rows_are_read_alone(tmp_path: Path) -> None:
    weight = torch.randn(40, 7).bfloat16()
    save_file({"before": torch.ones(3), "weight": weight}, tmp_path / "f")
    entry = next(e for e in read_header(tmp_path / "f").entries if e.name == "weight")
    with Reader() as reader:
        for first, last in ((0, 40), (0, 1), (39, 40), (13, 27), (5, 5)):
            assert torch.equal(reader.rows(entry, first, last), weight[first:last])
        assert torch.equal(torch.cat(list(reader.chunks(entry))), raw(weight))


def test_a_tensor_is_written_piece_by_piece_and_its_digest_is_that_of_the_whole(
    tmp_path: Path,
) -> None:
    weight = torch.randn(40, 7)
    specs = {"weight": TensorSpec("F32", (40, 7)), "a": TensorSpec("F64", (3,))}
    header = lay_out(tmp_path / "f", specs, {})
    entries = {entry.name: entry for entry in header.entries}
    with OutputFolder(tmp_path).shard("f", header) as writer:
        writer.write_chunks(entries["weight"], weight.split(13))
        writer.write(entries["a"], torch.zeros(3).double())
    assert torch.equal(load_file(tmp_path / "f")["weight"], weight)
    digests = read_header(tmp_path / "f").digests
    assert digests is not None
    assert digests["weight"] == hashlib.sha256(weight.numpy().tobytes()).hexdigest()


# --- headers that lie
# ----------------------------------------------------------------------

# 16 numbers of 4 bytes, then 8 of 2
SOUND = {
    "a": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]},
    "b": {"dtype": "BF16", "shape": [8], "data_offsets": [64, 80]},
}


def write(file: Path, header: Mapping[str, Any] | str | bytes, data: int = 80) -> Path:
    text = header if isinstance(header, (str, bytes)) else json.dumps(header)
    text = text.encode() if isinstance(text, str) else text
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(data))
    return file


def lie(tensor: str, **claims: Any) -> dict[str, Any]:
    """The sound header with other claims about one tensor; None leaves a claim out."""
    item = {key: value for key, value in {**SOUND[tensor], **claims}.items() if value is not None}
    return {**SOUND, tensor: item}


def test_the_header_that_the_lies_start_from_is_sound(tmp_path: Path) -> None:
    assert [e.name for e in read_header(write(tmp_path / "f", SOUND)).entries] == ["a", "b"]


def test_metadata_that_are_null_are_none(tmp_path: Path) -> None:
    assert read_header(write(tmp_path / "f", {**SOUND, "__metadata__": None})).metadata == {}


LIES: Mapping[str, tuple[Any, list[str]]] = {
    "a larger shape": (lie("a", shape=[4, 5]), ["tensor a", "64 bytes", "its shape needs 80"]),
    "a smaller shape": (lie("a", shape=[4, 3]), ["tensor a", "64 bytes", "its shape needs 48"]),
    "a shape that overflows": (lie("a", shape=[2**40, 2**40]), ["tensor a", "larger than any"]),
    "a negative shape": (lie("a", shape=[-4, -4]), ["tensor a", "no valid"]),
    "a shape of fractions": (lie("a", shape=[4.0, 4.0]), ["tensor a", "no valid"]),
    "a shape of truths": (lie("a", shape=[True, 16]), ["tensor a", "no valid"]),
    "a shape that is a number": (lie("a", shape=16), ["tensor a", "no valid"]),
    "a narrower dtype": (lie("a", dtype="F16"), ["tensor a", "its shape needs 32"]),
    "an unknown dtype": (lie("b", dtype="BF17"), ["tensor b", "unknown dtype 'BF17'"]),
    "a dtype that is a list": (lie("b", dtype=["BF16"]), ["tensor b", "dtype"]),
    "no dtype": (lie("b", dtype=None), ["tensor b", "no valid"]),
    "an object for a shape": (
        lie("b", dtype="U8", shape={}, data_offsets=[64, 65]),
        ["tensor b", "no valid"],
    ),
    "an object for offsets": (lie("b", data_offsets={"64": 0, "80": 0}), ["tensor b", "no valid"]),
    "no offsets": (lie("b", data_offsets=None), ["tensor b", "no valid"]),
    "three offsets": (lie("b", data_offsets=[64, 80, 81]), ["tensor b", "no valid"]),
    "offsets back to front": (lie("b", data_offsets=[80, 64]), ["tensor b", "-16 bytes"]),
    "an overlap": (lie("b", data_offsets=[60, 76]), ["tensor b", "overlaps"]),
    "one on the other": (lie("b", data_offsets=[0, 16]), ["overlaps"]),
    "a gap": (lie("b", data_offsets=[68, 84]), ["tensor b", "leaves a gap"]),
    "a gap at the beginning": ({"b": SOUND["b"]}, ["tensor b", "leaves a gap"]),
    "bytes that nobody owns": ({"a": SOUND["a"]}, ["longer than its header says"]),
    "more than the file holds": (lie("b", shape=[80], data_offsets=[64, 224]), ["cut short"]),
    "a tensor that is a number": ({**SOUND, "b": 3}, ["tensor b", "no valid"]),
    "one name twice": ('{"a": 1, "a": 1}', ["a name occurs twice"]),
    "a list": ("[]", ["not an object"]),
    "no JSON": ("{", ["not valid"]),
    "no text": ("", ["not valid"]),
    "an abyss": ("[" * 100_000, ["not valid"]),
    "a mark of the byte order": ("\ufeff" + json.dumps(SOUND), ["not valid"]),
    "UTF-16": (json.dumps(SOUND).encode("utf-16"), ["not valid"]),
    "bytes that are no UTF-8": (json.dumps(SOUND).encode().replace(b"a", b"\xff"), ["not valid"]),
    "a surrogate in UTF-8": (
        json.dumps(SOUND).encode().replace(b"a", b"\xed\xa0\x80"),
        ["not valid"],
    ),
    "a number that is none": (lie("a", more=float("nan")), ["not valid"]),
    "a zero with a sign": (json.dumps(SOUND).replace("[0,", "[-0,"), ["not valid"]),
    "metadata that are a list": ({**SOUND, "__metadata__": ["pt"]}, ["__metadata__", "texts"]),
    "metadata that are numbers": ({**SOUND, "__metadata__": {"a": 1}}, ["__metadata__", "texts"]),
    "metadata of metadata": ({**SOUND, "__metadata__": {"a": {}}}, ["__metadata__", "texts"]),
    "half of a pair in the metadata": (
        {**SOUND, "__metadata__": {"a": "\ud800"}},
        ["__metadata__", "texts"],
    ),
    "half of a byte": (
        lie("b", dtype="F4", shape=[31], data_offsets=[64, 79]),
        ["tensor b", "does not fill its last byte"],
    ),
    "some of a byte": (
        lie("b", dtype="F6_E2M3", shape=[3], data_offsets=[64, 66]),
        ["tensor b", "does not fill its last byte"],
    ),
    "nothing, of overflowing size": (
        lie("b", shape=[2**62, 2**62, 0], data_offsets=[64, 64]),
        ["tensor b", "larger than any memory"],
    ),
}


@pytest.mark.parametrize("what", LIES)
def test_a_header_that_lies_is_refused_naming_the_file_and_the_tensor(
    tmp_path: Path, what: str
) -> None:
    header, words = LIES[what]
    with pytest.raises(CheckpointError) as refusal:
        read_header(write(tmp_path / "some.safetensors", header))
    assert "\n" not in str(refusal.value)
    for word in ["some.safetensors", *words]:
        assert word in str(refusal.value)


@pytest.mark.parametrize("length", [81 + len(json.dumps(SOUND)), 2**32, 2**63, 2**64 - 1])
def test_a_header_longer_than_the_file_is_refused_without_reading_it(
    tmp_path: Path, length: int
) -> None:
    file = write(tmp_path / "some.safetensors", SOUND)
    file.write_bytes(length.to_bytes(8, "little") + file.read_bytes()[8:])
    with pytest.raises(
        CheckpointError, match=r"some\.safetensors: cut short or not a safetensors file"
    ):
        read_header(file)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 20])
def test_the_stump_of_a_file_is_refused(tmp_path: Path, size: int) -> None:
    os.truncate(write(tmp_path / "some.safetensors", SOUND), size)
    with pytest.raises(CheckpointError, match=r"some\.safetensors: cut short"):
        read_header(tmp_path / "some.safetensors")


# --- folders
# ----------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 3])
def test_a_folder_s_inventory_is_every_tensor_and_every_other_file(
    tmp_path: Path, shards: int
) -> None:
    folder = write_model(tmp_path / "m", shards=shards)
    (folder / "chat_templates").mkdir()
    (folder / "chat_templates/tool.jinja").write_text("hello")
    (folder / "train.log").write_text("not part of the model")
    (folder / ".cache").mkdir()
    (folder / ".cache/x").write_text("not part of the model")
    checkpoint = open_checkpoint(folder)
    assert checkpoint.entries.keys() == llama_tensors().keys()
    assert len(checkpoint.headers) == shards
    assert checkpoint.side_files == (
        "config.json",
        "tokenizer_config.json",
        "chat_templates/tool.jinja",
    )
    assert checkpoint.left_files == ("train.log",)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", shards=2)
    name = "model.norm.weight"
    first, second = (folder / f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    held = load_file(first) | load_file(second)
    for file in (first, second):
        save_file({**load_file(file), name: held[name]}, file)
    with pytest.raises(
        CheckpointError, match=f"tensor {name} is in {first.name} and in {second.name}"
    ):
        open_checkpoint(folder)


def test_a_tensor_that_the_index_forgets_is_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", shards=2)
    table = json.loads((folder / "model.safetensors.index.json").read_text())
    del table["weight_map"]["lm_head.weight"]
    (folder / "model.safetensors.index.json").write_text(json.dumps(table))
    with pytest.raises(
        CheckpointError, match=r"lm_head\.weight .* is not in model\.safetensors\.index\.json"
    ):
        open_checkpoint(folder)


def test_a_file_that_shrinks_while_it_is_read_is_told(tmp_path: Path) -> None:
    save_file({"weight": torch.randn(8, 8)}, tmp_path / "f")
    entry = read_header(tmp_path / "f").entries[0]
    os.truncate(tmp_path / "f", entry.start + 100)
    with Reader() as reader, pytest.raises(CheckpointError, match="ended inside tensor weight"):
        reader.whole(entry)


def test_an_index_maps_every_tensor_to_its_file_and_counts_bytes(tmp_path: Path) -> None:
    a = lay_out(tmp_path / "a", {"x": TensorSpec("F32", (2, 3))}, {}).entries
    specs = {"y": TensorSpec("BF16", (5,)), "z": TensorSpec("U8", (1,))}
    b = lay_out(tmp_path / "b", specs, {}).entries
    assert make_index({"a": a, "b": b}) == {
        "metadata": {"total_size": 35},
        "weight_map": {"x": "a", "y": "b", "z": "b"},
    }


def test_a_name_of_the_hub_is_fetched_and_a_folder_is_not(tmp_path: Path) -> None:
    requests: list[tuple[str, str | None]] = []

    def fetch(name: str, revision: str | None) -> str:
        requests.append((name, revision))
        return str(tmp_path)

    assert resolve("some/model", fetch) == tmp_path
    assert resolve("some/model@refs/pr/1", fetch) == tmp_path
    assert resolve(tmp_path, fetch) == tmp_path
    assert resolve("./some/model", fetch) == Path("some/model")
    assert requests == [("some/model", None), ("some/model", "refs/pr/1")]


def test_a_name_that_the_hub_does_not_give_is_told_in_one_line() -> None:
    def fetch(name: str, revision: str | None) -> str:
        raise OSError("no route\nto the hub")

    with pytest.raises(
        CheckpointError, match=r"some/model is no folder, and the Hub did not give it: no route$"
    ):
        resolve("some/model", fetch)
    with pytest.raises(CheckpointError, match="some/model@v9 is no folder"):
        resolve("some/model@v9", fetch)


@pytest.mark.parametrize(
    ("dtype", "shape", "nbytes"), [("F32", (3, 5), 60), ("F4", (3, 4), 6), ("U8", (), 1)]
)
def test_a_spec_counts_the_bytes_of_its_numbers(
    dtype: str, shape: tuple[int, ...], nbytes: int
) -> None:
    assert TensorSpec(dtype, shape).nbytes == nbytes


def test_the_layout_of_mistral_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text('{"dim": 128}')
    (tmp_path / "consolidated.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"Mistral's own layout, .*convert_mistral_weights"):
        open_checkpoint(tmp_path)
