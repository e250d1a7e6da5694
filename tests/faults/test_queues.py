"""Queues for long tasks, queues with a bound, and a broker URL whose first nodes are down."""

from pathlib import Path

from programs import PATHS, python

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


def test_dead_letters_wait_while_their_queue_is_full(session_node: Node, fresh: str, tmp_path: Path) -> None:
    # Given an operator who bounds the queue by a policy
    policy = ("-p", tmp_path.name, "bound", "^(dead-letters|unrouted)$")
    session_node.control("set_policy", *policy, '{"max-length": 1, "overflow": "reject-publish"}')
    with Worker("tasks", fresh, tmp_path, "-c1", **PATHS):
        # When three tasks fail
        code = (
            "import tasks\nfor _ in range(3): tasks.ship.delay('sofa', 9e9).get(propagate=False, timeout=20)"
        )
        python("-c", code, CELERY_BROKER_URL=fresh).check_returncode()
        # Then one after another comes as there is room
        until(lambda: depth(fresh, "dead-letters") == 1)
        assert [letter.headers["task"] for letter in take(fresh, "dead-letters", 3)] == 3 * ["tasks.ship"]


def test_the_first_two_nodes_of_the_url_are_down(fresh: str, tmp_path: Path) -> None:
    down = [f"amqp://guest:guest@127.0.0.1:{free_port()}//" for _ in range(2)]
    url = ";".join([*down, fresh])
    with Worker("tasks", url, tmp_path, "-c1", **PATHS):
        code = "from tasks import add; print([add.delay(n, 1).get(timeout=30) for n in range(3)])"
        assert python("-c", code, CELERY_BROKER_URL=url).stdout == "[1, 2, 3]\n"
