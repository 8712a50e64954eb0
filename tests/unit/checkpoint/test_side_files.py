"""Of the files beside a model's weights, those that loaders read are copied, and no others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import bitpress
from bitpress import CheckpointError
from bitpress.checkpoint.reader import open_checkpoint
from bitpress.conformance.commands import command, refusal
from bitpress.conformance.models import files_of, write_model

COPIED = [
    "LICENSE",
    "LICENSE-APACHE-2.0.txt",
    "Licence.md",
    "MODEL_LICENSE",
    "NOTICE",
    "USE_POLICY.md",
    "additional_chat_templates/tool_use.jinja",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "modules.json",
    "1_Pooling/config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "qwen.tiktoken",
    "sentence_bert_config.json",
    "special_tokens_map.json",
    "spiece.model",
    "tekken.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer.model.v3",
    "video_preprocessor_config.json",
    "vocab.json",
    "vocab.txt",
]
LEFT = [
    "LICENSE.key",
    "config.json.bak",
    "credentials.json",
    "evil.py",
    "events.out.tfevents.1",
    "id_rsa",
    "checkpoint-5/tokenizer.json",
    "model.gguf",
    "notes.txt",
    "optimizer.pt",
    "original/params.json",
    "pytorch_model.bin",
    "rng_state.pth",
    "scheduler.pt",
    "server.pem",
    "token",
    "train.log",
    "trainer_state.json",
    "training_args.bin",
    "tokenizer_config.json.key",
]


def fill(model: Path, names: list[str]) -> None:
    for name in names:
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text(f"content of {name}")


def test_what_loaders_read_is_copied_and_the_rest_is_left(tmp_path: Path, with_toy: Path) -> None:
    model = write_model(tmp_path / "model")
    fill(model, [*COPIED, *LEFT])
    bitpress.compress(model, tmp_path / "out", scheme="toy")
    written = files_of(tmp_path / "out")
    assert not {*LEFT} & written.keys()
    assert {name: written[name].decode() for name in COPIED} == {
        name: f"content of {name}" for name in COPIED
    }


def test_the_source_s_card_is_copied_under_another_name(tmp_path: Path, with_toy: Path) -> None:
    model = write_model(tmp_path / "model")
    fill(model, ["README.md"])
    bitpress.compress(model, tmp_path / "out", scheme="toy")
    assert (tmp_path / "out/README.source.md").read_text() == "content of README.md"


def test_code_is_copied_where_a_config_names_it_or_that_code_imports_it(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    fill(model, [f"{name}.py" for name in ("evil", "own", "deep", "deeper", "tok", "proc", "part")])
    (model / "own.py").write_text("import os\nfrom .deep import x\nfrom evil import y\n")
    (model / "deep.py").write_text("def f():\n    from .deeper import z\n    from .own import q\n")
    changes = {
        "config.json": {
            "auto_map": {"AutoModel": "own.Model", "AutoConfig": "other/repo--evil.Config"},
            "text_config": {"auto_map": {"AutoModel": "part.Model"}},
        },
        "tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["tok.Tokenizer", None]}},
        "processor_config.json": {"auto_map": {"AutoProcessor": "proc.Processor"}},
    }
    for name, change in changes.items():
        old = json.loads((model / name).read_text()) if (model / name).exists() else {}
        (model / name).write_text(json.dumps(old | change))
    checkpoint = open_checkpoint(model)
    assert {name for name in checkpoint.side_files if name.endswith(".py")} == {
        *("own.py", "deep.py", "deeper.py", "tok.py", "proc.py", "part.py")
    }
    assert checkpoint.left_files == ("evil.py",)


@pytest.mark.parametrize("content", [b"\xff", b"[" * 100_000, b"[]", b'{"auto_map": 3}'])
def test_a_config_that_says_nothing_usable_names_no_code(tmp_path: Path, content: bytes) -> None:
    model = write_model(tmp_path / "model")
    (model / "processor_config.json").write_bytes(content)
    assert "processor_config.json" in open_checkpoint(model).side_files


def test_a_pattern_adds_files_and_the_command_on_the_card_has_it(tmp_path: Path, toy: Path) -> None:
    model, out, dense = write_model(tmp_path / "model"), tmp_path / "out", tmp_path / "dense"
    fill(model, ["train.log", "logs/a.log", "id_rsa", "optimizer.pt"])
    words = ["--scheme", "toy", "--copy", "*.log", "--copy", "id_rsa"]
    done = command("compress", model, out, *words, path=toy)
    assert done.returncode == 0, done.stderr
    assert "not copied: optimizer.pt (--copy PATTERN)" in done.stdout
    assert {"train.log", "logs/a.log", "id_rsa"} < files_of(out).keys()
    assert "--copy '*.log' --copy id_rsa" in (out / "README.md").read_text()
    assert command("decompress", out, dense, path=toy).returncode == 0
    assert {"train.log", "logs/a.log", "id_rsa"} < files_of(dense).keys()


def test_a_plan_says_what_is_left(tmp_path: Path, toy: Path) -> None:
    model = write_model(tmp_path / "model")
    fill(model, ["train.log", *(f"{i:02}.txt" for i in range(12))])
    shown = command("plan", model, "--scheme", "toy", path=toy).stdout
    first = ", ".join(f"{i:02}.txt" for i in range(10))
    assert f"not copied: {first} and 3 more (--copy PATTERN)\n" in shown
    text = command("plan", model, "--scheme", "toy", "--copy", "*.txt", "--json", path=toy).stdout
    assert json.loads(text)["not_copied"] == ["train.log"]
    assert json.loads(text)["files"]["00.txt"] == len("content of 00.txt")


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("*.bin", "it matches only weights, which are not copied"),
        ("MODEL.GGUF", "it matches only weights, which are not copied"),
        ("model.safetensors", "it matches only weights, which are not copied"),
        ("nothing", "it matches no file"),
        (".git/*", "it matches no file"),
        ("../*", "it matches no file"),
    ],
)
def test_a_pattern_without_a_file_that_may_be_copied_is_refused(
    tmp_path: Path, toy: Path, pattern: str, words: str
) -> None:
    model = write_model(tmp_path / "model")
    fill(model, ["pytorch_model.bin", "MODEL.GGUF", ".git/config"])
    (tmp_path / "secret").write_text("mine")
    line = refusal("plan", model, "--scheme", "toy", "--copy", pattern, path=toy)
    assert f"--copy {pattern}: {words}" in line


def test_a_link_out_of_the_folder_is_not_copied_by_a_pattern_either(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    (tmp_path / "secret").write_text("mine")
    (model / "notes.txt").symlink_to("../secret")
    assert open_checkpoint(model).left_files == ("notes.txt",)
    with pytest.raises(CheckpointError, match="a link that leads out"):
        open_checkpoint(model, copy=["*.txt"])


def test_a_file_that_is_left_may_change_during_the_run(tmp_path: Path, with_toy: Path) -> None:
    model = write_model(tmp_path / "model")
    (model / "train.log").write_text("a")

    def progress(stage: str, num_bytes: int) -> object:
        (model / "train.log").write_text(stage)
        return lambda count, text="": None

    bitpress.compress(model, tmp_path / "out", scheme="toy", progress=progress)  # type: ignore[arg-type]
    assert (tmp_path / "out/config.json").exists()
