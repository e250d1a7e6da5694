"""pytest fixtures: real RabbitMQ nodes, a cluster, and `celery worker` as a process.

    # conftest.py
    pytest_plugins = ["reliable.testing"]

`rabbitmq-server` must be on PATH. Where it is not, tests are skipped, or fail if the variable CI is "true".
The extra `[testing]` installs what this module needs.
"""

import secrets
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kombu import Connection, Queue
from typing_extensions import Self

from reliable.rabbitmq_node import Node, Program, clean_environment, run_cluster


def until(condition: Callable[[], Any], seconds: float = 30) -> Any:
    """Wait until a condition holds, and return its value.

    Raises:
        AssertionError: it does not hold within `seconds`.
    """
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {condition}"
        time.sleep(0.05)
    return value


class Worker(Program):
    """A real `celery worker`, with its log in a file.

    Args:
        app: what follows `-A`.
        url: the broker URL.
        folder: where the log goes; the worker runs in the current folder of the tests.
        arguments: further arguments of the command.
        variables: added to its environment.
    """

    def __init__(self, app: str, url: str, folder: Path, *arguments: str, **variables: str) -> None:
        self.app, self.name, self.url = app, "test@localhost", url
        self.environment = clean_environment(**{"CELERY_BROKER_URL": url} | variables)
        self.log = folder / "worker.log"
        #: The file that the worker touches while it consumes.
        self.alive = folder / f"alive-{secrets.token_hex(4)}"
        command = [sys.executable, "-m", "celery", "-A", app, "worker", "-linfo", "-n", self.name]
        command += ["--alive-file", str(self.alive), *arguments]
        super().__init__(command, self.log, envvars=self.environment, timeout=60)  # Seconds

    def start(self) -> Self:
        """Start the worker, and wait until it is ready."""
        self.alive.unlink(missing_ok=True)
        return super().start()

    def after_start_check(self) -> bool:
        """Return whether the worker consumes from its queues."""
        return self.alive.exists()


def depth(url: str, queue: str) -> int:
    """Return how many messages wait in a queue."""
    with Connection(url) as connection, connection.channel() as channel:
        return int(Queue(queue)(channel).queue_declare(passive=True).message_count)


def take(url: str, queue: str, number: int = 1) -> list[Any]:
    """Wait for messages of a queue, and take them out."""
    with Connection(url) as connection, connection.channel() as channel:
        messages = [until(lambda: Queue(queue)(channel).get()) for _ in range(number)]
        for message in messages:
            message.ack()
    return messages


@pytest.fixture(scope="session")
def session_node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """Run the node that is shared by all tests that do not break it."""
    with Node(tmp_path_factory.mktemp("rabbitmq")) as node:
        yield node


@pytest.fixture
def fresh(session_node: Node, tmp_path: Path) -> str:
    """Give the URL of a virtual host that nobody has used."""
    return session_node.virtual_host(tmp_path.name)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    """Run a node that the test may break."""
    with Node(tmp_path) as node:
        yield node


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[list[Node]]:
    """Run a cluster of three nodes that the test may break."""
    with run_cluster(tmp_path) as nodes:
        yield nodes
