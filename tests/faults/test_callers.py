"""Programs that call tasks: web servers, threads and greenlets. Each one gets its results."""

import contextlib
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from programs import PATHS, PROJECT, WebServer, python, start_python

from reliable.rabbitmq_node import Node, clean_environment
from reliable.testing import Worker, depth, until

pytestmark = pytest.mark.usefixtures("worker")


# --- Web servers --------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "arguments",
    [
        "-m gunicorn --workers 3 --bind 127.0.0.1:PORT apps.wsgi_page:page",
        "-m gunicorn --preload --workers 3 --bind 127.0.0.1:PORT apps.wsgi_page:page",
        "-m uvicorn --port PORT apps.asgi_page:page",
    ],
    ids=["gunicorn", "gunicorn --preload", "uvicorn"],
)
def test_a_web_server_gets_its_results(arguments: str, rabbitmq: str, tmp_path: Path) -> None:
    with WebServer(tmp_path, arguments, "0", CELERY_BROKER_URL=rabbitmq) as server:
        check(server)


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("flask_page", "-m flask --app flask_page run --reload --port PORT"),
        ("django_page", "-m django runserver --settings django_page 127.0.0.1:PORT"),
    ],
    ids=["Flask", "Django"],
)
def test_a_development_server_gets_its_results(
    module: str, arguments: str, rabbitmq: str, tmp_path: Path
) -> None:
    # Given a server with a thread for each request
    file = Path(shutil.copy(PROJECT / "tests" / "apps" / f"{module}.py", tmp_path))
    with WebServer(tmp_path, arguments, "0", CELERY_BROKER_URL=rabbitmq) as server:
        check(server)
        # When it loads a changed file, then it still does
        file.write_text(file.read_text().replace("VERSION = 1", "VERSION = 2"))
        until(lambda: is_version_2(server))
        check(server)


def is_version_2(server: WebServer) -> bool:
    """Return whether a server has loaded the changed file. It closes connections while it does."""
    with contextlib.suppress(OSError):
        return server.get("version") == "2"
    return False


def check(server: WebServer) -> None:
    """Check that requests at the same time get their own results, also when a worker process is killed."""
    with ThreadPoolExecutor(4) as pool:
        label = pool.submit(server.get, "label")
        assert list(pool.map(server.get, range(30))) == [str(number + 1) for number in range(30)]
        assert label.result() == "printed"


# --- Threads and greenlets ----------------------------------------------------------------------
def test_threads_one_after_another_get_their_results_over_the_same_connections(rabbitmq: str) -> None:
    code = """
import threading, psutil, tasks
sums, connections = [], []
for number in range(40):
    call = lambda: sums.append(tasks.add.delay(number, 1).get(timeout=5))
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    connections.append(len(psutil.Process().net_connections()))
print(sums == list(range(1, 41)), connections[0] == connections[-1])
"""
    assert python("-c", code, CELERY_BROKER_URL=rabbitmq).stdout == "True True\n"


def test_a_thread_gets_the_result_of_another_threads_call(rabbitmq: str) -> None:
    code = """
from concurrent.futures import ThreadPoolExecutor
import tasks
get = lambda id: tasks.app.AsyncResult(id).get(timeout=5)
id_of_call = lambda: tasks.add.delay(1, 1).id
with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as second:
    print(second.submit(get, first.submit(id_of_call).result()).result())
    print(first.submit(get, second.submit(id_of_call).result()).result())
    print(get(first.submit(id_of_call).result()))
"""
    assert python("-c", code, CELERY_BROKER_URL=rabbitmq).stdout == "2\n2\n2\n"


def test_a_thread_that_waits_does_not_keep_others_from_asking(rabbitmq: str) -> None:
    # Given a thread that waits for a slow task
    code = """
from concurrent.futures import ThreadPoolExecutor
import tasks
with ThreadPoolExecutor(1) as pool:
    waits = pool.submit(tasks.send_email.delay("Ada", 4).get, timeout=20)
    result = tasks.add.delay(1, 1)
    while not result.ready(): pass
    for _ in range(20): result.ready(), result.state, tasks.app.AsyncResult("unknown").state
    print(result.get(timeout=5), waits.done(), waits.result())
"""
    # Then another one asks dozens of times before the task ends
    assert python("-c", code, CELERY_BROKER_URL=rabbitmq).stdout == "2 False sent to Ada\n"


@pytest.mark.parametrize(
    ("patch", "pool"),
    [
        ("import gevent.monkey, gevent.pool; gevent.monkey.patch_all()", "gevent.pool.Pool"),
        ("import eventlet; eventlet.monkey_patch()", "eventlet.GreenPool"),
    ],
    ids=["gevent", "eventlet"],
)
def test_greenlets_get_their_results(patch: str, pool: str, rabbitmq: str) -> None:
    code = f"""
{patch}
import tasks
call = lambda number: tasks.add.delay(number, 1).get(timeout=5)
print(call(0), call(1), call(2), *{pool}(5).imap(call, range(3, 30)))
"""
    finished = python("-c", code, CELERY_BROKER_URL=rabbitmq)
    assert finished.stdout.split() == [str(number) for number in range(1, 31)], finished.stderr


# --- Acknowledging results ----------------------------------------------------------------------
def test_results_are_acknowledged_in_groups_and_none_is_lost(rabbitmq: str) -> None:
    # Given a caller that has read 50 results, of which the last ten are not acknowledged
    code = """
import tasks
consumer = tasks.app.backend.result_consumer
results = [tasks.add.delay(number, 0) for number in range(50)]
print(sum(result.get(timeout=5) for result in results), consumer.unacknowledged)
late = tasks.add.delay(1, 1)
consumer._connection.connection.transport.sock.shutdown(2)
print(late.get(timeout=5), sum(result.get() for result in results), consumer.unacknowledged)
"""
    # When its connection is lost, then it gets the next result after those ten
    assert python("-c", code, CELERY_BROKER_URL=rabbitmq).stdout == "1225 10\n2 1225 11\n"


# --- A connection that went silent --------------------------------------------------------------
class Firewall:
    """A TCP proxy that forgets its connections, and drops what comes over them, without a word."""

    def __init__(self, host: str, port: int) -> None:
        self.target, self.forgotten = (host, port), set[socket.socket]()
        self.server = socket.create_server(("127.0.0.1", 0))
        self.port, self.connections = self.server.getsockname()[1], list[socket.socket]()
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        """Connect each client with the target."""
        while True:
            try:
                client, _ = self.server.accept()
            except OSError:
                return
            target = socket.create_connection(self.target)
            self.connections += [client, target]
            for pair in ((client, target), (target, client)):
                threading.Thread(target=self.copy, args=pair, daemon=True).start()

    def copy(self, source: socket.socket, sink: socket.socket) -> None:
        """Pass on what comes."""
        try:
            while data := source.recv(65536):
                if source not in self.forgotten:
                    sink.sendall(data)
        except OSError:
            pass

    def forget(self) -> None:
        """Drop what comes over the connections of now."""
        self.forgotten.update(self.connections)

    def close(self) -> None:
        """Close all connections."""
        for connection in (self.server, *self.connections):
            connection.close()


@pytest.fixture
def firewall(rabbitmq: str) -> Iterator[Firewall]:
    """Run a firewall between a caller and RabbitMQ."""
    where = urlsplit(rabbitmq)
    firewall = Firewall(where.hostname or "", where.port or 5672)
    yield firewall
    firewall.close()


def test_a_result_comes_after_a_connection_went_silent(
    rabbitmq: str, firewall: Firewall, worker: Worker
) -> None:
    # Given a caller and a RabbitMQ that notice silence after seconds
    code = """
import tasks
tasks.app.conf.broker_heartbeat = 1
tasks.app.conf.broker_transport_options |= {"read_timeout": 2}
print(tasks.add.delay(1, 1).get(timeout=5))
result = tasks.send_email.delay("Ada", 1)
print("called")
input()
print(result.get(timeout=50))
print(tasks.add.delay(1, 2).get(timeout=50))
"""
    url = rabbitmq.replace(str(urlsplit(rabbitmq).port), str(firewall.port))
    with start_python("-c", code, CELERY_BROKER_URL=url) as caller:
        assert caller.stdout
        assert [caller.stdout.readline() for _ in range(2)] == ["2\n", "called\n"]
        # When its connections go silent before a result comes
        firewall.forget()
        # Then it gets that result, and others
        assert caller.communicate("\n", timeout=60)[0] == "sent to Ada\n3\n"


# --- Beat, which keeps one producer -------------------------------------------------------------
def test_beat_goes_on_after_rabbitmq_was_down(node: Node, tmp_path: Path) -> None:
    # Given a beat whose task sends its result
    schedule = '{"add": {"task": "tasks.add", "args": (1, 1), "schedule": 0.5}}'
    (tmp_path / "often.py").write_text(f"from tasks import app\napp.conf.beat_schedule = {schedule}\n")
    command = [sys.executable, "-m", "celery", "-A", "often", "beat", "-s", str(tmp_path / "schedule")]
    environment = clean_environment(CELERY_BROKER_URL=node.url, **PATHS)
    log = tmp_path / "beat.log"
    with (
        log.open("w") as output,
        subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=output) as beat,
    ):
        try:
            until(lambda: node.queues("messages").get("default"))
            # When RabbitMQ is down for so long that publishing fails
            node.stop()
            until(lambda: "did not accept" in log.read_text())
            node.start()
            # Then beat publishes again
            before = depth(node.url, "default")
            until(lambda: depth(node.url, "default") > before)
        finally:
            beat.terminate()


# --- asyncio ------------------------------------------------------------------------------------
def test_five_hundred_coroutines_get_their_results(node: Node, tmp_path: Path) -> None:
    # Given coroutines of which some have called their tasks
    with (
        Worker("tasks", node.url, tmp_path, "-c2", **PATHS),
        start_python("-m", "apps.awaiting", "500", CELERY_BROKER_URL=node.url) as caller,
    ):
        assert caller.stdout
        for _ in range(100):
            assert caller.stdout.readline() == "called\n"
        # When RabbitMQ restarts
        node.stop()
        node.start()
        # Then each of them gets its result, the event loop was never blocked, and waiting can end early
        printed = [line.rstrip() for line in caller.stdout if line != "called\n"]
        assert printed == ["True True", "CancelledError", "TimeoutError", "sent to Ada"]


def test_a_coroutine_that_waits_does_not_keep_threads_from_asking(rabbitmq: str) -> None:
    # Given a coroutine that waits for a slow task
    code = """
import asyncio
from reliable.aio import aget
from tasks import add, send_email

def ask(): return [add.delay(number, 1).get(timeout=20) for number in range(40)]

async def main():
    waiting = asyncio.create_task(aget(send_email.delay("Ada", 8), timeout=20))
    await asyncio.sleep(0.2)
    print(sum(await asyncio.to_thread(ask)), waiting.done(), await waiting)

asyncio.run(main())
"""
    # Then a thread has dozens of results before the task ends
    assert python("-c", code, CELERY_BROKER_URL=rabbitmq).stdout == "820 False sent to Ada\n"


def test_a_coroutine_does_not_wait_for_a_result_that_is_ignored(rabbitmq: str) -> None:
    code = """
import asyncio
from reliable.aio import aget
from tasks import check_price
print(asyncio.run(aget(check_price.delay(1), timeout=5)))
"""
    assert python("-c", code, CELERY_BROKER_URL=rabbitmq).stdout == "None\n"


def test_coroutines_get_their_results_though_a_callback_of_a_thread_fails(rabbitmq: str) -> None:
    # Given a coroutine that waits, and a thread whose `on_message` fails
    code = """
import asyncio
from reliable.aio import aget
from tasks import add, send_email

def fail(message): raise ValueError
def wait_in_a_thread(): add.delay(1, 1).get(timeout=2, on_message=fail)

async def main():
    waiting = asyncio.create_task(aget(send_email.delay("Ada", 1), timeout=20))
    await asyncio.sleep(0.2)
    try: await asyncio.to_thread(wait_in_a_thread)
    except Exception: pass
    print(await waiting, await aget(add.delay(1, 2), timeout=20))

asyncio.run(main())
"""
    # Then it gets its result, and so do others
    assert python("-c", code, CELERY_BROKER_URL=rabbitmq).stdout == "sent to Ada 3\n"
