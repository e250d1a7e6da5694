"""The first shelf: functions, configuration and the command line, without any broker."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import benchmark
import pytest
from celery.app.defaults import DEFAULTS
from conftest import PROJECT, clean_environment, drive

import celeryconfig
import run_tasks
import tasks


# --- Tasks are functions ------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("task", "arguments", "returned"),
    [
        (tasks.add, (2, 2), 4),
        (tasks.send_email, ("ada@example.com", 0), "sent to ada@example.com"),
        (tasks.count_words, ("One fish, ONE sea",), {"one": 2, "fish": 1, "sea": 1}),
        (tasks.add_tax, (1000,), 1200),
        (tasks.total, ([1, 2, 3],), 6),
        (tasks.receipt, (1999,), "You paid 19.99 EUR"),
        (tasks.pack_order, (2, 0), 2),
        (tasks.ship, ("lamp", 0), "lamp: shipped"),
        (tasks.draw_label, (0,), "label"),
        (tasks.draw_stubborn_label, (0,), "label"),
        (tasks.check_price, (3,), True),
        (tasks.report_stock, (), None),
    ],
)
def test_a_task_is_a_function(task: Any, arguments: tuple[Any, ...], returned: Any) -> None:
    assert task(*arguments) == returned


def test_an_order_is_paid_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "BOOKS", tmp_path / "books")
    assert tasks.charge_card("order 7", 0) == "order 7 paid at attempt 1"
    assert tasks.charge_card("order 7", 0) == "order 7 was paid before"
    assert tasks.charge_card("order 8", 0) == "order 8 paid at attempt 1"


def test_the_gateway_is_busy_and_the_stock_empty() -> None:
    with pytest.raises(tasks.GatewayBusyError, match="attempt 1 of order 7"):
        tasks.charge_card("order 7")
    with pytest.raises(tasks.OutOfStockError, match="lamp"):
        tasks.ship("lamp", 1e12)


def test_times_and_names_are_returned() -> None:
    before = tasks.remind("Ada")
    assert tasks.serve_customer("Ada") >= before
    assert isinstance(tasks.worker_name(), str)


def test_a_crash_kills_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda *what: killed.append(what))
    assert str(os.getpid()) in tasks.print_label(0)
    assert not killed
    tasks.print_label(1)
    assert killed == [(os.getpid(), signal.SIGKILL)]


# --- The configuration --------------------------------------------------------------------------
def test_every_work_queue_keeps_its_failures() -> None:
    for queue in celeryconfig.task_queues:
        arguments = queue.queue_arguments or {}
        assert arguments["x-dead-letter-exchange"] == celeryconfig.dead_letters.exchange.name
        assert arguments["x-overflow"] == "reject-publish"
        assert (arguments["x-queue-type"] == "quorum") != ("x-max-priority" in arguments)


def test_no_queue_takes_the_delayed_tasks_of_another() -> None:
    # Given native delayed delivery, which binds each queue with the key "#.NAME"
    names = [queue.routing_key for queue in celeryconfig.task_queues]
    assert all("." not in name for name in names)


def test_no_task_is_taken_back_by_rabbitmq() -> None:
    # Given the 30 minutes that RabbitMQ waits for an acknowledgement, and that a worker reserves as many
    # tasks of each queue as it has slots: one may wait for a whole time limit per other queue
    assert len(celeryconfig.task_queues) * celeryconfig.task_time_limit < 30 * 60


def test_each_setting_differs_from_celerys_default() -> None:
    same = {name for name in DEFAULTS if getattr(celeryconfig, name, object()) == DEFAULTS[name]}
    assert not same
    assert celeryconfig.accept_content == ["json"]  # the default is a tuple: what keeps pickle out stays


def python_in(folder: Path, code: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    """Run Python beside a copy of the three modules, so that a `.env` there is read."""
    for module in ("celeryconfig.py", "tasks.py", "run_tasks.py"):
        shutil.copy(PROJECT / module, folder)
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=clean_environment(PYTHON_DOTENV_DISABLED="0", **variables),
        check=False,
        capture_output=True,
        text=True,
        timeout=30,
    )


PRINT_URL = "import celeryconfig; print(celeryconfig.broker_url)"


def test_without_a_word_rabbitmq_is_on_this_machine(tmp_path: Path) -> None:
    assert python_in(tmp_path, PRINT_URL).stdout == "amqp://guest:guest@127.0.0.1:5672//\n"


def test_a_host_may_be_an_ipv6_address(tmp_path: Path) -> None:
    assert "@[::1]:5672" in python_in(tmp_path, PRINT_URL, RABBITMQ_HOST="::1").stdout


def test_the_environment_beats_the_env_file(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("RABBITMQ_USER=ada\nRABBITMQ_PASSWORD='p@s$/{word}'\nRABBITMQ_PORT=1\n")
    printed = python_in(tmp_path, PRINT_URL, RABBITMQ_PORT="5673").stdout
    assert printed == "amqp://ada:p%40s%24%2F%7Bword%7D@127.0.0.1:5673//\n"


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("RABBITMQ_PORT", "secret"),
        ("RABBITMQ_PORT", "70000"),
        ("RABBITMQ_PORT", "0"),
        ("CELERY_BROKER_URL", "memory://secret"),
        ("CELERY_BROKER_URL", "http://ada:secret@127.0.0.1"),
        ("CELERY_BROKER_URL", "secret"),
        ("CELERY_BROKER_URL", "amqp://ada:se/secret@127.0.0.1"),
        ("CELERY_BROKER_URL", "amqp://ada:secret@127.0.0.1:5672//;amqp://ada:secret@127.0.0.1:x//"),
    ],
)
@pytest.mark.parametrize("program", ["import run_tasks", "import tasks"])
def test_a_wrong_value_is_named_with_its_variable(
    tmp_path: Path, program: str, variable: str, value: str
) -> None:
    stopped = python_in(tmp_path, program, **{variable: value})
    assert stopped.returncode == 2
    cause, cure = stopped.stderr.splitlines()
    assert cause.startswith(variable)
    assert cure.startswith("Cure: ")
    assert "secret" not in stopped.stderr


@pytest.mark.parametrize("content", [b"RABBITMQ_USER=ada\nno assignment = here\n", b"\xff\xfe=1\n"])
def test_a_broken_env_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / ".env").write_bytes(content)
    stopped = python_in(tmp_path, "import tasks")
    assert (stopped.returncode, len(stopped.stderr.splitlines())) == (2, 2)
    assert str(tmp_path / ".env") in stopped.stderr


def test_the_example_names_every_variable() -> None:
    example = (PROJECT / ".env.example").read_text()
    read = (PROJECT / "celeryconfig.py").read_text() + (PROJECT / "docker-compose.yml").read_text()
    for name in ("USER", "PASSWORD", "HOST", "PORT", "UI_PORT", "BIND", "CA", "CERT", "KEY"):
        assert f"\n#RABBITMQ_{name}=" in example
        assert f"RABBITMQ_{name}" in read
    for name in ("BROKER_URL", "RESULT_BACKEND"):
        assert f"\n#CELERY_{name}=" in example


# --- The driver ---------------------------------------------------------------------------------
def test_the_list_names_every_lesson_in_order() -> None:
    listed = drive("--list").stdout.splitlines()
    assert [line.split()[0] for line in listed] == list(run_tasks.LESSONS)
    assert list(run_tasks.LESSONS) == [
        "hello",
        "parallel",
        "words",
        "workflows",
        "progress",
        "retries",
        "schedule",
        "failures",
        "priorities",
        "routing",
        "nodes",
        "bulk",
        "crash",
        "poison",
    ]


@pytest.mark.parametrize(
    ("arguments", "cause", "cure"),
    [
        (["retires"], "'retires'", "run_tasks.py retries"),
        (["words", "/no/such/file"], "'/no/such/file'", str(PROJECT)),
        (["--no-such-option"], "--no-such-option", "--help"),
    ],
)
def test_wrong_arguments_get_a_cause_and_a_cure(arguments: list[str], cause: str, cure: str) -> None:
    stopped = drive(*arguments)
    assert (stopped.returncode, stopped.stdout) == (2, "")
    lines = stopped.stderr.splitlines()
    assert len(lines) == 2
    assert cause in lines[0]
    assert cure in lines[1]


def test_a_table_has_a_heading_for_each_kind_of_row() -> None:
    rows: run_tasks.Rows = [{"word": "fish", "count": 2}, {"word": "sea", "count": 10}, {"s": 0.123}]
    assert list(run_tasks.table(rows)) == ["word  count", "fish  2", "sea   10", "s", "0.12"]


def test_text_is_cut_between_words_into_bounded_messages(tmp_path: Path) -> None:
    # Given small files, a large one, one that is not ASCII, and lines without an end
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
    skipped: list[Any] = []
    sent = list(run_tasks.messages(sorted(tmp_path.iterdir()), lambda *what: skipped.append(what)))
    # Then all words are there, and no message is too long
    counted = sum((Counter(tasks.count_words(text)) for text in sent), Counter())
    assert counted == sum((Counter(tasks.count_words(text)) for text in texts), Counter())
    assert max(len(text.encode()) for text in sent) < 64 * 1024
    assert not skipped


def test_what_is_no_text_is_skipped_and_named(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"GIF89a\0\1")
    (tmp_path / "endless").write_text("fish " * 4000 + "x" * 50_000)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / ".hidden").write_text("hidden")
    skipped: dict[str, str] = {}
    files = list(run_tasks.text_files([tmp_path], lambda error: pytest.fail(str(error))))
    texts = list(run_tasks.messages(files, lambda path, error: skipped.update({path.name: str(error)})))
    assert sorted(skipped) == ["binary", "dangling", "endless", "pipe"]
    assert "".join(texts).count("fish") == 4000
    assert "hidden" not in "".join(texts)


def test_the_readme_names_the_test_of_each_promise_and_each_fault() -> None:
    # Given the table of what was broken, with the names of tests in its last column
    chapter = (PROJECT / "README.md").read_text().split("### What was broken")[1].split("\n## ")[0]
    named = {name for row in re.findall(r"\|([^|]*)\|\n", chapter) for name in re.findall(r"`(\w+)`", row)}
    code = "".join(path.read_text() for path in (PROJECT / "tests").glob("test_*.py"))
    # Then each is there, and no fault is left out
    assert len(named) > 20
    assert named <= set(re.findall(r"\ndef (\w+)\(", code))
    faults = re.findall(r"\ndef (\w+)\(_?shop: Shop, _?nodes", (PROJECT / "tests/test_faults.py").read_text())
    assert len(faults) > 10
    assert set(faults) <= named


def test_the_benchmark_tells_medians_and_ratios() -> None:
    figures = {"tasks/s": {"this project": [100.0, 300.0, 200.0], "Celery, stock": [50.0, 100.0, 400.0]}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "FIGURES", figures)
        rows = benchmark.summary()
    assert [(row["median"], row["ratio"]) for row in rows] == [("200", "2.00"), ("100", "1.00")]
    assert rows[1]["lowest to highest"] == "50 to 400"
