"""The second shelf: every lesson that needs no RabbitMQ, through the real driver."""

import os
import pty
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
from programs import PROJECT, drive, outcomes, python

import tasks
from reliable.rabbitmq_node import clean_environment, free_port
from reliable.testing import until

NOWHERE = {"RABBITMQ_PORT": str(free_port())}


def test_all_lessons_run_without_rabbitmq() -> None:
    finished = drive("--json", **NOWHERE)
    assert finished.returncode == 0, finished.stdout
    by_name = outcomes(finished)
    assert {name for name, lesson in by_name.items() if lesson["status"] == "skipped"} == {
        "nodes",
        "priorities",
        "crash",
    }
    assert {lesson["status"] for lesson in by_name.values()} == {"passed", "skipped"}
    assert "Traceback" not in finished.stderr
    assert finished.stderr.startswith("Embedded broker and worker")
    assert "10 passed, 3 skipped in " in finished.stderr
    assert "To run nodes, priorities, crash: docker compose up -d --wait\n" in finished.stderr


def test_each_skipped_lesson_is_named_with_what_it_needs() -> None:
    finished = drive(
        "nodes", "progress", CELERY_BROKER_URL="memory://", CELERY_RESULT_BACKEND="cache+memory://"
    )
    assert finished.stdout.startswith("Embedded broker and worker (memory://)")
    assert "To run nodes: docker compose up -d --wait\n" in finished.stdout
    assert "To run progress: remove CELERY_RESULT_BACKEND\n" in finished.stdout


def test_plain_lines_where_there_is_no_terminal() -> None:
    finished = drive("--embedded", "hello", "progress")
    assert finished.returncode == 0
    assert "\x1b" not in finished.stdout + finished.stderr
    assert finished.stderr == ""
    assert "passed" in finished.stdout


def on_a_terminal(**variables: str) -> str:
    """Run two lessons on a pseudo-terminal, and return what a person would see there."""
    ours, theirs = pty.openpty()
    command = [sys.executable, str(PROJECT / "run_tasks.py"), "--embedded", "hello"]
    environment = clean_environment(TERM="xterm", **variables)
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        seen = b""
        try:
            while block := os.read(ours, 4096):
                seen += block
        except OSError:  # Linux: the other end is closed
            pass
        os.close(ours)
    assert process.returncode == 0
    return seen.decode()


def test_colours_on_a_terminal() -> None:
    assert "\x1b[32mpassed" in on_a_terminal()


def test_no_color_is_obeyed() -> None:
    assert "\x1b[32m" not in on_a_terminal(NO_COLOR="1")


def test_the_words_are_those_that_counter_counts(tmp_path: Path) -> None:
    # Given thousands of files in folders, of which one is no text
    for number in range(3000):
        folder = tmp_path / f"folder {number % 7}"
        folder.mkdir(exist_ok=True)
        (folder / f"{number}.txt").write_text(f"Fish number {number} in the sea\n" * (number % 5 + 1))
    text = "".join(path.read_text() for path in tmp_path.rglob("*.txt"))
    (tmp_path / "picture").write_bytes(b"\xff")
    # When the driver counts them
    finished = drive("--embedded", "--json", "words", "--path", str(tmp_path))
    rows = outcomes(finished)["words"]["result"]
    # Then it counts what Counter does, in a few messages
    expected: Counter[str] = Counter(tasks.count_words(text))
    counted = {row["word"]: row["count"] for row in rows if "word" in row}
    assert counted == {word: expected[word] for word in counted}
    assert sorted(counted.values()) == sorted(count for _, count in expected.most_common(5))
    sums = next(row for row in rows if "words" in row)
    assert sums["words"] == expected.total()
    assert sums["messages"] < 50
    assert f"cannot be read as text: {tmp_path / 'picture'}" in finished.stderr


def test_chords_run_with_a_file_backend(tmp_path: Path) -> None:
    finished = drive(
        "--embedded", "--json", "workflows", "progress", CELERY_RESULT_BACKEND=f"file://{tmp_path}"
    )
    lessons = outcomes(finished)
    assert lessons["workflows"]["result"][-1] == {"workflow": "chord", "result": 9000}
    assert lessons["progress"]["status"] == "skipped"
    assert finished.returncode == 0


def test_a_lesson_that_does_not_see_what_it_teaches_fails() -> None:
    # Given a task that is wrong
    wrong = "import run_tasks, tasks; tasks.add.run = lambda x, y: 5; run_tasks.main()"
    failed = python("-c", wrong, "--embedded", "hello", "progress")
    assert failed.returncode == 1
    assert "failed: expected 2 + 2 = 4, got 5" in failed.stdout
    assert "passed" in failed.stdout  # the next one still runs


@pytest.mark.parametrize("backend", ["rcp://", "redis://", "file:///no/such/folder"])
def test_a_wrong_result_backend_is_told_before_anything_starts(backend: str) -> None:
    stopped = drive("hello", CELERY_RESULT_BACKEND=backend, **NOWHERE)
    assert (stopped.returncode, stopped.stdout, len(stopped.stderr.splitlines())) == (2, "", 2)


def test_ctrl_c_ends_the_run_at_once() -> None:
    command = [sys.executable, str(PROJECT / "run_tasks.py"), "--embedded", "parallel"]
    process = subprocess.Popen(
        command, env=clean_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout
    until(lambda: process.stdout and "Embedded" in process.stdout.readline())
    pressed = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT
    assert time.monotonic() - pressed < 3  # of the 4.5 s that the lesson takes, and 4 s of a worker's stop
    assert "Traceback" not in errors
    assert not psutil.pid_exists(process.pid)
