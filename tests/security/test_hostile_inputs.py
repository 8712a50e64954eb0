"""A stranger's model, index, config or recipe: one clear line at most, soon, in little memory, and
nothing outside OUT.
"""

from __future__ import annotations

import json
import math
import os
import random
import time
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from fixtures.hostile_values import (
    JSON,
    NAMES,
    NUMBERS,
    PATIENCE,
    amounts,
    only_clear_errors,
    tried,
)
from fixtures.processes import memory_taken
from hypothesis import given, strategies as st

import bitpress
from bitpress import BitpressError
from bitpress.checkpoint.reader import open_checkpoint
from bitpress.checkpoint.safetensors import BITS, read_header
from bitpress.conformance.commands import command, refusal
from bitpress.conformance.models import LLAMA, llama_tensors, tensors_of, write_model
from bitpress.planning.recipe import from_file, from_json
from bitpress.schemes.registry import discover

WEIGHTS, INDEX, LAYER = (
    "model.safetensors",
    "model.safetensors.index.json",
    "model.layers.1.mlp.up_proj",
)


# --- headers
# ----------------------------------------------------------------------

ITEMS = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.one_of(st.sampled_from(["F32", "F4", "U8", "BF16"]), JSON),
        "shape": st.one_of(st.lists(NUMBERS, max_size=3), JSON),
        "data_offsets": st.one_of(st.tuples(NUMBERS, NUMBERS).map(list), JSON),
    },
)
SOUND = json.dumps(
    {
        "a": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]},
        "b": {"dtype": "BF16", "shape": [8], "data_offsets": [64, 80]},
    }
).encode()


def spoiled(data: bytes, seed: int) -> bytes:
    """Some bytes replaced, taken out or doubled."""
    chance, result = random.Random(seed), bytearray(data)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(result))
        result[at : at + chance.randint(0, 3)] = chance.choice(
            [b"", b"[", b"9" * 30, b'"', b"\xff", b"\\ud800", b"-", b"{", b"e9"]
        )
    return bytes(result)


@amounts(300, 30_000)
def test_any_header_is_read_or_refused(tmp_path: Path, count: int) -> None:
    @tried(count)
    @given(
        st.dictionaries(NAMES, ITEMS | JSON, max_size=3).map(json.dumps).map(str.encode),
        st.integers(0, 100),
        st.integers(),
    )
    def law(table: bytes, data: int, seed: int) -> None:
        for text in (table, spoiled(SOUND, seed)):
            (tmp_path / "f").write_bytes(
                len(text).to_bytes(8, "little") + text + bytes(data if text is table else 80)
            )
            with only_clear_errors():
                header = read_header(tmp_path / "f")
                # tensors lie side by side and fill the file
                assert header.nbytes == (tmp_path / "f").stat().st_size
        whole = spoiled(len(SOUND).to_bytes(8, "little") + SOUND + bytes(80), seed)
        (tmp_path / "f").write_bytes(whole)
        with only_clear_errors():
            read_header(tmp_path / "f")

    law()


# What is put into a header, or in place of some of its bytes.
PIECES_OF_HEADERS = [
    *[b'"F4"', b'"F6_E2M3"', b'"F8_E4M3FNUZ"', b'"F8_E5M2FNUZ"', b'"U8"', b'"BOOL"', b'"C64"'],
    *[b"0", b"1", b"8", b"-", b"-0", b".0", b"e1", b"64", b"9" * 20, b"18446744073709551615"],
    *[b"[", b"]", b"{", b"}", b",", b":", b'"', b"null", b"true", b"NaN", b" ", b"\t", b"\n"],
    *[b"\xef\xbb\xbf", b"\xff", b"\xed\xa0\x80", b"\xc3\xa9", b"\x00", b"\\ud800", b"\\u00e9"],
    *[b'"__metadata__":{"a":"b"},', b'"__metadata__":{"a":1},', b'"__metadata__":null,'],
]


def varied_header(chance: random.Random) -> bytes:
    """A file of a few tensors, whose header is right or nearly so."""
    table, end = {}, 0
    for name in "abc"[: chance.randint(0, 3)]:
        dtype = chance.choice(["F32", "F4", "F6_E3M2", "F8_E4M3FNUZ", "U8", "BF16", "C64", "F8"])
        shape = [chance.choice([0, 1, 2, 3, 4, 8]) for _ in range(chance.randint(0, 3))]
        numel = math.prod(shape)
        begin, end = (
            end,
            end + (numel * BITS.get(dtype, 8) + chance.choice([0, 0, 0, 0, 0, 7])) // 8,
        )
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = bytearray(json.dumps(table).encode())
    for _ in range(chance.choice([0, 0, 1, 1, 3])):
        at = chance.randint(0, len(text))
        text[at : at + chance.choice([0, 0, 1, 2])] = chance.choice(PIECES_OF_HEADERS)
    length = len(text) + chance.choice([0, 0, 0, 0, 1, -1])
    return max(length, 0).to_bytes(8, "little") + text + bytes(end + chance.choice([0, 0, 0, 1]))


@amounts(3000, 1_000_000)
def test_a_header_that_is_read_says_what_the_safetensors_library_reads(
    tmp_path: Path, count: int
) -> None:
    chance, num_read, file = random.Random(1), 0, tmp_path / "f"
    for _ in range(count):
        data = varied_header(chance)
        file.write_bytes(data)
        try:
            header = read_header(file)
        except BitpressError:
            continue
        num_read += 1
        # it raises SafetensorError for what it does not read
        expected = {
            name: (item["dtype"], tuple(item["shape"]), bytes(item["data"]))
            for name, item in safetensors.deserialize(data)
        }
        found = {
            entry.name: (entry.dtype, entry.shape, data[entry.start : entry.start + entry.nbytes])
            for entry in header.entries
        }
        assert found == expected, data
    assert num_read > count / 10


def header_file(file: Path, text: bytes) -> Path:
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    return file


BOMBS: Mapping[str, bytes] = {
    "a product of very many large numbers": (
        b'{"a":{"dtype":"U8","shape":['
        + b",".join([b"9" * 4000] * 5000)
        + b'],"data_offsets":[0,8]}}'
    ),
    "a name as long as a book": b'{"'
    + b".1" * 5_000_000
    + b'.weight":{"dtype":"U8","shape":[8],"data_offsets":[0,8]}}',
    "many dimensions": b'{"a":{"dtype":"U8","shape":['
    + b",".join([b"1"] * 1_000_000)
    + b'],"data_offsets":[0,1]}}',
    "nothing but brackets": b'{"a":[' + b"[]," * 8_000_000 + b"[]]}",
    "a dtype as long as a book": b'{"a":{"dtype":"'
    + b"x" * 10_000_000
    + b'","shape":[8],"data_offsets":[0,8]}}',
}


@pytest.mark.parametrize("what", BOMBS)
def test_a_header_made_to_hang_or_to_fill_memory_is_refused_at_once(
    tmp_path: Path, what: str
) -> None:
    file, began = header_file(tmp_path / "f", BOMBS[what]), time.process_time()
    # counts what is asked for, not what memory that was freed before happens to serve
    tracemalloc.start()
    try:
        with pytest.raises(BitpressError) as refused:
            read_header(file)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert time.process_time() - began < PATIENCE
    assert len(str(refused.value)) < 3000
    assert peak < 7 * len(BOMBS[what])


TIED = LLAMA | {"tie_word_embeddings": True}


@pytest.mark.parametrize("rows", [1, 8])
def test_a_file_that_is_nearly_all_hole_and_claims_a_gigantic_layer_fills_no_memory(
    tmp_path: Path, toy: Path, rows: int
) -> None:
    model, width = write_model(tmp_path / "model", config=TIED), 2**33
    item = {"dtype": "BF16", "shape": [rows, width], "data_offsets": [0, 2 * rows * width]}
    text = json.dumps({f"{LAYER}.weight": item}).encode()
    with (model / WEIGHTS).open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        f.truncate(8 + len(text) + 2 * rows * width)
    with memory_taken() as peak:
        assert f"{LAYER}: it is {width} columns wide" in refusal(
            "plan", model, "--scheme", "toy", path=toy
        )
    assert peak[0] < 100_000_000


def test_names_that_would_be_paths_or_colors_or_markup_are_names_and_nothing_else(
    tmp_path: Path, toy: Path
) -> None:
    names = [
        "../../evil",
        "/etc/evil",
        "model.layers.0.\x1b[31mred.weight",
        "model.layers.0.[red]x.weight",
        "a\nb",
    ]
    extra = {name: torch.ones(8, 8) for name in names}
    model, out = (
        write_model(tmp_path / "here/model", llama_tensors() | extra),
        tmp_path / "here/out",
    )
    assert command("compress", model, out, "--scheme", "toy", path=toy).returncode == 0
    assert {*names[:2], names[4]} < tensors_of(out).keys()
    assert sorted(os.listdir(tmp_path)) == ["here", "plugins"]
    assert sorted(os.listdir(tmp_path / "here")) == ["model", "out"]
    for words in (["plan", model, "--scheme", "toy"], ["inspect", out]):
        shown = command(*words, path=toy).stdout
        assert "\x1b" not in shown
        assert "[red]x" in shown
    tensors = llama_tensors() | {names[2]: torch.full((8, 8), torch.nan)}
    line = refusal(
        "compress",
        write_model(tmp_path / "bad", tensors),
        tmp_path / "o",
        "--scheme",
        "toy",
        path=toy,
    )
    assert "\x1b" not in line
    assert r"\x1b[31mred" in line


@pytest.mark.parametrize("dtype", ["F8_E4M3FNUZ", "F8_E5M2FNUZ", "F6_E2M3"])
def test_tensors_of_dtypes_that_nothing_computes_with_are_copied(
    tmp_path: Path, toy: Path, dtype: str
) -> None:
    model, out = write_model(tmp_path / "model"), tmp_path / "out"
    whole = (model / WEIGHTS).read_bytes()
    size = int.from_bytes(whole[:8], "little")
    table, numbers = json.loads(whole[8 : 8 + size]), whole[8 + size :]
    for name in ("extra", "model.layers.1.extra"):
        item = {"dtype": dtype, "shape": [8, 8], "data_offsets": [len(numbers)]}
        extra = os.urandom(8 * 8 * BITS[dtype] // 8)
        numbers += extra
        table[name] = item | {"data_offsets": [*item["data_offsets"], len(numbers)]}
    text = json.dumps(table).encode()
    (model / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + numbers)
    assert command("compress", model, out, "--scheme", "toy", path=toy).returncode == 0
    written = (out / WEIGHTS).read_bytes()
    entry = open_checkpoint(out).entries[name]
    assert entry.dtype == dtype
    assert written[entry.start : entry.start + entry.nbytes] == extra
    assert command("verify", out, "--against", model, path=toy).returncode == 0
    assert command("decompress", out, tmp_path / "dense", path=toy).returncode == 0


def test_tensors_without_numbers_are_copied(tmp_path: Path, toy: Path) -> None:
    empty = {
        "nothing": torch.zeros(0),
        f"{LAYER.replace('up', 'no')}.weight": torch.zeros(0, 8),
        "model.layers.0.x.weight": torch.zeros(8, 0),
    }
    model, out = write_model(tmp_path / "model", llama_tensors() | empty), tmp_path / "out"
    assert command("compress", model, out, "--scheme", "toy", path=toy).returncode == 0
    assert {name: tuple(tensors_of(out)[name].shape) for name in empty} == {
        n: tuple(t.shape) for n, t in empty.items()
    }


# --- index, config, recipe
# ----------------------------------------------------------------------


@amounts(60, 6000)
def test_any_index_is_followed_within_the_folder_or_refused(tmp_path: Path, count: int) -> None:
    model = write_model(tmp_path / "model", shards=2)
    table = json.loads((model / INDEX).read_text())
    location = st.one_of(
        JSON,
        st.sampled_from(
            [
                "../x.safetensors",
                "/etc/passwd",
                "..",
                "x" * 300 + ".safetensors",
                "\0.safetensors",
                "\ud800.safetensors",
                ".safetensors",
                "a/b.safetensors",
                "model-00001-of-00002.safetensors",
            ]
        ),
    )

    @tried(count)
    @given(
        st.dictionaries(st.sampled_from(sorted(table["weight_map"])) | NAMES, location, max_size=3),
        JSON,
        st.integers(0, 9),
    )
    def law(places: dict[str, Any], other: Any, kind: int) -> None:
        value = (
            other
            if kind == 0
            else table | {"weight_map": other if kind == 1 else table["weight_map"] | places}
        )
        (model / INDEX).write_text(json.dumps(value))
        with only_clear_errors():
            checkpoint = open_checkpoint(model)
            assert {entry.file.parent for entry in checkpoint.entries.values()} == {model}

    law()


@amounts(60, 6000)
def test_any_config_is_understood_or_refused(tmp_path: Path, with_toy: Path, count: int) -> None:
    model = write_model(tmp_path / "model")
    keys = [*LLAMA, "text_config", "quantization_config", "llm_config", "n_layer", "num_layers"]

    @tried(count)
    @given(
        st.dictionaries(st.sampled_from(keys), JSON, min_size=1, max_size=4),
        JSON,
        st.integers(0, 9),
    )
    def law(changes: dict[str, Any], other: Any, kind: int) -> None:
        (model / "config.json").write_text(json.dumps(other if kind == 0 else {**LLAMA, **changes}))
        with only_clear_errors():
            plan = bitpress.plan(model, scheme="toy")
            json.dumps([plan.config, plan.index])
            assert plan.head_dim is None or plan.head_dim > 0

    law()


@amounts(15, 1500)
def test_any_config_makes_a_model_of_transformers_or_is_refused(tmp_path: Path, count: int) -> None:
    from bitpress.modeling.build import build_model

    model = write_model(tmp_path / "model")
    # whose imports take long
    build_model(open_checkpoint(model), False)

    @tried(count)
    @given(
        st.dictionaries(
            st.sampled_from([*LLAMA, "rope_scaling", "layer_types"]), JSON, min_size=1, max_size=2
        )
    )
    def law(changes: dict[str, Any]) -> None:
        (model / "config.json").write_text(json.dumps({**LLAMA, **changes}))
        with only_clear_errors():
            build_model(open_checkpoint(model), False)

    law()


def test_a_config_that_asks_for_a_milliard_blocks_is_refused_at_once(tmp_path: Path) -> None:
    from bitpress.modeling.build import build_model

    model = write_model(tmp_path / "model", config={**LLAMA})
    (model / "config.json").write_text(json.dumps({**LLAMA, "num_hidden_layers": 10**9}))
    with pytest.raises(
        BitpressError, match="says 1000000000 blocks, and the files hold fewer tensors"
    ):
        build_model(open_checkpoint(model), False)


@pytest.mark.parametrize(
    "value",
    ['"\\ud800"', "[" * 200 + "]" * 200],
    ids=["half of a surrogate pair", "nested more deeply than it could be written"],
)
def test_a_config_that_could_not_be_written_again_is_refused_before_work_starts(
    tmp_path: Path, toy: Path, value: str
) -> None:
    model = write_model(tmp_path / "model")
    (model / "config.json").write_text(json.dumps(LLAMA)[:-1] + f', "more": {value}}}')
    assert "config.json: not valid JSON (a text in it" in refusal(
        "compress", model, tmp_path / "out", "--scheme", "toy", path=toy
    )
    assert not (tmp_path / "out").exists()


PIECES = [
    "[[layers]]\n",
    "match = ",
    '"*"\n',
    "steps = ",
    '["toy"]\n',
    "[",
    "]",
    "{",
    "}",
    "use = ",
    "ignore = ",
    "\n",
    "=",
    ".",
    "a",
    '"',
    "'''",
    "\\u0000",
    "1e999",
    "-",
    "2026-01-01",
    "nan",
    "\x00",
    "levels",
    "#",
    '{ use = "toy", levels = 3 }',
]


@amounts(300, 30_000)
def test_any_recipe_is_understood_or_refused(tmp_path: Path, with_toy: Path, count: int) -> None:
    registry, modules = discover(), [LAYER, LAYER.replace("1", "0")]
    layer = st.fixed_dictionaries(
        {},
        optional={
            "match": NAMES | JSON,
            "steps": st.lists(
                st.just("toy")
                | st.fixed_dictionaries(
                    {"use": st.just("toy") | NAMES}, optional={"levels": JSON, "multiple": JSON}
                )
                | JSON,
                max_size=2,
            )
            | JSON,
        },
    )
    table = st.fixed_dictionaries(
        {},
        optional={"layers": st.lists(layer, max_size=2) | JSON, "ignore": st.lists(NAMES) | JSON},
    )

    @tried(count)
    @given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join), table)
    def law(text: str, values: dict[str, Any]) -> None:
        (tmp_path / "recipe.toml").write_text(text)
        with only_clear_errors():
            from_file(tmp_path / "recipe.toml", registry).assign(modules)
        with only_clear_errors():
            from_json(values, registry, "recipe").assign(modules)

    law()


def rule(pattern: str) -> str:
    return f'[[layers]]\nmatch = "{pattern}"\nsteps = ["toy"]\n'


PATTERNS: Mapping[str, str] = {
    "stars that a naive matcher would try in every way": rule("*a" * 400 + "b"),
    "question marks and stars": rule("?*" * 450 + "q"),
    "sets": rule("[!a]*" * 190 + "[z-a]"),
    "a pattern as long as a book": rule("*x" * 40_000),
    "an abyss": "a = " + "[" * 90_000,
    "a key of very many parts": ".".join(["a"] * 40_000) + " = 1",
    "a file as large as a model": "#" * 10_000_000,
}


@pytest.mark.parametrize("what", PATTERNS)
def test_a_recipe_made_to_take_for_ever_is_refused_soon(
    tmp_path: Path, toy: Path, what: str
) -> None:
    names = {
        f"model.layers.0.{'aaaaaaaaaaaaaaaaaaaa' * 40}{i}.weight": torch.ones(1, 1)
        for i in range(50)
    }
    (tmp_path / "recipe.toml").write_text(PATTERNS[what])
    model, began = write_model(tmp_path / "model", llama_tensors() | names), time.process_time()
    assert len(refusal("plan", model, "--recipe", tmp_path / "recipe.toml", path=toy)) < 3000
    assert time.process_time() - began < PATIENCE


# --- folders
# ----------------------------------------------------------------------


def test_a_link_to_what_is_no_part_of_the_model_is_not_copied(tmp_path: Path, toy: Path) -> None:
    model = write_model(tmp_path / "model")
    (tmp_path / "private.key").write_text("secret")
    (model / "chat_template.jinja").symlink_to("../private.key")
    line = refusal("compress", model, tmp_path / "out", "--scheme", "toy", path=toy)
    assert "chat_template.jinja: a link that leads out of the model's folder" in line
    assert not (tmp_path / "out").exists()


def test_the_links_of_the_hub_s_cache_are_followed(tmp_path: Path, toy: Path) -> None:
    model = write_model(tmp_path / "models--some--model/snapshots/abc")
    (tmp_path / "models--some--model/blobs").mkdir()
    for file in list(model.iterdir()):
        file.rename(tmp_path / "models--some--model/blobs" / file.name)
        file.symlink_to(f"../../blobs/{file.name}")
    assert command("compress", model, tmp_path / "out", "--scheme", "toy", path=toy).returncode == 0
    assert (tmp_path / "out/tokenizer_config.json").read_text() == '{"made": "up"}'


@pytest.mark.parametrize("name", ["config.json", WEIGHTS, INDEX, "chat_template.jinja"])
def test_a_pipe_is_not_waited_for(tmp_path: Path, toy: Path, name: str) -> None:
    model = write_model(tmp_path / "model")
    (model / name).unlink(missing_ok=True)
    os.mkfifo(model / name)
    # then the one file of weights is read, and a pipe beside it is no weight
    if name == INDEX:
        assert command("plan", model, "--scheme", "toy", path=toy).returncode == 0
        return
    assert f"{name}: not a regular file" in refusal("plan", model, "--scheme", "toy", path=toy)


def test_a_dangling_link_is_told_before_work_starts(tmp_path: Path, toy: Path) -> None:
    model = write_model(tmp_path / "model")
    (model / "vocab.txt").symlink_to("nowhere")
    assert "vocab.txt: not a regular file" in refusal(
        "compress", model, tmp_path / "out", "--scheme", "toy", path=toy
    )


# --- code that is not ours
# ----------------------------------------------------------------------


class Deed:
    """What a pickle runs when it is loaded."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.file),)


def test_no_pickle_is_loaded_and_no_code_of_the_model_runs_unless_it_is_trusted(
    tmp_path: Path,
) -> None:
    from fixtures.learner_scheme import install_learner, runnable_model

    learner = install_learner(tmp_path / "plugins")
    model = runnable_model(tmp_path / "model")
    for name in ("pytorch_model.bin", "training_args.bin", "vocab.pkl", "tokenizer.pt"):
        torch.save(Deed(tmp_path / "pickle-was-loaded"), model / name)
    (model / "README.md").write_text(
        "---\nx: !!python/object/apply:os.system ['touch hacked']\n---\n{{ 7*7 }} [red]card"
    )
    (model / "modeling_own.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'code-ran')!r})\n")
    words = [
        "--scheme",
        "learner",
        "--samples",
        2,
        "--sequence-length",
        32,
        "--calibration",
        tmp_path / "text.txt",
    ]
    completed = command("compress", model, tmp_path / "out", *words, path=learner)
    assert completed.returncode == 0, completed.stderr
    assert "card" not in completed.stdout + completed.stderr
    config = json.loads((model / "config.json").read_text())
    config |= {
        "model_type": "own",
        "auto_map": {"AutoConfig": "modeling_own.C", "AutoModelForCausalLM": "modeling_own.M"},
    }
    (model / "config.json").write_text(json.dumps(config))
    assert "--trust-remote-code" in refusal("compress", model, tmp_path / "o", *words, path=learner)
    assert not {"pickle-was-loaded", "code-ran", "hacked"} & {*os.listdir(tmp_path), *os.listdir()}
    command("compress", model, tmp_path / "o", *words, "--trust-remote-code", path=learner)
    # so it would have run
    assert (tmp_path / "code-ran").exists()
