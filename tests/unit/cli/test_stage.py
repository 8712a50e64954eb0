"""What is said of the time that a stage may still take."""

from __future__ import annotations

import pytest

from bitpress.cli.stage import Stage, format_clock, format_left


def test_the_time_left_comes_from_finished_blocks_alone(clock) -> None:
    stage = Stage("compressing", 800)
    # shards outside the blocks, and the embeddings
    clock.seconds = 30
    stage.report(0, "running the embeddings")
    assert stage.describe() == "running the embeddings · 0:30 elapsed"
    clock.seconds = 40
    stage.report(0, "block 1/8 · loading")
    clock.seconds = 90
    stage.report(90, "block 1/8 · mlp.up_proj · done")
    assert stage.describe() == "block 1/8 · mlp.up_proj · done · 1:30 elapsed"
    stage.report(10, "block 1/8 · mlp.down_proj · done")
    clock.seconds = 100
    # 60 seconds for 100 of 800
    stage.report(0, "block 2/8 · loading")
    assert stage.describe() == "block 2/8 · loading · 1:40 elapsed · about 7 min left"
    # what is inside a block changes nothing but the time that is over
    clock.seconds = 150
    stage.report(90, "block 2/8 · mlp.down_proj · fitting")
    assert (
        stage.describe() == "block 2/8 · mlp.down_proj · fitting · 2:30 elapsed · about 7 min left"
    )
    clock.seconds = 170
    assert stage.describe().endswith("about 6 min left")
    assert stage.share == pytest.approx(190 / 800)


def test_blocks_that_were_finished_earlier_tell_nothing_of_the_time_left(clock) -> None:
    stage = Stage("compressing", 800)
    for block in range(1, 7):
        clock.seconds += 2
        stage.report(0, f"block {block}/8 · loading")
        stage.report(100, f"block {block}/8 · finished earlier")
        stage.report(0, f"block {block}/8 · running")
    stage.report(0, "block 7/8 · loading")
    assert "left" not in stage.describe()
    clock.seconds += 300
    stage.report(100, "block 7/8 · mlp.down_proj · done")
    stage.report(0, "block 8/8 · loading")
    assert stage.describe().endswith("about 5 min left")


def test_shards_that_were_finished_earlier_do_not_shorten_the_time_left(clock) -> None:
    stage = Stage("compressing", 100)
    stage.report(80, "model-1.safetensors · finished earlier")
    clock.seconds = 90
    stage.report(10, "model.layers.8.mlp.up_proj")
    assert stage.describe() == "model.layers.8.mlp.up_proj · 1:30 elapsed · about 2 min left"


def test_a_stage_that_reports_more_than_it_has_ends_at_its_end(clock) -> None:
    stage = Stage("verifying", 10)
    clock.seconds = 5
    stage.report(20)
    assert stage.share == 1
    assert stage.describe() == "0:05 elapsed"
    assert Stage("nothing", 0).share == 0


@pytest.mark.parametrize(
    ("seconds", "clock_text", "left"),
    [
        (5, "0:05", "less than 1 min left"),
        (61, "1:01", "about 2 min left"),
        (3850, "1:04:10", "about 65 min left"),
        (7200, "2:00:00", "about 2.0 h left"),
        (360_000, "100:00:00", "about 100.0 h left"),
    ],
)
def test_times_are_for_people(seconds: float, clock_text: str, left: str) -> None:
    assert format_clock(seconds) == clock_text
    assert format_left(seconds) == left
