"""RabbitMQ nodes for tests: each on free ports of the loopback interface, with a data folder of its own."""

import contextlib
import itertools
import json
import os
import random
import shutil
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from amqp import InternalError
from kombu import Connection
from mirakuru import ProcessExitedWithError, TimeoutExpired
from mirakuru.base import Executor
from typing_extensions import Self


def clean_environment(**variables: str) -> dict[str, str]:
    """Return the environment without the variables of RabbitMQ and Celery, plus the given ones."""
    ours = ("CELERY_", "RABBITMQ_", "NO_COLOR")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return kept | {"PYTHON_DOTENV_DISABLED": "1"} | variables


def candidate_ports() -> Iterator[int]:
    """Yield ports endlessly. Two processes of pytest-xdist, which run side by side, never get the same one.

    All are below the range that the system assigns to clients. A client could take a port in that range
    before the test uses it.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    ports = list(range(10_000 + worker, 32_768, workers))
    random.SystemRandom().shuffle(ports)  # Whatever seed the tests have
    return itertools.cycle(ports)


PORTS = candidate_ports()


def free_port() -> int:
    """Return a port of the loopback interface that nothing listens on, and that was not returned before."""
    while True:
        port = next(PORTS)
        with contextlib.suppress(OSError), socket.socket() as free:
            free.bind(("127.0.0.1", port))
            return port


def rabbitmq_program(name: str) -> str:
    """Return the path of a RabbitMQ program. On Debian, bypass the wrapper, which insists on a user."""
    found = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")
    if not found:
        if os.environ.get("CI") == "true":
            pytest.fail(f"{name} is not on PATH, and CI must not skip the tests of RabbitMQ")
        pytest.skip(f"{name} is not on PATH")
    behind = Path("/usr/lib/rabbitmq/bin", name)
    return str(behind) if found == f"/usr/sbin/{name}" and behind.exists() else found


class Program(Executor):
    """A program whose output goes to a file."""

    def __init__(self, command: list[str], output: Path, **options: Any) -> None:
        super().__init__(command, **options)
        self.output_file = output

    @property
    def envvars(self) -> dict[str, str]:
        """Return the given environment, with mirakuru's own variable.

        By default, mirakuru also adds all of `os.environ`.
        """
        marked = super().envvars
        if not self._envvars:
            return marked
        return {name: marked[name] for name in marked if name in self._envvars or name not in os.environ}

    def pre_start_check(self) -> bool:
        """Return False: no other program is in the way."""
        return False

    def start(self) -> Self:
        """Start the program, and wait until it is ready.

        Raises:
            AssertionError: it ended, or is not ready in time. The text holds its logs.
        """
        with self.output_file.open("ab") as output:
            self._stdout = self._stderr = output
            try:
                return super().start()
            except (ProcessExitedWithError, TimeoutExpired) as error:
                logs = [path.read_text()[-3000:] for path in self.output_file.parent.rglob("*.log")]
                raise AssertionError("\n".join([str(error), *logs])) from None


class Node(Program):
    """A RabbitMQ node on free ports of the loopback interface, with its data in a folder of its own.

    Args:
        folder: where its data, configuration and logs go.
        plugins: the file `enabled_plugins`, in Erlang.
        name: the name of the node.
        variables: added to its environment.
    """

    def __init__(self, folder: Path, plugins: str = "[].", name: str | None = None, **variables: str) -> None:
        self.port, self.ui_port, self.metrics_port, distribution, epmd = (free_port() for _ in range(5))
        self.name = name or f"rabbit-{self.port}@localhost"
        self.url = f"amqp://guest:guest@127.0.0.1:{self.port}//"
        (folder / "plugins").write_text(plugins)
        self.configuration = folder / "rabbitmq.conf"
        self.configuration.write_text(
            f"listeners.tcp.1 = 127.0.0.1:{self.port}\n"
            f"management.tcp.port = {self.ui_port}\n"
            f"prometheus.tcp.port = {self.metrics_port}\n"
            "max_message_size = 16777216\n"  # Bytes: the default of RabbitMQ 4
        )
        self.environment = clean_environment(
            HOME=str(folder),
            ERL_EPMD_PORT=str(epmd),
            ERL_EPMD_ADDRESS="127.0.0.1",
            RABBITMQ_NODENAME=self.name,
            RABBITMQ_DIST_PORT=str(distribution),
            RABBITMQ_CONFIG_FILE=str(self.configuration),
            RABBITMQ_MNESIA_BASE=str(folder / "data"),
            RABBITMQ_LOG_BASE=str(folder / "log"),
            RABBITMQ_ENABLED_PLUGINS_FILE=str(folder / "plugins"),
        )
        self.environment |= variables
        command = [rabbitmq_program("rabbitmq-server")]
        super().__init__(command, folder / "output", envvars=self.environment, timeout=60)  # Seconds

    def start(self) -> Self:
        """Start the node. Start it once more if it hangs, as about one in fifty killed cluster nodes does.

        One reason: https://github.com/rabbitmq/rabbitmq-server/issues/6034
        """
        try:
            return super().start()
        except AssertionError:
            print(f"{self.name} hung while it started, and is started once more")
            return super().start()

    def after_start_check(self) -> bool:
        """Return whether a client can log in."""
        try:
            with Connection(self.url, connect_timeout=2) as connection:
                connection.connect()
        except (OSError, InternalError):  # InternalError: its virtual host is not up yet
            return False
        return True

    def control(self, *arguments: str) -> str:
        """Run rabbitmqctl, and return what it prints.

        Raises:
            AssertionError: it failed. The text holds its errors.
        """
        command = [rabbitmq_program("rabbitmqctl"), *arguments]
        # On a busy machine rabbitmqctl, like the node, may need more than Erlang's seven seconds to connect
        environment = self.environment | {"RABBITMQ_CTL_ERL_ARGS": "-kernel net_setuptime 60"}
        for _ in range(3):
            finished = subprocess.run(
                command, env=environment, check=False, capture_output=True, text=True, timeout=60
            )
            if "unable to perform an operation on node" not in finished.stderr:
                break
        assert finished.returncode == 0, finished.stdout + finished.stderr
        return finished.stdout

    def queues(self, column: str, host: str = "/") -> dict[str, Any]:
        """Return a column of `rabbitmqctl list_queues` by the name of the queue."""
        listed = self.control("-q", "list_queues", "-p", host, "name", column, "--formatter", "json")
        return {queue["name"]: queue[column] for queue in json.loads(listed)}

    def virtual_host(self, name: str) -> str:
        """Create a virtual host, and return its URL.

        A virtual host is as isolated as a new RabbitMQ, and faster to create.
        """
        everything = '<<".*">>, <<".*">>, <<".*">>'
        self.control(  # In one call, since each rabbitmqctl costs half a second of processor time
            "eval",
            f'rabbit_vhost:add(<<"{name}">>, <<"test">>), rabbit_auth_backend_internal:set_permissions('
            f'<<"guest">>, <<"{name}">>, {everything}, <<"test">>).',
        )
        return f"{self.url.removesuffix('/')}{name}"


@contextlib.contextmanager
def run_cluster(folder: Path, plugins: str = "[].") -> Iterator[list[Node]]:
    """Run three nodes that form a cluster.

    Raises:
        AssertionError: they do not.
    """
    shared = {"HOME": str(folder), "ERL_EPMD_PORT": str(free_port())}  # The cookie is in HOME
    nodes = []
    for number in range(3):
        name = f"rabbit{number + 1}"
        (folder / name).mkdir()
        nodes.append(Node(folder / name, plugins, f"{name}@localhost", **shared))
    (folder / ".erlang.cookie").write_text("cluster")
    (folder / ".erlang.cookie").chmod(0o600)
    formation = "cluster_formation.peer_discovery_backend = classic_config\n" + "".join(
        f"cluster_formation.classic_config.nodes.{number} = {node.name}\n"
        for number, node in enumerate(nodes)
    )
    for node in nodes[1:]:
        node.configuration.write_text(node.configuration.read_text() + formation)
    with ThreadPoolExecutor() as pool, contextlib.ExitStack() as running:
        for node in nodes:
            running.callback(node.kill)  # In a clean stop, the last ones would wait for the others
        nodes[0].start()  # If all looked for one another on a busy machine, one might stay alone
        list(pool.map(Node.start, nodes[1:]))
        status = json.loads(nodes[0].control("-q", "cluster_status", "--formatter", "json"))
        assert len(status["running_nodes"]) == len(nodes), status
        yield nodes
