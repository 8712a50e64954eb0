"""A chat template is a stranger's program: what it renders is what transformers renders, and what
would take too much is left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fixtures.learner_scheme import tokenizer_folder
from fixtures.processes import memory_taken
from transformers import AutoTokenizer

from bitpress import DataError
from bitpress.modeling import chat_templates
from bitpress.modeling.chat_templates import ChatRenderer, SkippedChatError
from bitpress.modeling.tokens import CalibrationData, load_calibration_data, load_evaluation_text
from bitpress.planning.calibration_config import CalibrationConfig
from bitpress.planning.evaluation_config import EvaluationConfig

ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
PLAIN = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
CHAT = [{"role": "user", "content": "On day 1 the ship was seen at noon.\n" * 3}]
EVIL = [{"role": "user", "content": "evil"}]
# What a template asks for, and what is said of it.
EVILS = {
    "memory": ("{{ 'w1 ' * 10**9 }}", "it takes too much memory"),
    "a long text": ("{{ 'w1 ' * 10**7 }}", "its text has 30,000,"),
    "for ever": (ENDLESS, "it takes more than 1 s"),
}


@pytest.fixture
def short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_templates, "MAX_SECONDS", 1)


def tokenizer(folder: Path, template: str) -> Any:
    file = tokenizer_folder(folder) / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": template}))
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def renderer(tmp_path: Path) -> Iterator[ChatRenderer]:
    evil = "".join(
        f"{{% if messages[0].content == '{name}' %}}{template}{{% endif %}}"
        for name, (template, _) in EVILS.items()
    )
    with ChatRenderer(tokenizer(tmp_path / "model", evil + PLAIN)) as renderer:
        yield renderer


@pytest.mark.parametrize(
    "template",
    [
        PLAIN,
        "{{ eos_token }}{{ messages | tojson }}",
        "{%- for m in messages -%}{{ m['content'] | trim }}\n{%- endfor -%}",
        "{% generation %}{{ messages[0].content }}{% endgeneration %}{{ tools }}",
    ],
)
def test_a_chat_is_rendered_as_transformers_renders_it(tmp_path: Path, template: str) -> None:
    own = tokenizer(tmp_path / "model", template)
    chats = [
        CHAT,
        [*CHAT, {"role": "assistant", "content": "é\u4e2d\U0001f600", "more": [1, None, 2.5]}],
        [{"role": "user", "content": "half of a pair: \ud800"}],
    ]
    with ChatRenderer(own) as renderer:
        for chat in chats:
            assert renderer.render(chat) == own.apply_chat_template(chat, tokenize=False)


@pytest.mark.usefixtures("short_patience")
@pytest.mark.parametrize("what", EVILS)
def test_a_chat_that_would_take_too_much_is_left_out(renderer: ChatRenderer, what: str) -> None:
    with memory_taken() as peak, pytest.raises(SkippedChatError, match=EVILS[what][1]):
        renderer.render([{"role": "user", "content": what}])
    assert peak[0] < 50_000_000
    assert renderer.render(CHAT).endswith(CHAT[0]["content"])


@pytest.mark.usefixtures("short_patience")
def test_a_template_that_never_ends_is_not_tried_for_ever(renderer: ChatRenderer) -> None:
    for _ in range(chat_templates.MAX_ENDLESS_CHATS):
        with pytest.raises(SkippedChatError):
            renderer.render([{"role": "user", "content": "for ever"}])
    with pytest.raises(DataError, match="did not end on 3 chats; give them as texts"):
        renderer.render(CHAT)


def test_a_template_whose_process_ends_is_left_out(renderer: ChatRenderer) -> None:
    renderer.render(CHAT)
    assert renderer._process is not None
    renderer._process.kill()
    with pytest.raises(SkippedChatError, match="its process was ended"):
        renderer.render(CHAT)
    assert renderer.render(CHAT)


def test_no_process_stays(renderer: ChatRenderer) -> None:
    renderer.render(CHAT)
    process = renderer._process
    assert process is not None
    renderer.__exit__()
    assert process.returncode is not None


def test_a_chat_that_is_left_out_is_a_warning_with_its_line(tmp_path: Path) -> None:
    bomb = "{% if messages[0].content == 'evil' %}{{ 'w1 ' * 10**9 }}{% endif %}"
    tokenizer(tmp_path / "model", bomb + PLAIN)
    chats = [EVIL, *[CHAT] * 20, EVIL, EVIL, EVIL, EVIL]
    file, plain = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    file.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    plain.write_text("".join(json.dumps({"messages": CHAT}) + "\n" for _ in range(20)))
    config = CalibrationConfig(str(file), samples=1000, sequence_length=32)
    data = load_calibration_data(config, tmp_path / "model", {})
    assert data.warnings[:4] == (
        "a.jsonl, line 1: the chat is left out: it takes too much memory",
        "a.jsonl, line 22: the chat is left out: it takes too much memory",
        "a.jsonl, line 23: the chat is left out: it takes too much memory",
        "a.jsonl: 2 more chats are left out",
    )
    config = CalibrationConfig(str(plain), samples=1000, sequence_length=32)
    assert load_calibration_data(config, tmp_path / "model", {}).digest == data.digest
    text = load_evaluation_text(EvaluationConfig(str(file), 32), tmp_path / "model", {})
    assert text.warnings == data.warnings[:4]


def test_where_every_chat_is_left_out_the_error_says_why(tmp_path: Path) -> None:
    tokenizer(tmp_path / "model", "{{ 'w1 ' * 10**9 }}")
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"messages": CHAT}))
    words = r"it holds no text; .*line 1: the chat is left out: it takes too much memory"
    with pytest.raises(DataError, match=words):
        load_calibration_data(CalibrationConfig(str(file)), tmp_path / "model", {})


TOOLS = [{"type": "function", "function": {"name": "find_ship", "parameters": {}}}]
PICKY = "{% if messages[0].content == 'evil' %}{{ raise_exception('no evil') }}{% endif %}" + PLAIN


def calibrate(folder: Path, template: str, rows: list[Any]) -> CalibrationData:
    tokenizer(folder / "model", template)
    file = folder / "a.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = CalibrationConfig(str(file), samples=1000, sequence_length=32)
    return load_calibration_data(config, folder / "model", {})


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)], ids=["a list", "JSON"])
def test_the_tools_of_a_chat_are_given_to_its_template(tmp_path: Path, tools: Any) -> None:
    template = "{% if tools %}{{ tools | tojson }}{% endif %}" + PLAIN
    data = calibrate(tmp_path, template, [{"messages": CHAT, "tools": tools}])
    own = AutoTokenizer.from_pretrained(tmp_path / "model")
    text = own.apply_chat_template(CHAT, tools=TOOLS, tokenize=False)
    same = tmp_path / "same.txt"
    same.write_text(text)
    config = CalibrationConfig(str(same), samples=1000, sequence_length=32)
    assert "find_ship" in text
    assert data.digest == load_calibration_data(config, tmp_path / "model", {}).digest


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "Good\nday"),
        ("{% for m in messages %}{{ m.content | trim }}{% endfor %}", "Good\nday"),
        ("{% for m in messages %}{{ m.content + '!' }}{% endfor %}", "Good\nday!"),
        (
            "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% endif %}"
            "{% endfor %}",
            "Good\nday",
        ),
        (
            "{% for m in messages %}{% for part in m.content %}<{{ part.text }}>{% endfor %}"
            "{% endfor %}",
            "<Good><day>",
        ),
    ],
)
def test_text_parts_are_text_where_a_template_takes_text_alone(
    tmp_path: Path, template: str, expected: str
) -> None:
    parts = [{"type": "text", "text": "Good"}, {"type": "text", "text": "day"}]
    with ChatRenderer(tokenizer(tmp_path / "model", template)) as renderer:
        assert renderer.render([{"role": "user", "content": parts}]) == expected


def test_a_chat_that_the_template_refuses_is_left_out_with_a_warning(tmp_path: Path) -> None:
    rows = [{"messages": chat} for chat in [CHAT, EVIL, CHAT, *[EVIL] * 4]]
    data = calibrate(tmp_path, PICKY, rows)
    refusal = "the tokenizer's chat template does not take these messages (no evil)"
    assert data.warnings[:4] == (
        *(f"a.jsonl, line {line}: the chat is left out: {refusal}" for line in (2, 4, 5)),
        "a.jsonl: 2 more chats are left out",
    )


def test_a_template_that_refuses_every_chat_is_not_tried_on_all(tmp_path: Path) -> None:
    words = r"a\.jsonl, line 1: .*\(no evil\); all of the first 100 chats are refused$"
    with pytest.raises(DataError, match=words):
        calibrate(tmp_path, PICKY, [{"messages": EVIL}] * 150)


def test_tools_that_are_no_list_of_objects_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match='line 1: "tools" are a list of objects'):
        calibrate(tmp_path, PLAIN, [{"messages": CHAT, "tools": "find_ship"}])
