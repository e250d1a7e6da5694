"""The driver's command line, its tables, and how it cuts text. The benchmark's medians."""

import json
from collections import Counter
from pathlib import Path

import benchmark
import pytest
from amqp import PreconditionFailed
from programs import drive

import run_tasks
import tasks
from reliable.errors import describe_error


def test_the_list_names_every_lesson_in_order() -> None:
    *listed, note = drive("--list").stdout.splitlines()
    assert note == "* needs RabbitMQ"
    assert [line.split()[0] for line in listed if line.split()[1] == "*"] == [
        "nodes",
        "priorities",
        "crash",
        "poison",
    ]
    assert max(map(len, listed)) <= 80
    assert [line.split()[0] for line in listed] == list(run_tasks.LESSONS)
    assert list(run_tasks.LESSONS) == [
        "hello",
        "parallel",
        "nodes",
        "schedule",
        "retries",
        "failures",
        "priorities",
        "routing",
        "crash",
        "words",
        "workflows",
        "progress",
        "bulk",
        "poison",
    ]


@pytest.mark.parametrize(
    ("arguments", "what", "fix"),
    [
        (["retires"], "'retires' is not one of 'hello', ", "--help"),
        (["words", "--path", "/no/such/file"], "'/no/such/file' does not exist", "--help"),
        (["--no-such-option"], "--no-such-option", "--help"),
    ],
)
def test_wrong_arguments_are_reported_with_a_fix(arguments: list[str], what: str, fix: str) -> None:
    stopped = drive(*arguments)
    assert (stopped.returncode, stopped.stdout) == (2, "")
    lines = stopped.stderr.splitlines()
    assert len(lines) == 2
    assert what in lines[0]
    assert fix in lines[1]


def test_a_table_has_a_heading_for_each_kind_of_row() -> None:
    rows: run_tasks.Rows = [{"word": "fish", "count": 2}, {"word": "sea", "count": 10}, {"s": 0.123}]
    assert list(run_tasks.table(rows)) == ["word  count", "fish  2", "sea   10", "s", "0.12"]


def test_text_is_cut_at_the_end_of_a_line_into_messages_of_limited_length(tmp_path: Path) -> None:
    # Given small files, a large one, one that is not ASCII, one long line, and lines without an end
    texts = [
        "one two",
        "w\u00f6rter \u4e2d\u6587 \U0001f41f " * 9000,
        "Fish sea\n" * 20_000,
        "\tend\u00a0end",
        json.dumps({f"k\u00e9y-{number}": number for number in range(9000)}, separators=(",", ":")),
    ]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text, encoding="utf-8")
    # When they become messages
    sent = list(run_tasks.cut([tmp_path]))
    # Then all words are there, and no message is longer than wanted, but for the rest of its last line
    counted = sum((Counter(tasks.count_words(text)) for text in sent), Counter())
    assert counted == sum((Counter(tasks.count_words(text)) for text in texts), Counter())
    assert all(len(text[: text.rfind("\n", 0, -1) + 1]) <= run_tasks.MESSAGE_SIZE for text in sent)


def test_files_that_are_not_text_are_skipped_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "binary").write_bytes(b"GIF89a\xf7\0\1")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / ".hidden").write_text("hidden")
    (tmp_path / "text").write_text("fish")
    assert list(run_tasks.cut([tmp_path])) == ["fish\n"]
    assert [Path(line).name for line in capsys.readouterr().err.splitlines()] == ["binary", "dangling"]


def test_a_message_that_is_too_large_is_not_taken_for_a_wrong_queue() -> None:
    refused = PreconditionFailed("PRECONDITION_FAILED - message size 20000079 is larger than configured")
    assert describe_error(refused)[0].startswith("The message is too large")


def test_the_benchmark_tells_medians_and_ratios() -> None:
    figures = {"tasks/s": {"this project": [100.0, 300.0, 200.0], "Celery, stock": [50.0, 100.0, 400.0]}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "FIGURES", figures)
        rows = benchmark.summary()
    assert [(row["median"], row["ratio"]) for row in rows] == [("200", "2.00"), ("100", "1.00")]
    assert rows[1]["lowest to highest"] == "50 to 400"
