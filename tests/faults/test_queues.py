"""Queues for long tasks, queues with a bound, and a broker URL whose first nodes are down."""

import re
from pathlib import Path

import pytest
from kombu import Connection
from programs import PATHS, celery, declare_queues, python, start_python

from reliable.rabbitmq_node import Node, free_port
from reliable.testing import Worker, depth, take, until

#: RabbitMQ waits five seconds for an acknowledgement, where 30 minutes are usual, and looks each second.
IMPATIENT = (
    "-rabbit consumer_timeout 5000 -rabbit channel_tick_interval 1000 -rabbit quorum_tick_interval 1000"
)
#: The same, with a time-out that suits the long task. Before RabbitMQ 3.12 a queue cannot have its own.
PATIENT = "-rabbit consumer_timeout 42000 -rabbit channel_tick_interval 1000"


def test_a_long_task_runs_once_on_a_queue_with_a_longer_time_out(tmp_path: Path) -> None:
    arguments = {"RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": IMPATIENT}
    if Node(tmp_path).control("-q", "version").split(".")[:2] < ["3", "12"]:
        arguments = {"RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": PATIENT}
    with (
        Node(tmp_path, **arguments) as node,
        Worker("apps.long", node.url, tmp_path, "-c1", **PATHS) as worker,
    ):
        code = "from apps.long import render; print(render.delay(12).get(timeout=60))"
        assert python("-c", code, CELERY_BROKER_URL=node.url).stdout == "rendered\n"
        assert worker.log.read_text().count("started\n") == 1


@pytest.mark.parametrize(
    ("app", "limit", "warnings"),
    [
        (
            "tasks",
            1800,
            ["default again after 1800 s, which is too soon for the time limit of 1800 s. ", "priority"],
        ),
        (
            "tasks",
            0,
            ["default again after 1800 s, which is too soon for tasks without a time limit. ", "priority"],
        ),
        (
            "apps.long",
            100,
            ["default", "long again after 160 s, which is too soon for the time limit of 100 s. "],
        ),
        (
            "apps.long",
            20,
            ["default again after 1800 s, which is too soon for the time limit of 5000 s of apps.long"],
        ),
    ],
    ids=["too long", "none", "longer than that of the queue", "of one task"],
)
def test_a_worker_warns_of_a_time_limit_that_rabbitmq_does_not_have(
    app: str, limit: int, warnings: list[str], fresh: str, tmp_path: Path
) -> None:
    with Worker(app, fresh, tmp_path, "-c1", f"task_time_limit={limit}", **PATHS) as worker:
        warned = re.findall(r"a task of the queue (.*)", worker.log.read_text())
        assert len(warned) == len(warnings)
        assert [line[: len(part)] for line, part in zip(sorted(warned), warnings, strict=True)] == warnings


def test_a_task_that_hangs_in_a_pool_without_time_limits_ends(tmp_path: Path) -> None:
    arguments = {"RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": IMPATIENT}
    with Node(tmp_path, **arguments) as node:
        worker = Worker("apps.deadly", node.url, tmp_path, "-P", "threads", "-c16", **PATHS).start()
        try:
            # Given a task that RabbitMQ delivers again and again, since it is never acknowledged
            code = (
                "from apps.deadly import hang\n"
                "print(type(hang.delay().get(timeout=100, propagate=False)).__name__)"
            )
            # Then its caller is told in the end, and it is a dead letter
            assert python("-c", code, CELERY_BROKER_URL=node.url).stdout == "WorkerLostError\n"
            (letter,) = take(node.url, "dead-letters")
            assert letter.headers["task"] == "apps.deadly.hang"
            assert "The thread pool has no time limits" in worker.log.read_text()
        finally:
            worker.kill()


def test_dead_letters_wait_while_their_queue_is_full(tmp_path: Path) -> None:
    # Given a RabbitMQ that tries again after a second, where three minutes are usual, and a bounded queue
    quick = "-rabbit dead_letter_worker_publisher_confirm_timeout 1000"
    with Node(tmp_path, RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS=quick) as node:
        bound = '{"max-length": 1, "overflow": "reject-publish"}'
        node.control("set_policy", "bound", "^(dead-letters|unrouted)$", bound)
        with Worker("tasks", node.url, tmp_path, "-c1", **PATHS):
            # When ten tasks fail
            code = (
                "import tasks\n"
                "for _ in range(10): tasks.ship.delay('sofa', 9e9).get(propagate=False, timeout=20)"
            )
            python("-c", code, CELERY_BROKER_URL=node.url).check_returncode()
            # Then not all fit in, and one after another comes as there is room
            until(lambda: depth(node.url, "dead-letters") > 0)
            assert depth(node.url, "dead-letters") < 10
            letters = take(node.url, "dead-letters", 10)
            assert {letter.headers["task"] for letter in letters} == {"tasks.ship"}


def test_a_message_is_refused_while_unrouted_is_full(fresh: str, session_node: Node) -> None:
    # Given a bounded queue
    bound, host = '{"max-length": 1, "overflow": "reject-publish"}', fresh.rpartition("/")[2]
    session_node.control("set_policy", "-p", host, "bound", "^unrouted$", bound)
    # When more comes than fits in, then the caller gets an error
    code = "import tasks\nwhile True: tasks.add.apply_async((1, 1), routing_key='nowhere')"
    assert "QueueFullError" in python("-c", code, CELERY_BROKER_URL=fresh).stderr
    assert depth(fresh, "unrouted") > 0


@pytest.mark.parametrize("name", ["dead-letters", "unrouted"])
def test_a_message_that_is_kept_may_be_returned_often(name: str, fresh: str, tmp_path: Path) -> None:
    # Given a dead letter, or a message that no binding matches
    declare_queues(fresh)
    with Connection(fresh) as connection:
        connection.Producer().publish("keep me", routing_key=name)
    # When it comes back to its queue more often than the default delivery limit of RabbitMQ 4, which is 20
    for _ in range(25):
        with Connection(fresh) as connection:
            until(lambda: connection.default_channel.basic_get(name))
    # Then it is still there
    take(fresh, name)


def test_temporary_queues_of_one_node_are_classic(session_node: Node, fresh: str, tmp_path: Path) -> None:
    with (
        Worker("tasks", fresh, tmp_path, "-c1", **PATHS),
        start_python(
            "-c",
            "import tasks; print(tasks.add.delay(2, 2).get(timeout=20), flush=True); input()",
            CELERY_BROKER_URL=fresh,
        ) as caller,
    ):
        # Given a worker, and a caller that has got a result
        assert caller.stdout
        assert caller.stdout.readline() == "4\n"
        kinds = session_node.queues("type", tmp_path.name)
        # Then their own queues are classic ones
        lasting = re.compile("default|dead-letters|unrouted|celery_delayed_.*")
        own = {kind for name, kind in kinds.items() if not lasting.fullmatch(name)}
        assert own == {"classic"}
        # And `celery inspect` leaves no queue
        for _ in range(3):
            celery(fresh, "inspect", "ping").check_returncode()
        until(lambda: session_node.queues("type", tmp_path.name).keys() <= kinds.keys())
        caller.communicate("\n", timeout=20)


def test_a_program_controls_workers_after_a_lost_connection(
    session_node: Node, fresh: str, tmp_path: Path
) -> None:
    code = (
        "import sys, tasks\n"
        "inspect = tasks.app.control.inspect(limit=1, timeout=10)\n"
        "for _ in sys.stdin: print(len(inspect.ping()), flush=True)"
    )
    with (
        Worker("tasks", fresh, tmp_path, "-c1", **PATHS) as worker,
        start_python("-c", code, CELERY_BROKER_URL=fresh) as program,
    ):
        assert program.stdin
        assert program.stdout
        for _ in range(2):
            program.stdin.write("\n")
            program.stdin.flush()
            assert program.stdout.readline() == "1\n"
            session_node.control("close_all_connections", "-p", tmp_path.name, "a test")
            worker.alive.unlink()
            until(worker.alive.exists)
        program.stdin.close()


def test_a_worker_waits_for_rabbitmq_for_as_long_as_it_takes(tmp_path: Path) -> None:
    url = f"amqp://127.0.0.1:{free_port()}//"
    log = tmp_path / "worker.log"
    command = ["-m", "celery", "-A", "tasks", "worker", "-c1", "--include", "apps.tireless", "-f", str(log)]
    with start_python(*command, CELERY_BROKER_URL=url) as worker:
        until(log.exists)
        # Celery's default is 100 attempts
        until(lambda: worker.poll() is not None or log.read_text().count("Cannot connect to") > 120)
        assert worker.poll() is None
        worker.kill()


def test_the_first_two_nodes_of_the_url_are_down(fresh: str, tmp_path: Path) -> None:
    down = [f"amqp://guest:guest@127.0.0.1:{free_port()}//" for _ in range(2)]
    url = ";".join([*down, fresh])
    with Worker("tasks", url, tmp_path, "-c1", **PATHS):
        code = (
            "from tasks import add, app; print([add.delay(n, 1).get(timeout=30) for n in range(3)])\n"
            "print(app.publish_in_bulk(add.s(n, 1) for n in range(3)))"
        )
        assert python("-c", code, CELERY_BROKER_URL=url).stdout == "[1, 2, 3]\n3\n"


def test_a_call_is_refused_while_the_node_of_its_classic_queue_is_down(cluster: list[Node]) -> None:
    # Given a classic queue, which lives on the node that a program connects to first
    url = ";".join(node.url for node in cluster)
    code = (
        "import tasks\n"
        "tasks.app.conf.broker_transport_options = {'read_timeout': 2}\n"  # RabbitMQ 4.3 does not answer
        "tasks.serve_customer.delay('Ada'); print('published')"
    )
    assert python("-c", code, CELERY_BROKER_URL=url).stdout == "published\n"
    # When that node is down
    cluster[0].kill()
    # Then a call is an error that a caller expects
    (*_, refused) = python("-c", code, CELERY_BROKER_URL=url).stderr.splitlines()
    assert refused.startswith(
        "kombu.exceptions.OperationalError: RabbitMQ did not accept tasks.serve_customer"
    )
