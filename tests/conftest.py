"""What the tests share: real RabbitMQ nodes, workers and drivers, each a process of its own."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from kombu import Connection, Queue
from mirakuru import TimeoutExpired
from mirakuru.base import Executor
from typing_extensions import Self

os.environ["PYTHON_DOTENV_DISABLED"] = "1"  # before the project is imported: its .env is the user's own
PROJECT = Path(__file__).parent.parent
SCRATCH = tempfile.TemporaryDirectory(prefix="celery-rabbitmq-tests-")  # for what the programs leave behind
VARIABLES = ("CELERY_", "RABBITMQ_", "NO_COLOR")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option of test_browser.py."""
    parser.addoption("--pictures", action="store_true", help="take the pictures of the README (docs/)")


def clean_environment(**variables: str) -> dict[str, str]:
    """Return the environment without what would change where the project looks for RabbitMQ."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(VARIABLES)}
    return kept | {"TMPDIR": SCRATCH.name} | variables


def until(condition: Callable[[], Any], seconds: float = 30) -> Any:
    """Wait until a condition holds, and return its value; fail after so many seconds."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {condition}"
        time.sleep(0.05)
    return value


def free_port() -> int:
    """Return a port of the loopback interface that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def rabbitmq_program(name: str) -> str:
    """Return a program of RabbitMQ: of Debian's own the one behind its wrapper, which insists on a user."""
    found = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")  # where Debian has it
    if not found:
        if os.environ.get("CI") == "true":
            pytest.fail(f"{name} is not on PATH, and CI must not skip the tests of RabbitMQ")
        pytest.skip(f"{name} is not on PATH: tests/run installs it")
    behind = Path("/usr/lib/rabbitmq/bin", name)
    return str(behind) if found == f"/usr/sbin/{name}" and behind.exists() else found


class Program(Executor):
    """A program with its output in a file."""

    def __init__(self, command: list[str], output: Path, **options: Any) -> None:
        super().__init__(command, **options)
        self.output_file = output

    def pre_start_check(self) -> bool:
        """Tell that no other program can be in the way: its ports and its name are its own."""
        return False

    def start(self) -> Self:
        """Start the program, and wait until it is ready."""
        with self.output_file.open("ab") as output:
            self._stdout = self._stderr = output
            try:
                return super().start()
            except TimeoutExpired as error:
                logs = [path.read_text()[-3000:] for path in self.output_file.parent.rglob("*.log")]
                raise AssertionError("\n".join([str(error), *logs])) from None


class Node(Program):
    """A RabbitMQ node on free ports of the loopback interface, with its data in a folder of its own."""

    def __init__(self, folder: Path, plugins: str = "[].", **variables: str) -> None:
        self.port, self.ui_port, metrics, distribution, epmd = (free_port() for _ in range(5))
        self.name = f"test-{self.port}@localhost"
        self.url = f"amqp://guest:guest@127.0.0.1:{self.port}//"
        (folder / "plugins").write_text(plugins)
        self.configuration = folder / "rabbitmq.conf"
        self.configuration.write_text(
            f"listeners.tcp.1 = 127.0.0.1:{self.port}\n"
            f"management.tcp.port = {self.ui_port}\n"
            f"prometheus.tcp.port = {metrics}\n"
            "max_message_size = 16777216\n"  # bytes: what RabbitMQ 4 has by default
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
        super().__init__(command, folder / "output", envvars=self.environment, timeout=60)  # seconds

    def start(self) -> Self:
        """Start the node; once more if it hangs, as one killed node of a cluster in some fifty does.

        On RabbitMQ 3.10, 4.0 and 4.3: https://github.com/rabbitmq/rabbitmq-server/issues/6034 is one reason.
        """
        try:
            return super().start()
        except AssertionError:
            print(f"{self.name} hangs as it starts: it is started once more")
            return super().start()

    def after_start_check(self) -> bool:
        """Tell whether a client can log in."""
        try:
            with Connection(self.url, connect_timeout=2) as connection:
                connection.connect()
        except OSError:
            return False
        return True

    def control(self, *arguments: str) -> str:
        """Run rabbitmqctl, and return what it prints."""
        command = [rabbitmq_program("rabbitmqctl"), *arguments]
        return subprocess.run(
            command, env=self.environment, check=True, capture_output=True, text=True, timeout=60
        ).stdout

    def queues(self, column: str, host: str = "/") -> dict[str, Any]:
        """Return what `rabbitmqctl list_queues` says in a column of each queue, by the queue's name."""
        listed = self.control("-q", "list_queues", "-p", host, "name", column, "--formatter", "json")
        return {queue["name"]: queue[column] for queue in json.loads(listed)}


class Worker(Program):
    """A real `celery -A tasks worker`, known by its name, with its log in a file."""

    def __init__(self, url: str, folder: Path, *arguments: str, **variables: str) -> None:
        self.name, self.url = "test@localhost", url
        command = [sys.executable, "-m", "celery", "-A", "tasks", "worker", "-linfo", "-n", self.name]
        super().__init__(
            [*command, *arguments],
            folder / "worker.log",
            cwd=str(PROJECT),
            envvars=clean_environment(**{"CELERY_BROKER_URL": url, "PYTHONPATH": str(PROJECT)} | variables),
            timeout=30,
        )

    def after_start_check(self) -> bool:
        """Tell whether the worker consumes from its queues."""
        return celery(self.url, "inspect", "active_queues", "-d", self.name, "-t", "0.5").returncode == 0


def python(*arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    """Run Python to its end in the project's folder, in the environment of these variables."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=PROJECT,
        env=clean_environment(**variables),
        check=False,
        capture_output=True,
        text=True,
        timeout=110,
    )


def celery(url: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run the `celery` command line to its end."""
    return python("-m", "celery", "-A", "tasks", *arguments, CELERY_BROKER_URL=url)


def drive(*arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    """Run the driver to its end, as a user does."""
    return python("run_tasks.py", *arguments, **variables)


def outcomes(finished: "subprocess.CompletedProcess[str]") -> dict[str, dict[str, Any]]:
    """Return what `--json` printed, by lesson."""
    lessons = [json.loads(line) for line in finished.stdout.splitlines()]
    return {lesson["lesson"]: lesson for lesson in lessons}


def take(url: str, queue: Queue, number: int = 1) -> list[Any]:
    """Wait for messages of a queue, and take them out."""
    with Connection(url) as connection, connection.channel() as channel:
        messages = [until(queue(channel).get) for _ in range(number)]
        for message in messages:
            message.ack()
    return messages


def depth(url: str, queue: str) -> int:
    """Return how many messages wait in a queue."""
    with Connection(url) as connection, connection.channel() as channel:
        declared: Any = Queue(queue)(channel).queue_declare(passive=True)
        return int(declared.message_count)


def is_empty(url: str, queue: str) -> bool:
    """Tell whether no message waits in a queue."""
    return depth(url, queue) == 0


@pytest.fixture(scope="session")
def session_node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """Run the node that all tests share which do not break it."""
    with Node(tmp_path_factory.mktemp("rabbitmq")) as node:
        yield node


@pytest.fixture(scope="session")
def rabbitmq(request: pytest.FixtureRequest) -> str:
    """Give the URL of RabbitMQ: the one in CELERY_BROKER_URL, or that of a node for this session."""
    return os.environ.get("CELERY_BROKER_URL") or str(request.getfixturevalue("session_node").url)


@pytest.fixture
def fresh(session_node: Node, tmp_path: Path) -> str:
    """Give the URL of a virtual host that nobody has used: as good as a new RabbitMQ, and sooner there."""
    session_node.control("add_vhost", tmp_path.name)
    session_node.control("set_permissions", "-p", tmp_path.name, "guest", ".*", ".*", ".*")
    return f"{session_node.url.removesuffix('/')}{tmp_path.name}"


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    """Run a node that the test may break."""
    with Node(tmp_path) as node:
        yield node


@contextlib.contextmanager
def cluster_in(folder: Path, plugins: str = "[].") -> Iterator[list[Node]]:
    """Run three nodes that are one cluster."""
    shared = {"HOME": str(folder), "ERL_EPMD_PORT": str(free_port())}  # the cookie is in HOME
    nodes = []
    for number in range(3):
        (folder / f"node{number}").mkdir()
        nodes.append(Node(folder / f"node{number}", plugins, **shared))
    (folder / ".erlang.cookie").write_text("cluster")
    (folder / ".erlang.cookie").chmod(0o600)
    formation = "cluster_formation.peer_discovery_backend = classic_config\n" + "".join(
        f"cluster_formation.classic_config.nodes.{number} = {node.name}\n"
        for number, node in enumerate(nodes)
    )
    for node in nodes:
        node.configuration.write_text(node.configuration.read_text() + formation)
    with ThreadPoolExecutor() as pool, contextlib.ExitStack() as running:
        for started in pool.map(Node.start, nodes):
            running.callback(started.stop)
        yield nodes


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[list[Node]]:
    """Run three nodes that are one cluster, and that the test may break."""
    with cluster_in(tmp_path) as nodes:
        yield nodes


@pytest.fixture(scope="session")
def worker(rabbitmq: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """Run one worker of four processes for all tests that do not break it."""
    with Worker(rabbitmq, tmp_path_factory.mktemp("worker"), "-c4") as worker:
        yield worker


@pytest.fixture(scope="session")
def shop(rabbitmq: str) -> Iterator[Any]:
    """Give the module `tasks`, as a program that publishes to the RabbitMQ of this session."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CELERY_BROKER_URL", rabbitmq)
        import tasks  # noqa: PLC0415  (it reads the variable when it is imported)

        yield tasks
        with contextlib.suppress(AttributeError):  # nothing was asked for
            consumer: Any = tasks.app.backend
            consumer.result_consumer.stop()
        tasks.app.close()
