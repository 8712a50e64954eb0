"""The model card of an output: front matter that the Hub reads, the command, and the figures of
`bitpress.json`.
"""

from __future__ import annotations

import json
import shlex
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import yaml
from fixtures.hostile_values import PATIENCE
from fixtures.learner_scheme import CONFIG, runnable_model
from huggingface_hub import ModelCard

import bitpress
from bitpress.checkpoint import hub
from bitpress.compression.job import prepare_job
from bitpress.conformance.commands import command, plugins, refusal
from bitpress.conformance.models import LLAMA, files_of, llama_tensors, write_model
from bitpress.output.model_card import find_task
from bitpress.planning.recipe_source import RecipeSource
from bitpress.planning.run_options import RunOptions

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
    bitpress.compress(model, tmp_path / "out", scheme="toy", base_model="org/model")
    data = ModelCard.load(tmp_path / "out/README.md", ignore_metadata_errors=False).data
    assert data.base_model == "org/model"
    assert data.pipeline_tag == "text-generation"
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


def test_a_folder_s_name_is_no_name_on_the_hub(toy: Path, model: Path, tmp_path: Path) -> None:
    words = ["--scheme", "toy", "--no-verify"]
    command("compress", model, tmp_path / "out", *words, path=toy)
    assert not {"base_model", "base_model_relation"} & front(tmp_path / "out").keys()
    named = [*words, "--base-model", "org/model"]
    assert command("compress", model, tmp_path / "named", *named, path=toy).returncode == 0
    assert front(tmp_path / "named")["base_model"] == "org/model"
    assert "--base-model org/model\n" in (tmp_path / "named/README.md").read_text()
    line = refusal("compress", model, tmp_path / "x", *words, "--base-model", "model", path=toy)
    assert "--base-model 'model': a name on the Hub" in line


def test_a_model_of_the_hub_is_its_own_base(with_toy: Path, model: Path) -> None:
    with patch.object(hub, "_download", lambda name, revision: str(model)):
        for name in ("org/model", "org/model@main"):
            job = prepare_job(name, RecipeSource("toy"), options=RunOptions())
            assert job.base_model == "org/model"


def test_only_what_the_scheme_says_of_devices_is_claimed(
    toy: Path, model: Path, tmp_path: Path
) -> None:
    with plugins(toy):
        bitpress.compress(model, tmp_path / "out", scheme="toy")
    card = (tmp_path / "out/README.md").read_text()
    assert "Serve it with vLLM (on NVIDIA 6.0+, AMD, Intel, Google, CPU):" in card
    assert "```\nvllm serve OUT\n```" in card

    module = toy / "bitpress_scheme_toy.py"
    module.write_text(module.read_text().replace('"supported", "runs', '"unsupported", "it runs'))
    with plugins(toy):
        bitpress.compress(model, tmp_path / "refused", scheme="toy")
    card = (tmp_path / "refused/README.md").read_text()
    assert "Not known to be served by vLLM: it runs anywhere." in card
    assert "vllm serve" not in card


def test_an_architecture_that_loaders_do_not_list_is_not_claimed(
    with_toy: Path, tmp_path: Path
) -> None:
    config = LLAMA | {"architectures": ["MadeUpForCausalLM"], "model_type": "made_up"}
    model = write_model(tmp_path / "model", llama_tensors(config=config), config)
    bitpress.compress(model, tmp_path / "out", scheme="toy")
    card = (tmp_path / "out/README.md").read_text()
    assert "Not known to be served by vLLM: vLLM 0.33" in card
    assert "Not known to load in transformers: transformers 5.24" in card


def test_what_is_not_verified_is_not_said_to_be(
    with_toy: Path, model: Path, tmp_path: Path
) -> None:
    bitpress.compress(model, tmp_path / "out", scheme="toy", verify=False)
    card = (tmp_path / "out/README.md").read_text()
    assert "the error of every layer" not in card
    assert "SHA-256 of the header of every file" in card


@pytest.mark.parametrize(
    ("config", "task"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "text-generation"),
        (
            {"architectures": ["Qwen3VLForConditionalGeneration"], "vision_config": {}},
            "image-text-to-text",
        ),
        (
            {"architectures": ["VoxtralForConditionalGeneration"], "audio_config": {}},
            "audio-text-to-text",
        ),
        (
            {
                "architectures": ["Gemma3nForConditionalGeneration"],
                "vision_config": {},
                "audio_config": {},
            },
            "any-to-any",
        ),
        ({"architectures": ["BertForSequenceClassification"]}, "text-classification"),
        ({"model_type": "odd"}, None),
        ({}, None),
    ],
)
def test_the_task_follows_from_the_architecture(config: dict[str, Any], task: str | None) -> None:
    assert find_task(config) == task
