"""An output folder belongs to one run: two at once, and two of unlike making, are kept apart, and
told what parts them.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
from fixtures.forked import ForkedCommand
from fixtures.learner_scheme import CONFIG, install_learner, runnable_model
from fixtures.toy_scheme import TOY, install_toy

import bitpress
from bitpress import OutputError
from bitpress.checkpoint.filenames import LOCK
from bitpress.checkpoint.lock import lock_folder
from bitpress.checkpoint.writer import OutputFolder
from bitpress.cli import INTERRUPTED
from bitpress.compression import run
from bitpress.compression.job import prepare_job
from bitpress.conformance.commands import command, install, plugins, refusal
from bitpress.conformance.models import files_of, llama_tensors, write_model
from bitpress.planning import memory_estimate
from bitpress.planning.recipe_source import RecipeSource
from bitpress.runtime import memory

HOLDER = """
import pathlib, sys, time
from bitpress.checkpoint.lock import lock_folder
with lock_folder(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""
ENTRY = "[bitpress.schemes]\ntoy = bitpress_scheme_toy\n"


def hold(folder: Path) -> subprocess.Popen[str]:
    """Another process that has the folder's lock."""
    words = [sys.executable, "-c", HOLDER, str(folder)]
    holder = subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": ":".join(sys.path)},
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    return holder


# --- two at once
# ----------------------------------------------------------------------


def test_a_second_run_into_a_folder_is_refused_and_named_the_first_until_that_is_dead(
    tmp_path: Path, toy: Path
) -> None:
    model, out = write_model(tmp_path / "model"), tmp_path / "out"
    out.mkdir()
    holder = hold(out)
    try:
        line = refusal("compress", model, out, "--scheme", "toy", path=toy)
        assert f"another run writes into it (process {holder.pid} on " in line
        assert os.listdir(out) == [LOCK]
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    # the dead cannot tidy up
    assert (out / LOCK).exists()
    assert command("compress", model, out, "--scheme", "toy", path=toy).returncode == 0
    assert not [name for name in files_of(out) if name.startswith(".bitpress")]


def test_two_runs_of_one_process_are_kept_apart_too(tmp_path: Path) -> None:
    with OutputFolder(tmp_path) as first:
        first.prepare([], 0)
        with (
            OutputFolder(tmp_path) as second,
            pytest.raises(OutputError, match="another run writes into it"),
        ):
            second.prepare([], 0)
        with (
            OutputFolder(tmp_path) as third,
            pytest.raises(OutputError, match="another run writes into it"),
        ):
            # the second, refused, has not taken the first's lock away
            third.prepare([], 0)
    with OutputFolder(tmp_path) as fourth:
        fourth.prepare([], 0)


def test_a_run_that_failed_holds_no_lock(tmp_path: Path, with_toy: Path) -> None:
    with OutputFolder(tmp_path / "out") as output, pytest.raises(OutputError, match="the disk has"):
        output.prepare([], 10**18)
    assert os.listdir(tmp_path / "out") == []


def test_a_lock_whose_file_was_taken_away_is_not_mistaken_for_the_folder_s(tmp_path: Path) -> None:
    flock = fcntl.flock

    def slow(descriptor: int, how: int) -> None:
        """The first time, the run that had the lock ends between the opening and the locking of its
        file.
        """
        if slots and slots.pop():
            (tmp_path / LOCK).unlink()
        flock(descriptor, how)

    slots = [False, True]
    with patch.object(fcntl, "flock", slow), lock_folder(tmp_path):
        assert slots == []
        patch.stopall()
        with patch.object(fcntl, "flock", flock), pytest.raises(OutputError), lock_folder(tmp_path):
            pass


def test_where_a_file_system_has_no_locks_the_run_goes_on_with_a_warning(tmp_path: Path) -> None:
    def none(descriptor: int, how: int) -> None:
        raise OSError(38, "Function not implemented")

    warned = pytest.warns(UserWarning, match="this file system has no locks")
    with patch.object(fcntl, "flock", none), warned, lock_folder(tmp_path):
        pass
    assert os.listdir(tmp_path) == []


def test_decompress_takes_the_lock_too(tmp_path: Path, toy: Path) -> None:
    model, out, dense = write_model(tmp_path / "model"), tmp_path / "out", tmp_path / "dense"
    assert command("compress", model, out, "--scheme", "toy", path=toy).returncode == 0
    dense.mkdir()
    with lock_folder(dense):
        assert "another run writes into it" in refusal("decompress", out, dense, path=toy)
    assert command("decompress", out, dense, path=toy).returncode == 0


# --- what has changed is named
# ----------------------------------------------------------------------


# a run that ends here has finished every shard, and the output is none yet
HALF_WAY = patch("bitpress.compression.run._verify", side_effect=OutputError("half way"))


def other_weights(model: Path) -> None:
    """The same layout with other numbers: no header shows it."""
    shutil.rmtree(model)
    write_model(model, llama_tensors(seed=1))


def other_config(model: Path) -> None:
    table = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(table | {"rms_norm_eps": 1e-6}))


@pytest.mark.parametrize(
    ("change", "arguments", "version", "words"),
    [
        (None, ["--set", "levels=7"], "1.0", ["recipe layers 1 steps 1 levels was 127 and is 7"]),
        (None, ["--ignore", "*.o_proj"], "1.0", ['recipe ignore 1 was nothing and is "*.o_proj"']),
        (
            None,
            [],
            "2.0",
            ['scheme toy was "bitpress-scheme-toy 1.0" and is "bitpress-scheme-toy 2.0"'],
        ),
        (other_weights, [], "1.0", ["source model.safetensors size and time of change (ns)"]),
        (other_config, [], "1.0", ["config.json rms_norm_eps was 1e-05 and is 1e-06"]),
    ],
    ids=[
        "an option",
        "a pattern",
        "a plugin's version",
        "the source's numbers",
        "the source's config",
    ],
)
def test_what_differs_from_the_run_that_began_the_folder_is_named_and_nothing_is_mixed_in(
    tmp_path: Path,
    change: Callable[[Path], None] | None,
    arguments: list[str],
    version: str,
    words: list[str],
) -> None:
    model, out = write_model(tmp_path / "model"), tmp_path / "out"
    with HALF_WAY:
        assert "half way" in refusal(
            "compress", model, out, "--scheme", "toy", path=install_toy(tmp_path / "first")
        )
    left = files_of(out)
    assert "model.safetensors" in left
    if change is not None:
        change(model)
    second = install_toy(tmp_path / "second", version)
    line = refusal("compress", model, out, "--scheme", "toy", *arguments, path=second)
    for word in [*words, "was begun by another run", "delete the folder"]:
        assert word in line, line
    assert files_of(out) == left


@pytest.mark.parametrize(
    ("arguments", "text", "words"),
    [
        (["--seed", "3"], None, "calibration seed was 0 and is 3"),
        (["--samples", "8"], None, "calibration sequences was 16 and is 8"),
        ([], "w1 w2 w3 " * 500, "calibration SHA-256 of the tokens was"),
    ],
    ids=["the seed", "the number of sequences", "the text"],
)
def test_other_calibration_is_named(
    tmp_path: Path, arguments: list[str], text: str | None, words: str
) -> None:
    learner = install_learner(tmp_path / "plugins")
    model, out = (
        runnable_model(tmp_path / "m", config=CONFIG | {"num_hidden_layers": 1}),
        tmp_path / "out",
    )
    head = [
        "--scheme",
        "learner",
        "--calibration",
        tmp_path / "text.txt",
        "--sequence-length",
        "64",
        "--threads",
        "1",
    ]
    with HALF_WAY:
        assert "half way" in refusal("compress", model, out, *head, "--samples", "16", path=learner)
    left = files_of(out)
    if text is not None:
        (tmp_path / "text.txt").write_text(text)
    line = refusal(
        "compress",
        model,
        out,
        *head,
        *(["--samples", "16"] if "--samples" not in arguments else []),
        *arguments,
        path=learner,
    )
    assert words in line, line
    assert files_of(out) == left


@pytest.mark.parametrize(
    "record",
    [b"\xff{", b"[" * 100_000, b"[" * 900 + b"]" * 900, b'{"recipe":' * 900 + b"1" + b"}" * 900],
    ids=["bytes", "an abyss", "nested lists", "nested tables"],
)
def test_what_an_unreadable_note_of_the_run_hides_is_not_guessed(
    tmp_path: Path, toy: Path, record: bytes
) -> None:
    model, out = write_model(tmp_path / "model"), tmp_path / "out"
    out.mkdir()
    (out / ".bitpress.run").write_bytes(record)
    (out / "model.safetensors").touch()
    line = refusal("compress", model, out, "--scheme", "toy", path=toy)
    assert ".bitpress.run cannot be read" in line or "was begun by another run" in line
    assert len(line) < 1000


def test_a_run_that_left_no_finished_shard_binds_nobody(tmp_path: Path, toy: Path) -> None:
    model, out = write_model(tmp_path / "model"), tmp_path / "out"
    out.mkdir()
    (out / ".bitpress.run").write_text("{}")
    (out / "model.safetensors.0123cdef.part").touch()
    assert command("compress", model, out, "--scheme", "toy", path=toy).returncode == 0


def test_a_run_that_died_while_it_tidied_up_is_tidied_up(tmp_path: Path, toy: Path) -> None:
    model, out = write_model(tmp_path / "model"), tmp_path / "out"
    with plugins(toy):
        bitpress.compress(model, tmp_path / "whole", scheme="toy")
        with (
            patch.object(OutputFolder, "remove", side_effect=KeyboardInterrupt),
            pytest.raises(KeyboardInterrupt),
        ):
            bitpress.compress(model, out, scheme="toy")
    assert {"config.json", ".bitpress.run"} < files_of(out).keys()
    assert command("compress", model, out, "--scheme", "toy", path=toy).returncode == 0
    assert files_of(out) == files_of(tmp_path / "whole")


# --- the same command once more
# ----------------------------------------------------------------------


def test_a_run_that_has_finished_is_finished_when_it_is_started_again(
    tmp_path: Path, toy: Path
) -> None:
    words = ["compress", write_model(tmp_path / "model"), tmp_path / "out", "--scheme", "toy"]
    assert command(*words, path=toy).returncode == 0
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()}
    done = command(*words, path=toy)
    assert done.returncode == 0
    assert "is finished already: the same run wrote it" in done.stderr
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()} == before


FINISHED_OTHERWISE = {
    "another recipe": lambda model, out: ["--set", "levels=7"],
    "another source": lambda model, out: write_model_again(model, seed=1),
    "another tokenizer": lambda model, out: (model / "tokenizer_config.json").write_text("{}"),
    "a file cut short": lambda model, out: os.truncate(out / "model.safetensors", 9000),
    "a changed manifest": lambda model, out: append(out / "bitpress.json", " "),
}


def write_model_again(model: Path, seed: int) -> None:
    shutil.rmtree(model)
    write_model(model, llama_tensors(seed))


def append(file: Path, text: str) -> None:
    file.write_text(file.read_text() + text)


@pytest.mark.parametrize("change", FINISHED_OTHERWISE)
def test_an_output_that_another_run_would_make_is_not_taken_for_finished(
    tmp_path: Path, toy: Path, change: str
) -> None:
    model, out = write_model(tmp_path / "model"), tmp_path / "out"
    words = ["compress", model, out, "--scheme", "toy"]
    assert command(*words, path=toy).returncode == 0
    more = FINISHED_OTHERWISE[change](model, out)
    line = refusal(*words, *(more if isinstance(more, list) else []), path=toy)
    assert "already holds a model" in line


# --- the source while the run lasts
# ----------------------------------------------------------------------

MEDDLING = TOY.replace("import attrs\n", "import attrs, os, pathlib\n").replace(
    "def dequantize(tensors): return",
    "def dequantize(tensors):\n    exec(pathlib.Path(__file__).with_name('deed').read_text())\n    "
    "return",
)
WEIGHTS, TOKENIZER = "model.safetensors", "tokenizer_config.json"


@pytest.mark.parametrize(
    ("deed", "words"),
    [
        ("os.utime(model / 'model.safetensors')", [WEIGHTS, "changed during the run"]),
        (
            "(model / 'tokenizer_config.json').write_text('{}')",
            [TOKENIZER, "changed during the run"],
        ),
        (
            "(model / 'tokenizer_config.json').unlink(missing_ok=True)",
            [TOKENIZER, "vanished during the run"],
        ),
    ],
)
def test_a_source_that_changes_during_the_run_is_noticed_and_gets_no_config(
    tmp_path: Path, deed: str, words: list[str]
) -> None:
    model = write_model(tmp_path / "model")
    meddler = install(tmp_path / "plugins", "bitpress-scheme-toy", MEDDLING, ENTRY)
    (meddler / "deed").write_text(f"model = pathlib.Path({str(model)!r})\n{deed}")
    line = refusal("compress", model, tmp_path / "out", "--scheme", "toy", path=meddler)
    for word in words:
        assert word in line, line
    assert not (tmp_path / "out/config.json").exists()


def test_a_file_that_vanishes_before_it_is_read_is_named(tmp_path: Path, with_toy: Path) -> None:
    model = write_model(tmp_path / "model", shards=2)
    job = prepare_job(model, RecipeSource("toy"))
    (model / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        bitpress.CheckpointError, match=r"model-00002-of-00002\.safetensors: No such file"
    ):
        run.run(job, tmp_path / "out")
    assert not (tmp_path / "out/config.json").exists()


# --- room
# ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "spill", [False, True], ids=["data-free", "hidden states that go to disk too"]
)
def test_the_room_that_the_plan_needs_is_there_before_the_first_byte(
    tmp_path: Path, spill: bool
) -> None:
    path = install_learner(tmp_path / "plugins") if spill else install_toy(tmp_path / "plugins")
    model, out = (
        runnable_model(tmp_path / "m", config=CONFIG | {"num_hidden_layers": 1}),
        tmp_path / "out",
    )
    (model / "vocab.txt").write_bytes(b"x" * 100_000)
    with plugins(path):
        plan = bitpress.plan(model, scheme="learner" if spill else "toy")
        shape = (16, 64) if spill else None
        short = memory_estimate.estimate_memory(plan, shape=shape) + 1000 if spill else None
        needed = memory_estimate.estimate_disk(plan, shape, short)
    # of the source too, since there are few tokens for the width
    states = 1024 * 128 * 4 * 2 if spill else 0
    descriptions = memory_estimate.estimate_descriptions(plan)
    assert needed == sum(plan.file_sizes.values()) + descriptions + states
    assert plan.file_sizes["vocab.txt"] == 100_000
    words = ["compress", model, out, "--scheme", "learner" if spill else "toy"]
    words += (
        ["--samples", 16, "--sequence-length", 64, "--calibration", tmp_path / "text.txt"]
        if spill
        else []
    )
    words += ["--max-memory", short] if spill else []
    with patch.object(shutil, "disk_usage", return_value=SimpleNamespace(free=needed - 1)):
        assert "the disk has" in refusal(*words, path=path)
    assert files_of(out) == {}


def test_there_are_inodes_for_all_files_before_the_first_byte(
    tmp_path: Path, with_toy: Path
) -> None:
    model, out = write_model(tmp_path / "model"), tmp_path / "out"
    words = ["compress", model, out, "--scheme", "toy"]
    # blocks, of which there are enough
    blocks = dict.fromkeys(("f_frsize", "f_blocks", "f_bavail", "f_bfree"), 1 << 30)
    full = SimpleNamespace(**blocks, f_files=100, f_favail=3)
    with patch.object(os, "statvfs", return_value=full):
        assert "has room for 3 more files (inodes)" in refusal(*words)
    assert files_of(out) == {}
    # a file system that counts none has as many as are wanted
    uncounted = SimpleNamespace(**blocks, f_files=0, f_favail=0)
    with patch.object(os, "statvfs", return_value=uncounted):
        bitpress.compress(model, out, scheme="toy")


def test_a_run_that_is_short_of_memory_takes_as_many_threads_as_fit(
    tmp_path: Path, with_toy: Path
) -> None:
    job = prepare_job(write_model(tmp_path / "model"), RecipeSource("toy"))
    with patch("bitpress.compression.run.count_cores", return_value=64):
        for count in (1, 3, 64):
            assert (
                run._choose_num_threads(job, memory_estimate.estimate_memory(job.plan, count))
                == count
            )
        assert run._choose_num_threads(job, memory_estimate.estimate_memory(job.plan, 4) - 1) == 3
        assert run._choose_num_threads(job, None) == 64
        # without a limit, what the machine or a container gives is one
        for count in (1, 3):
            attainable = memory_estimate.estimate_memory(job.plan, count)
            with patch.object(memory, "attainable_bytes", return_value=attainable):
                assert run._choose_num_threads(job, None) == count


def test_a_run_that_may_be_ended_for_want_of_memory_is_warned_of(
    tmp_path: Path, with_toy: Path
) -> None:
    model = write_model(tmp_path / "model")
    with (
        patch.object(memory, "attainable_bytes", return_value=100_000_000),
        pytest.warns(UserWarning, match="of memory, and this machine or its container gives it"),
    ):
        bitpress.compress(model, tmp_path / "out", scheme="toy")


def test_an_interrupted_process_leaves_no_lock_and_goes_on(tmp_path: Path) -> None:
    slow = TOY.replace("import attrs\n", "import attrs, time\n").replace(
        "    scale = layer", "    time.sleep(0.5)\n    scale = layer"
    )
    path = install(tmp_path / "plugins", "bitpress-scheme-toy", slow, ENTRY)
    model, out = write_model(tmp_path / "model"), tmp_path / "out"
    running = ForkedCommand("compress", model, out, "--scheme", "toy", "--threads", 1, path=path)
    while not list(out.glob("*.part")) and running.poll() is None:
        time.sleep(0.05)
    assert (out / LOCK).exists()
    running.send_signal(signal.SIGINT)
    assert running.wait(60) == 130
    assert files_of(out) == {}


def test_a_second_interrupt_ends_the_process_in_one_line(tmp_path: Path) -> None:
    slow = TOY.replace("import attrs\n", "import attrs, threading, time\n").replace(
        "    scale = layer",
        "    if threading.current_thread() is not threading.main_thread():\n        "
        "time.sleep(20)\n    scale = layer",
    )
    path = install(tmp_path / "plugins", "bitpress-scheme-toy", slow, ENTRY)
    model, out = write_model(tmp_path / "model"), tmp_path / "out"
    running = ForkedCommand("compress", model, out, "--scheme", "toy", "--threads", 2, path=path)
    while not list(out.glob("*.part")) and running.poll() is None:
        time.sleep(0.05)
    time.sleep(0.5)
    running.send_signal(signal.SIGINT)
    # Now it waits for its threads.
    time.sleep(0.5)
    running.send_signal(signal.SIGINT)
    _, error = running.communicate(timeout=10)
    assert running.returncode == 130
    assert error.splitlines() == [f"bitpress: {INTERRUPTED}"]
    done = command("compress", model, out, "--scheme", "toy", path=install_toy(path))
    assert done.returncode == 0, done.stderr
    assert not list(out.glob("*.part"))
