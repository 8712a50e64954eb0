"""The model card of an output: front matter that the Hub reads, the command, and the figures of
`bitpress.json`.
"""

from __future__ import annotations

import json
import shlex
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from fixtures.hostile_values import PATIENCE
from fixtures.learner_scheme import CONFIG, runnable_model
from huggingface_hub import ModelCard

import bitpress
from bitpress.conformance.commands import command, refusal
from bitpress.conformance.models import files_of, write_model

OWN = (
    "---\nlicense: other\nlicense_name: my-license\nlicense_link: LICENSE\nlanguage: [en, de]"
    "\ntags: [mine]\n---\n# Mine\n"
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = write_model(tmp_path / "model")
    (folder / "README.md").write_text(OWN)
    return folder


def front(folder: Path) -> dict[str, Any]:
    text = (folder / "README.md").read_text()
    assert text.startswith("---\n")
    return dict(yaml.safe_load(text.split("---\n")[1]))


def test_the_hub_finds_base_license_and_tags(with_toy: Path, model: Path, tmp_path: Path) -> None:
    bitpress.compress(model, tmp_path / "out", scheme="toy")
    data = ModelCard.load(tmp_path / "out/README.md", ignore_metadata_errors=False).data
    assert data.base_model == "model"
    assert data.base_model_relation == "quantized"
    assert (data.license, data.license_name, data.license_link, data.language) == (
        "other",
        "my-license",
        "LICENSE",
        ["en", "de"],
    )
    assert data.tags == ["bitpress", "compressed-tensors", "toy"]


def test_the_source_s_card_is_kept_linked_and_given_back(
    with_toy: Path, model: Path, tmp_path: Path
) -> None:
    out, dense = tmp_path / "out", tmp_path / "dense"
    bitpress.compress(model, out, scheme="toy")
    assert (out / "README.source.md").read_text() == OWN
    assert "(README.source.md)" in (out / "README.md").read_text()
    bitpress.decompress(out, dense)
    assert (dense / "README.md").read_text() == OWN
    assert not (dense / "README.source.md").exists()


def test_a_file_of_that_name_is_not_written_over(
    with_toy: Path, model: Path, tmp_path: Path
) -> None:
    (model / "README.source.md").write_text("of an earlier model")
    bitpress.compress(model, tmp_path / "out", scheme="toy")
    bitpress.decompress(tmp_path / "out", tmp_path / "dense")
    assert {n: d for n, d in files_of(tmp_path / "dense").items() if n.endswith(".md")} == {
        n: d for n, d in files_of(model).items() if n.endswith(".md")
    }


def test_without_a_card_there_is_nothing_to_link(with_toy: Path, tmp_path: Path) -> None:
    bitpress.compress(write_model(tmp_path / "m"), tmp_path / "out", scheme="toy")
    assert "source.md" not in (tmp_path / "out/README.md").read_text()
    assert "license" not in front(tmp_path / "out")


@pytest.mark.parametrize(
    "front_matter",
    [
        "---\nlicense: [\n---\n",
        "---\n- a\n---\n",
        "---\nlicense: {a: b}\n---\n",
        "---\nlicense: mit\n",
        "no front matter",
        "\x00\xff",
        "---\n---\n",
        "---\nlicense: !!python/object/apply:os.system ['touch hacked']\n---\n",
        "---\nlicense: !!timestamp x\n---\n",
        "---\nlicense: !!bool x\n---\n",
        f"---\nlicense: 0x{'f' * 9000}\n---\n",
        '---\nlicense: "a\\x1b[31m"\n---\n',
        '---\nlicense: ["a\\n---\\n<script>"]\n---\n',
        f"---\nlicense: {'x' * 999}\n---\n",
        "---\nlicense: &a [*a]\n---\n",
        f"---\nlicense: {'[' * 9000}\n---\n",
        f"---\nlicense: {{{'a: b, ' * 100_000}}}\n---\n",
    ],
)
def test_front_matter_that_says_nothing_usable_is_left_where_it_is(
    with_toy: Path, model: Path, tmp_path: Path, front_matter: str
) -> None:
    (model / "README.md").write_text(front_matter, encoding="utf-8")
    began = time.process_time()
    bitpress.compress(model, tmp_path / "out", scheme="toy")
    assert time.process_time() - began < PATIENCE
    assert "license" not in front(tmp_path / "out")
    assert (tmp_path / "out/README.source.md").read_text(encoding="utf-8") == front_matter


def test_a_card_that_is_not_unicode_is_kept_as_it_is(
    with_toy: Path, model: Path, tmp_path: Path
) -> None:
    (model / "README.md").write_bytes(card := bytes(range(256)))
    bitpress.compress(model, tmp_path / "out", scheme="toy")
    assert (tmp_path / "out/README.source.md").read_bytes() == card


@pytest.mark.parametrize("name", ["README.md", "bitpress.json"])
def test_a_folder_where_the_output_has_a_file_is_told_before_work_starts(
    toy: Path, tmp_path: Path, name: str
) -> None:
    model = write_model(tmp_path / "model", shards=2)
    (model / name).mkdir()
    (model / name / "notes.txt").write_text("mine")
    words = ["--scheme", "toy", "--copy", "*/notes.txt"]
    line = refusal("compress", model, tmp_path / "out", *words, path=toy)
    assert f"{name} would be a file, and a folder too, with {name}/notes.txt" in line
    assert not (tmp_path / "out").exists()


def test_the_command_makes_the_same_files_again(toy: Path, tmp_path: Path) -> None:
    model = runnable_model(tmp_path / "model", config=CONFIG | {"num_hidden_layers": 1})
    words = [
        "--scheme",
        "toy",
        "--set",
        "levels=15",
        "--ignore",
        "*.mlp.*",
        "--check",
        model.parent / "text.txt",
    ]
    assert (
        command("compress", model, tmp_path / "out", *words, "--threads", "1", path=toy).returncode
        == 0
    )
    card = (tmp_path / "out/README.md").read_text()
    line = next(line for line in card.splitlines() if line.startswith("bitpress compress"))
    assert (
        line
        == "bitpress compress model OUT --scheme toy --set levels=15 --ignore '*.mlp.*' --check "
        "text.txt"
    )
    places = {"model": model, "OUT": tmp_path / "again", "text.txt": model.parent / "text.txt"}
    again = [places.get(word, word) for word in shlex.split(line)[1:]]
    assert command(*again, "--threads", "1", path=toy).returncode == 0
    assert files_of(tmp_path / "again") == files_of(tmp_path / "out")


def test_the_figures_are_those_of_the_manifest(with_toy: Path, tmp_path: Path) -> None:
    model = runnable_model(tmp_path / "model", config=CONFIG | {"num_hidden_layers": 1})
    manifest = bitpress.compress(
        model, tmp_path / "out", scheme="toy", check=model.parent / "text.txt", threads=1
    )
    card = (tmp_path / "out/README.md").read_text()
    assert manifest.check is not None
    worst = max(layer.error or 0 for layer in manifest.layers.values())
    for figure in (
        f"{manifest.bits:.2f} bits per weight",
        f"{manifest.check.kl:.6f} nats per token",
        f"at most {worst:.5f}",
        "bitpress-scheme-toy 1.0",
    ):
        assert figure in card, figure


def test_its_bytes_are_proved_like_those_of_every_file(
    toy: Path, model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command("compress", model, out, "--scheme", "toy", path=toy)
    assert command("verify", out, path=toy).returncode == 0
    assert "README.md" in json.loads((out / "bitpress.json").read_text())["files"]
    (out / "README.md").write_text((out / "README.md").read_text().replace("smaller", "Smaller", 1))
    done = command("verify", out, path=toy)
    assert done.returncode == 1
    assert "README.md" in done.stderr
    assert "already holds a model" in refusal("compress", model, out, "--scheme", "toy", path=toy)


@pytest.mark.parametrize(
    "text",
    ["---", '"', "a: b # c", "<script>x</script>", "[x](javascript:y)", "{{ x }}", "!!python/x y"],
)
@pytest.mark.parametrize("key", ["license", "license_name", "license_link", "language"])
def test_a_licence_that_would_be_markup_is_a_value(
    with_toy: Path, tmp_path: Path, key: str, text: str
) -> None:
    model = write_model(tmp_path / "model")
    metadata = yaml.safe_dump({key: text, "more": "x"})
    (model / "README.md").write_text(f"---\n{metadata}---\ncard\n")
    bitpress.compress(model, tmp_path / "out", scheme="toy", verify=False)
    assert front(tmp_path / "out")[key] == text
    body = (tmp_path / "out/README.md").read_text().split("\n---\n", 1)[1]
    assert text not in body.replace("|---|---|", "")


@pytest.mark.parametrize(
    ("name", "escaped"),
    [
        ("a&lt;b", r"a\&lt;b"),
        ("~~a~~", r"\~\~a\~\~"),
        ("_a_b_", r"\_a_b\_"),
        ("www.a.b", r"www\.a.b"),
        ("<!--", r"\<!--"),
    ],
)
def test_signs_of_a_name_are_written_out(
    with_toy: Path, tmp_path: Path, name: str, escaped: str
) -> None:
    bitpress.compress(write_model(tmp_path / name), tmp_path / "out", scheme="toy", verify=False)
    assert f"\n# {escaped}, toy\n" in (tmp_path / "out/README.md").read_text()


def test_a_name_does_not_end_the_block_of_the_command(with_toy: Path, tmp_path: Path) -> None:
    model = write_model(tmp_path / "x\n````\n<b>")
    bitpress.compress(model, tmp_path / "out", scheme="toy", verify=False)
    lines = (tmp_path / "out/README.md").read_text().splitlines()
    assert lines.count("`````") == 2
    assert "````" not in lines
    assert r"bitpress compress 'x\n````\n<b>' OUT --scheme toy" in lines


def test_a_name_that_would_be_markup_is_a_name(with_toy: Path, tmp_path: Path) -> None:
    bitpress.compress(write_model(tmp_path / "<b>[x](y)`|"), tmp_path / "out", scheme="toy")
    card = (tmp_path / "out/README.md").read_text()
    assert "# \\<b\\>\\[x\\](y)\\`\\|, toy" in card
    assert "base_model" not in front(tmp_path / "out")
