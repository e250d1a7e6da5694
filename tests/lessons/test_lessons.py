"""The third shelf: a real RabbitMQ, real workers, beat, and the driver as a user runs it."""

import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from amqp import NotFound
from kombu import Connection, Exchange, Queue
from kombu.exceptions import OperationalError
from programs import PATHS, PROJECT, celery, drive, outcomes, python, start_python, what_is_wrong

import run_tasks
from reliable.rabbitmq_node import Node, clean_environment, free_port
from reliable.testing import Worker, depth, take, until


def is_empty(url: str, queue: str) -> bool:
    """Return whether no message waits in a queue."""
    return depth(url, queue) == 0


@pytest.fixture(autouse=True)
def _nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Check after each test that no queue of the session's RabbitMQ holds a message."""
    yield
    if "rabbitmq" in request.fixturenames:
        url = request.getfixturevalue("rabbitmq")
        for name in ("default", "priority", "dead-letters", "unrouted"):
            with contextlib.suppress(NotFound):  # no queue, no message
                until(partial(is_empty, url, name), 20)


def workers_of(url: str) -> list[int]:
    """Return the processes of `celery worker` that run with this broker; there may be others."""
    return [
        process.pid
        for process in psutil.process_iter(["cmdline", "environ"])
        if "worker" in (process.info["cmdline"] or ())
        and (process.info["environ"] or {}).get("CELERY_BROKER_URL") == url
    ]


# --- The lessons --------------------------------------------------------------------------------
def test_all_lessons_run_with_a_worker_of_the_driver(fresh: str) -> None:
    # Given a fresh RabbitMQ and no worker
    # When the driver runs
    finished = drive("--json", CELERY_BROKER_URL=fresh)
    # Then every lesson passes, and the worker that it started is gone
    lessons = outcomes(finished)
    assert {name: lesson["reason"] for name, lesson in lessons.items() if lesson["status"] != "passed"} == {}
    assert finished.returncode == 0
    assert len(lessons) == 13
    assert "a worker of our own" in finished.stderr
    assert "guest:guest" not in finished.stdout + finished.stderr
    assert not workers_of(fresh)


def test_all_lessons_run_with_the_workers_that_are_there(rabbitmq: str, worker: Worker) -> None:
    finished = drive("--json", CELERY_BROKER_URL=rabbitmq)
    lessons = outcomes(finished)
    assert {name: lesson["reason"] for name, lesson in lessons.items() if lesson["status"] != "passed"} == {}
    assert "with its workers" in finished.stderr
    assert lessons["hello"]["result"][1]["result"] == worker.name
    assert len(lessons["nodes"]["result"]) == 2


def test_the_output_fits_80_columns_and_no_lesson_uses_what_rabbitmq_deprecates(
    node: Node, tmp_path: Path
) -> None:
    finished = drive(*run_tasks.LESSONS, CELERY_BROKER_URL=node.url)
    assert finished.returncode == 0
    assert [line for line in finished.stdout.splitlines() if len(line) > 80] == []
    logged = "".join(path.read_text() for path in (tmp_path / "log").iterdir())
    assert "Server startup complete" in logged
    assert "deprecated" not in logged.lower()
    if "list_deprecated_features" in node.control("help"):  # from RabbitMQ 3.12 on
        in_use = node.control("-q", "list_deprecated_features", "--used", "name", "--formatter", "json")
        assert json.loads(in_use) == []


def test_a_poison_message_ends_with_its_caller_and_as_a_dead_letter(rabbitmq: str, worker: Worker) -> None:
    finished = drive("--json", "poison", CELERY_BROKER_URL=rabbitmq)
    (row,) = outcomes(finished)["poison"]["result"]
    assert (row["crashes"], row["error"], row["dead letter"]) == (4, "WorkerLostError", "rejected")


def test_the_words_of_a_real_folder(rabbitmq: str, worker: Worker) -> None:
    # Given the Python files of this project and of a library
    folders = [PROJECT / "tests", Path(json.__file__).parent]
    files = [path for folder in folders for path in folder.rglob("*") if path.suffix in (".py", "")]
    text = "\n".join(path.read_text(errors="replace") for path in files if path.is_file())
    # When the driver has them counted
    arguments = [argument for folder in folders for argument in ("--path", str(folder))]
    counted = drive("--json", "words", *arguments, CELERY_BROKER_URL=rabbitmq)
    # Then Counter counts the same
    rows = outcomes(counted)["words"]["result"]
    from tasks import count_words  # noqa: PLC0415

    expected: Counter[str] = Counter(count_words(text))
    assert next(row["words"] for row in rows if "words" in row) == expected.total()
    assert all(expected[row["word"]] == row["count"] for row in rows if "word" in row)


@pytest.mark.parametrize("pool", ["threads", "solo"])
def test_no_lesson_kills_a_worker_without_processes(fresh: str, tmp_path: Path, pool: str) -> None:
    with Worker("tasks", fresh, tmp_path, "-P", pool, "-c2", **PATHS) as worker:
        finished = drive("--json", "hello", "failures", "crash", "poison", CELERY_BROKER_URL=fresh)
        status = {name: lesson["status"] for name, lesson in outcomes(finished).items()}
        assert status == {"hello": "passed", "failures": "passed", "crash": "skipped", "poison": "skipped"}
        assert worker.running()
        drive("--json", "failures", CELERY_BROKER_URL=fresh)


def test_beat_publishes_its_periodic_task(rabbitmq: str, worker: Worker, shop: Any, tmp_path: Path) -> None:
    def reports() -> int:
        stats = shop.app.control.inspect([worker.name], limit=1).stats() or {}
        return int(stats.get(worker.name, {}).get("total", {}).get("tasks.report_stock", 0))

    # Given how many reports the worker has made
    before = reports()
    # When beat runs beside it
    command = [sys.executable, "-m", "celery", "-A", "tasks", "beat", "-s", str(tmp_path / "schedule")]
    environment = clean_environment(CELERY_BROKER_URL=rabbitmq, **PATHS)
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL) as beat:
        # Then it makes one more
        try:
            until(lambda: reports() > before, 40)
        finally:
            beat.terminate()


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_leaves_no_worker(fresh: str, sign: signal.Signals) -> None:
    with start_python("run_tasks.py", "parallel", CELERY_BROKER_URL=fresh) as process:
        assert process.stdout
        assert "a worker of our own" in process.stdout.readline()
        assert workers_of(fresh)
        process.send_signal(sign)
        sent = time.monotonic()
        _, errors = process.communicate(timeout=30)
    assert time.monotonic() - sent < 3  # of the 4.5 s that the lesson takes
    assert process.returncode == -sign
    assert "Traceback" not in errors
    until(lambda: not workers_of(fresh), 5)


# --- What is wrong around the driver ------------------------------------------------------------
def test_a_broker_that_is_named_and_down() -> None:
    started = time.monotonic()
    url = f"amqp://ada:secret@127.0.0.1:{free_port()}//"
    assert "Cannot connect to RabbitMQ" in what_is_wrong(drive("hello", CELERY_BROKER_URL=url))
    assert "Cannot connect to RabbitMQ" in what_is_wrong(drive("hello", RABBITMQ_HOST="no-such-host.invalid"))
    assert time.monotonic() - started < 10  # five seconds each


def test_a_port_that_never_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(30)
        url = f"amqp://ada:secret@127.0.0.1:{silent.getsockname()[1]}//"
        with start_python("run_tasks.py", "hello", CELERY_BROKER_URL=url) as driver:
            for _attempt in range(2):
                connection, _ = silent.accept()
                started = time.monotonic()
                with connection:
                    while connection.recv(100):
                        pass
                assert time.monotonic() - started < 3  # Celery waits for four seconds
            output, errors = driver.communicate(timeout=30)
        silent.setblocking(False)
        with pytest.raises(BlockingIOError):  # There was no third attempt
            silent.accept()
    ended = subprocess.CompletedProcess(driver.args, driver.returncode, output, errors)
    assert "Cannot connect to RabbitMQ" in what_is_wrong(ended)


def test_a_wrong_password_and_a_wrong_virtual_host(rabbitmq: str) -> None:
    wrong_password = rabbitmq.replace("guest:guest@", "guest:secret@")
    refused = what_is_wrong(drive("hello", CELERY_BROKER_URL=wrong_password))
    assert "refuses this user, its password or its rights" in refused
    wrong_host = rabbitmq.removesuffix("/") + "no-such-vhost"
    assert "no-such-vhost" in what_is_wrong(drive("hello", CELERY_BROKER_URL=wrong_host))
    # And a worker ends, with the same words
    for url in wrong_password, wrong_host:
        ended = celery(url, "worker", "-lwarning", "-Psolo")
        assert ended.returncode == 2, ended.stderr
        assert "Fix: correct the user, password and virtual host" in ended.stderr
        assert "Traceback" not in ended.stderr


def test_an_argument_that_quorum_queues_do_not_have(fresh: str) -> None:
    stopped = celery(fresh, "worker", "-lwarning", "-Psolo", "task_queue_max_priority=3")
    assert stopped.returncode == 2
    assert "Fix: remove it from the queue" in stopped.stderr


def test_a_queue_with_other_arguments(fresh: str, tmp_path: Path) -> None:
    # Given a queue of the name of ours, as an older version of this project might have made it
    with Connection(fresh) as connection:
        Queue("default")(connection.channel()).declare()
    # Then the driver names it and the cure, and a worker does not start
    cause = what_is_wrong(drive("hello", CELERY_BROKER_URL=fresh))
    assert "inequivalent arg" in cause
    assert "'default'" in cause
    stopped = celery(fresh, "worker", "-lwarning", "-Psolo")
    assert stopped.returncode != 0
    assert "amqp queue.delete" in stopped.stderr
    # And the cure works
    assert celery(fresh, "amqp", "queue.delete", "default").returncode == 0
    assert drive("hello", CELERY_BROKER_URL=fresh).returncode == 0
    # Likewise for an exchange
    assert celery(fresh, "amqp", "exchange.delete", "tasks", "no").returncode == 0
    with Connection(fresh) as connection:
        Exchange("tasks", "direct")(connection.channel()).declare()
    assert "exchange 'tasks'" in what_is_wrong(drive("hello", CELERY_BROKER_URL=fresh))
    assert celery(fresh, "amqp", "exchange.delete", "tasks", "no").returncode == 0
    assert drive("routing", CELERY_BROKER_URL=fresh).returncode == 0


def test_a_worker_that_never_answers(fresh: str, tmp_path: Path) -> None:
    # Given a worker that does not consume from the queue of the lesson
    with Worker("tasks", fresh, tmp_path, "-Q", "priority", "-c1", **PATHS):
        code = "import run_tasks; run_tasks.TIMEOUT = 2; run_tasks.main()"
        waited = python("-c", code, "hello", CELERY_BROKER_URL=fresh)
        assert what_is_wrong(waited).startswith("No worker answered")


def test_a_broker_that_dies_during_a_lesson(node: Node, tmp_path: Path) -> None:
    with Worker("tasks", node.url, tmp_path, "-c1", **PATHS):
        with start_python("run_tasks.py", "parallel", CELERY_BROKER_URL=node.url) as process:
            assert process.stdout
            process.stdout.readline()
            node.kill()
            _, errors = process.communicate(timeout=60)
        assert process.returncode == 2
        assert "Traceback" not in errors
        assert errors.splitlines()[-1].startswith("Fix: ")


def test_a_broker_that_blocks_publishers(node: Node, tmp_path: Path) -> None:
    # Given a RabbitMQ that believes to be out of memory
    with Worker("tasks", node.url, tmp_path, "-c1", **PATHS):
        node.control("set_vm_memory_high_watermark", "0.000001")
        with start_python("run_tasks.py", "hello", CELERY_BROKER_URL=node.url) as process:
            # Then the driver says so, and goes on when it is over
            assert process.stderr
            assert process.stderr.readline().startswith("RabbitMQ accepts no messages")
            node.control("set_vm_memory_high_watermark", "0.4")
            process.communicate(timeout=60)
        assert process.returncode == 0


def test_an_error_of_a_task_is_not_mistaken_for_one_of_rabbitmq() -> None:
    # Given a task that loses a connection of its own
    code = (
        "import run_tasks, tasks\n"
        "def lose_a_connection(x, y): raise ConnectionError('the bank is away')\n"
        "tasks.add.run = lose_a_connection\n"
        "run_tasks.main()"
    )
    # Then its lesson fails, and the others run
    failed = python("-c", code, "--embedded", "hello", "progress")
    assert failed.returncode == 1
    assert "failed: expected a result, got ConnectionError('the bank is away')" in failed.stdout
    assert "1 failed, 1 passed" in failed.stdout


# --- Apps of other people -----------------------------------------------------------------------
def test_an_app_with_another_name_shared_tasks_and_spawned_processes(fresh: str, tmp_path: Path) -> None:
    with Worker("apps.other", fresh, tmp_path, "-c1", **PATHS):
        code = (
            "from apps.other import app\n"
            "from apps.shared import crash_once, double\n"
            "print(double.delay(2).get(timeout=20), crash_once.delay().get(timeout=40))"
        )
        assert python("-c", code, CELERY_BROKER_URL=fresh).stdout == "4 1\n"


# --- What makes the tasks safe ------------------------------------------------------------------
def test_the_topology_is_there_before_any_worker(fresh: str) -> None:
    # Given a RabbitMQ that has never seen a worker
    code = "import tasks; tasks.remind.apply_async(('Ada',), countdown=2, ignore_result=True)"
    python("-c", code, CELERY_BROKER_URL=fresh).check_returncode()
    # When a delayed task is published, then it arrives
    until(lambda: depth(fresh, "default") == 1, 10)


@pytest.mark.parametrize(
    "delay",
    [{"countdown": 0.2}, {"countdown": 0}, {"countdown": 1.5}, {"eta": 0.4}, {"eta": 1.0}, {"eta": -5}],
)
def test_no_delay_is_too_short(worker: Worker, shop: Any, delay: dict[str, float]) -> None:
    options: dict[str, Any] = dict(delay)
    started = time.time()
    if "eta" in options:
        options["eta"] = datetime.now(timezone.utc) + timedelta(seconds=options["eta"])
    ran = shop.remind.apply_async(("Ada",), **options).get(timeout=10)
    assert ran - started >= max(delay.values()) - 0.01


def test_a_misspelt_queue_is_an_error(rabbitmq: str, shop: Any) -> None:
    with pytest.raises(Exception, match="defualt"):
        shop.add.apply_async((1, 2), queue="defualt")


def test_a_message_that_no_binding_matches_is_kept(rabbitmq: str, shop: Any) -> None:
    shop.app.declare_topology_once()
    with shop.app.producer_or_acquire() as producer:
        producer.publish({"any": "thing"}, exchange="tasks", routing_key="nowhere")
    (message,) = take(rabbitmq, "unrouted")
    assert message.payload == {"any": "thing"}


@pytest.mark.parametrize(
    ("body", "properties"),
    [
        (b"not json", {"content_type": "application/json", "headers": {"task": "tasks.add", "id": "1"}}),
        (b"\x80\x04N.", {"content_type": "application/x-python-serialize", "headers": {"task": "tasks.add"}}),
        (
            b"[[], {}, {}]",
            {"content_type": "application/json", "headers": {"task": "tasks.no_such", "id": "1"}},
        ),
        (b'{"no": "headers"}', {"content_type": "application/json"}),
        (
            b"[[1, 1], {}, {}]",
            {
                "content_type": "application/json",
                "headers": {"task": "tasks.add", "id": "1", "_get_custom_headers": 5},
            },
        ),
    ],
    ids=["not JSON", "pickle", "unknown task", "no headers", "a header with the name of a method"],
)
def test_a_message_that_is_no_task_becomes_a_dead_letter(
    rabbitmq: str, worker: Worker, shop: Any, body: bytes, properties: dict[str, Any]
) -> None:
    with shop.app.producer_or_acquire() as producer:
        producer.publish(
            body, exchange="tasks", routing_key="default", content_encoding="binary", **properties
        )
    (letter,) = take(rabbitmq, "dead-letters")
    assert bytes(letter.body if isinstance(letter.body, bytes) else letter.body.encode()) == body
    assert letter.headers["x-death"][0]["reason"] == "rejected"
    assert shop.add.delay(1, 2).get(timeout=10) == 3  # and the worker goes on


def test_failures_and_chords_with_a_file_backend(fresh: str, tmp_path: Path) -> None:
    variables = {"CELERY_BROKER_URL": fresh, "CELERY_RESULT_BACKEND": f"file://{tmp_path}"}
    lessons = outcomes(drive("--json", "workflows", "failures", "retries", **variables))
    assert [lesson["status"] for lesson in lessons.values()] == ["passed", "passed", "skipped"]
    assert lessons["workflows"]["result"][-1]["result"] == 9000


def test_a_user_who_may_not_declare(session_node: Node) -> None:
    session_node.control("add_user", "reader", "secret")
    session_node.control("set_permissions", "reader", "^$", ".*", ".*")
    url = session_node.url.replace("guest:guest", "reader:secret")
    assert "refuses this user, its password or its rights: Exchange.declare" in what_is_wrong(
        drive("hello", CELERY_BROKER_URL=url)
    )


# --- What makes a worker quick ------------------------------------------------------------------
def test_acknowledgements_go_in_groups_and_none_is_forgotten(
    fresh: str, session_node: Node, tmp_path: Path
) -> None:
    def unacknowledged() -> int:
        return int(session_node.queues("messages_unacknowledged", tmp_path.name)["default"])

    def run_ten_tasks() -> None:
        code = "from tasks import add; print(sum(add.delay(n, 0).get(timeout=20) for n in range(10)))"
        assert python("-c", code, CELERY_BROKER_URL=fresh).stdout == "45\n"

    # Given a worker that prefetches 32 tasks, so that it sends acknowledgements by sixteens, or each minute
    arguments = ("-c1", "--prefetch-multiplier", "32", "--include", "apps.patient")
    with Worker("tasks", fresh, tmp_path, *arguments, **PATHS):
        # When it has run ten tasks, RabbitMQ waits
        run_ten_tasks()
        until(lambda: unacknowledged() == 10)
        # When it has run ten more, only for the last four
        run_ten_tasks()
        until(lambda: unacknowledged() == 4)
        # When it is stopped in good order
    # Then RabbitMQ has them all
    until(lambda: unacknowledged() == 0)
    assert depth(fresh, "default") == 0


# --- Publishing in bulk -------------------------------------------------------------------------
def test_bulk_publishing_takes_chains_and_sends_events(worker: Worker, shop: Any, rabbitmq: str) -> None:
    code = (
        "import tasks\n"
        "tasks.app.conf.task_send_sent_event = True\n"
        "chain = tasks.add.s(1, 1) | tasks.add.s(1)\n"
        "result = chain.freeze()\n"
        "print(tasks.app.publish_in_bulk([chain, tasks.check_price.s(1)]), result.get(timeout=20))"
    )
    assert python("-c", code, CELERY_BROKER_URL=rabbitmq).stdout == "2 3\n"


def test_bulk_publishing_publishes_each_task_once(fresh: str) -> None:
    # Given no worker, and more tasks than fit the window
    code = (
        "import tasks\n"
        "print(tasks.app.publish_in_bulk((tasks.check_price.s(i) for i in range(2_345)), window=100))\n"
        "print(tasks.app.publish_in_bulk([]))"
    )
    printed = python("-c", code, CELERY_BROKER_URL=fresh)
    printed.check_returncode()
    assert printed.stdout == "2345\n0\n"
    assert depth(fresh, "default") == 2345


def test_bulk_publishing_publishes_what_a_call_does(fresh: str) -> None:
    # Given calls with options of each kind, and a program that listens to Celery's signals
    code = (
        "import tasks\n"
        "from celery import chain, signals\n"
        "sent = []\n"
        "def note(sender, exchange, routing_key, headers, **_): sent.append((sender, headers['id']))\n"
        "signals.before_task_publish.connect(note)\n"
        "signals.after_task_publish.connect(note)\n"
        "add, ada = tasks.add, tasks.serve_customer.s('Ada')\n"
        "calls = [add.s(1, 2), add.s(1, y=2), add.s(1, 2).set(ignore_result=True, expires=60, shadow='x'),\n"
        "    add.s(1, 2).set(countdown=1), add.s(1, 2).set(queue='priority'), ada.set(priority=9),\n"
        "    add.s(1, 2).set(link=[add.s(3)], link_error=[add.si(0, 0)], time_limit=5, headers={'a': 'b'}),\n"
        "    chain(add.s(1, 1), add.s(2)), tasks.check_price.s(1)]\n"
        "for number, call in enumerate(calls): call.set(task_id=f'id-{number}').freeze(f'id-{number}')\n"
        "for call in calls: call.apply_async()\n"
        "one_by_one, sent = sent, []\n"
        "tasks.app.publish_in_bulk(calls)\n"
        "print(sent == one_by_one and len(sent) == 2 * len(calls))"
    )
    printed = python("-c", code, CELERY_BROKER_URL=fresh)
    assert printed.stdout == "True\n", printed.stderr
    # Then each message is there twice, the same but for its time
    seen: dict[str, list[Any]] = {}
    for queue, number in (("default", 14), ("priority", 4)):
        for message in take(fresh, queue, number):
            same = {
                name: value
                for name, value in message.headers.items()
                if name not in ("eta", "expires", "origin", "x-death")
            }
            where = {name: message.delivery_info[name] for name in ("exchange", "routing_key")}
            properties = {
                name: value for name, value in message.properties.items() if name != "application_headers"
            }
            seen.setdefault(message.headers["id"], []).append((same, where, properties, message.body))
    assert len(seen) == 9
    for first, second in seen.values():
        assert first == second


def test_bulk_publishing_takes_no_more_memory_for_more_tasks(fresh: str) -> None:
    code = (
        "import resource, tasks\n"
        "for number in (5_000, 20_000):\n"
        "    tasks.app.publish_in_bulk(tasks.check_price.s(i) for i in range(number))\n"
        "    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    finished = python("-c", code, CELERY_BROKER_URL=fresh)
    assert finished.returncode == 0, finished.stderr
    first, second = map(int, finished.stdout.split())
    assert second - first < 2048  # KiB; 15,000 more tasks would take over ten times as much


def test_results_of_tasks_that_were_published_in_bulk(fresh: str, tmp_path: Path) -> None:
    code = (
        "import tasks\n"
        "calls = [tasks.add.s(number, 1) for number in range(500)]\n"
        "results = [call.freeze() for call in calls]\n"
        "tasks.app.publish_in_bulk(calls, window=50)\n"
        "print([result.get(timeout=30) for result in results] == list(range(1, 501)))"
    )
    with Worker("tasks", fresh, tmp_path, "-c2", **PATHS):
        assert python("-c", code, CELERY_BROKER_URL=fresh).stdout == "True\n"


def test_bulk_publishing_tells_of_a_refused_task(fresh: str) -> None:
    # Given a queue that takes ten messages and refuses more
    code = (
        "import tasks\n"
        "from kombu.exceptions import OperationalError\n"
        "tasks.app.conf.task_queues[0].queue_arguments['x-max-length'] = 10\n"
        "try:\n"
        "    tasks.app.publish_in_bulk(tasks.check_price.s(i) for i in range(500))\n"
        "except OperationalError as error:\n"
        "    print(error)\n"
    )
    printed = python("-c", code, CELERY_BROKER_URL=fresh)
    printed.check_returncode()
    assert "refused" in printed.stdout
    assert "tasks.check_price" in printed.stdout


def test_bulk_publishing_tells_of_a_lost_connection(node: Node) -> None:
    # Given a broker that dies while a caller hands over tasks without end
    code = (
        "import itertools, tasks\n"
        "from kombu.exceptions import OperationalError\n"
        "def endless():\n"
        "    for number in itertools.count():\n"
        "        if number == 1500: print('on the way', flush=True)\n"
        "        yield tasks.check_price.s(number)\n"
        "try:\n"
        "    tasks.app.publish_in_bulk(endless())\n"
        "except OperationalError as error:\n"
        "    print(error)\n"
    )
    with start_python("-c", code, CELERY_BROKER_URL=node.url) as publisher:
        assert publisher.stdout
        assert publisher.stdout.readline() == "on the way\n"
        node.kill()
        # Then the caller is told which task is the first that may be lost
        told_of, _ = publisher.communicate(timeout=30)
    assert "; the first is tasks.check_price(" in told_of


def test_publishing_to_a_broker_that_is_down_fails_soon(node: Node) -> None:
    node.stop()
    code = "import tasks; tasks.add.delay(1, 2)"
    started = time.monotonic()
    failed = python("-c", code, CELERY_BROKER_URL=node.url)
    assert OperationalError.__name__ in failed.stderr
    assert time.monotonic() - started < 15
