"""Break a part under load, and look at what is left: no task that was accepted may be lost.

A publisher hands over 1,000 tasks, each of which writes its number to a ledger on disk, and asks for
their results. In the middle of it something dies. Afterwards every accepted task stands in the ledger,
every result has arrived, and no queue holds a message. A publish that raised an error is the
publisher's to repeat: it is counted as refused. `-s` shows what each fault did.
"""

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
from kombu import Connection
from programs import PATHS, celery, python, start_python

from reliable.rabbitmq_node import Node, clean_environment
from reliable.testing import Worker, depth, take, until

TASKS = 1000
pytestmark = pytest.mark.timeout(400)  # seconds


class Shop:
    """A publisher and a worker at work, on a broker and with a ledger of their own."""

    #: The program that publishes, and what it is called in the output.
    module, load = "apps.ledger", "tasks"

    def __init__(self, url: str, folder: Path, *arguments: str) -> None:
        self.url, self.folder, self.ledger, self.arguments = url, folder, folder / "ledger", arguments
        self.variables = {**PATHS, "LEDGER": str(self.ledger)}

    def start_worker(self) -> None:
        """Start a worker of four processes; the one before, if any, is left to itself."""
        arguments = ("-c4", "--include", "apps.ledger", *self.arguments)
        self.worker = Worker("tasks", self.url, self.folder, *arguments, **self.variables)
        self.worker.start()

    def lines(self) -> list[tuple[int, float]]:
        """Return each number of the ledger, with the time when it was written."""
        text = self.ledger.read_text() if self.ledger.exists() else ""
        return [
            (int(line.split()[0]), float(line.split()[1])) for line in text.rpartition("\n")[0].splitlines()
        ]

    def done(self) -> Counter[int]:
        """Return how often each number stands in the ledger."""
        return Counter(number for number, _ in self.lines())

    def publisher(self) -> list[str]:
        """Return what the publisher has printed: at each attempt, how many were accepted by then."""
        return (self.folder / "publisher").read_text().splitlines()

    def after(self, number: int) -> None:
        """Wait until so many tasks have run."""
        until(lambda: len(self.done()) >= number, 120)

    def run(self, code: str) -> str:
        """Run Python code that uses the ledger, and return what it prints."""
        code = f"from apps import ledger\n{code}"
        finished = python("-c", code, CELERY_BROKER_URL=self.url, **self.variables)
        assert finished.returncode == 0, finished.stderr
        return finished.stdout

    def pause(self) -> float:
        """Return the longest time without a task, in seconds: how long the fault stopped the work."""
        times = sorted(at for _, at in self.lines())
        return max(later - earlier for earlier, later in pairwise(times))


def everything(pid: int) -> list[psutil.Process]:
    """Return a process and all that come from it."""
    return [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]


def end(worker: Worker, sign: signal.Signals, timeout: float = 40) -> None:
    """Send a worker's main process a signal, and wait until it is gone, for so many seconds at most."""
    assert worker.process
    worker.process.send_signal(sign)
    until(lambda: worker.process is None or worker.process.poll() is not None, timeout)


# --- Workers ------------------------------------------------------------------------------------
def pool_processes_are_killed(shop: Shop, _nodes: list[Node]) -> None:
    """Kill ten processes of the pool, one after another."""
    assert shop.worker.process
    killed: list[psutil.Process] = []
    for kill in range(10):
        shop.after(100 + 50 * kill)
        children = psutil.Process(shop.worker.process.pid).children()
        living = [child for child in children if child not in killed]
        killed.append(living[kill % len(living)])
        killed[-1].kill()


def the_worker_is_killed(shop: Shop, _nodes: list[Node]) -> None:
    """Kill the worker with all its processes, and start another of the same name."""
    shop.after(200)
    shop.worker.kill()
    shop.start_worker()


def the_worker_is_stopped(shop: Shop, _nodes: list[Node]) -> None:
    """Stop the worker in good order, which finishes what it has begun, and start another."""
    shop.after(200)
    end(shop.worker, signal.SIGTERM)
    shop.start_worker()


def the_worker_freezes(shop: Shop, _nodes: list[Node]) -> None:
    """Stop the worker's processes dead, so that RabbitMQ still holds its connection, and start another."""
    shop.after(200)
    frozen = shop.worker
    assert frozen.process
    for process in everything(frozen.process.pid):
        process.suspend()
    shop.start_worker()
    shop.after(TASKS)
    frozen.kill()


def tasks_hang(shop: Shop, _nodes: list[Node]) -> None:
    """Put four tasks over their hard time limit between the others: each becomes a dead letter."""
    shop.after(200)
    code = (
        "for result in [ledger.hang.delay() for _ in range(4)]:\n"
        "    try: result.get(timeout=60)\n"
        "    except Exception as error: print(type(error).__name__)\n"
    )
    assert shop.run(code).splitlines() == 4 * ["TimeLimitExceeded"]
    letters = take(shop.url, "dead-letters", 4)
    assert [letter.headers["task"] for letter in letters] == 4 * ["apps.ledger.hang"]


def nothing_happens(shop: Shop, _nodes: list[Node]) -> None:
    """Leave it to the arguments of the worker."""


# --- RabbitMQ -----------------------------------------------------------------------------------
def connections_are_closed(shop: Shop, nodes: list[Node]) -> None:
    """Close every connection, as an administrator may."""
    for number in (100, 300):
        shop.after(number)
        nodes[0].control("close_all_connections", "a test")


def rabbitmq_is_restarted(shop: Shop, nodes: list[Node]) -> None:
    """Stop RabbitMQ in good order, and start it again."""
    shop.after(200)
    nodes[0].stop()
    nodes[0].start()


def rabbitmq_is_killed(shop: Shop, nodes: list[Node]) -> None:
    """Kill RabbitMQ, and start it again on its data."""
    shop.after(200)
    nodes[0].kill()
    nodes[0].start()


def rabbitmq_freezes(shop: Shop, nodes: list[Node]) -> None:
    """Stop RabbitMQ dead for 20 seconds: its connections stay open, and are silent."""
    shop.after(200)
    assert nodes[0].process
    frozen = everything(nodes[0].process.pid)
    for process in frozen:
        process.suspend()
    time.sleep(20)  # this is the fault
    for process in frozen:
        process.resume()


def nothing_is_accepted(shop: Shop) -> bool:
    """Tell whether no task was accepted within three seconds."""
    before = shop.publisher()[-1]
    time.sleep(3)
    return shop.publisher()[-1] == before


def memory_runs_out(shop: Shop, nodes: list[Node]) -> None:
    """Let RabbitMQ run out of memory, as it believes: it blocks all who publish."""
    shop.after(200)
    nodes[0].control("set_vm_memory_high_watermark", "0.000001")
    until(lambda: nothing_is_accepted(shop))
    nodes[0].control("set_vm_memory_high_watermark", "0.4")


def the_disk_is_full(shop: Shop, nodes: list[Node]) -> None:
    """Let RabbitMQ run out of disk space, as it believes: it blocks all who publish."""
    shop.after(200)
    nodes[0].control("set_disk_free_limit", "1000000GB")
    until(lambda: nothing_is_accepted(shop))
    nodes[0].control("set_disk_free_limit", "50MB")


def the_queue_is_full(shop: Shop, nodes: list[Node]) -> None:
    """Let nobody consume from a queue of limited length: what exceeds it is refused."""
    shop.after(200)
    nodes[0].control("set_policy", "limit", "^default$", '{"max-length": 50}', "--apply-to", "queues")
    celery(shop.url, "control", "cancel_consumer", "default").check_returncode()
    until(lambda: shop.publisher()[-1:] == shop.publisher()[-5:-4], 60)  # the last of them were refused
    celery(shop.url, "control", "add_consumer", "default").check_returncode()
    nodes[0].control("clear_policy", "limit")


# --- A cluster ----------------------------------------------------------------------------------
def leader(node: Node, nodes: list[Node]) -> Node:
    """Return the node of a cluster that leads the queue `default`, as another node sees it."""
    name = node.queues("leader")["default"]
    return next(node for node in nodes if node.name == name)


def leaders_are_killed(shop: Shop, nodes: list[Node]) -> None:
    """Kill the node that leads the work queue; when it is back, the next one."""
    asked = nodes[0]
    for number in (200, 500):
        shop.after(number)
        dead = leader(asked, nodes)
        dead.kill()
        shop.after(number + 150)
        dead.start()
        asked = dead
    # The classic queue lived on the first of them; the worker went on without it, and is back at it
    assert "The queue priority is out of reach" in (shop.folder / "worker.log").read_text()
    shop.run("import tasks; tasks.serve_customer.delay('Ada').get(timeout=60)")


def two_of_three_are_killed(shop: Shop, nodes: list[Node]) -> None:
    """Kill two nodes, so that no majority is left: nothing is accepted until one of them is back."""
    shop.after(200)
    for node in nodes[:2]:
        node.kill()
    until(lambda: nothing_is_accepted(shop))
    time.sleep(12)  # This is the fault: a pause of 15 seconds, longer than a publish is tried
    nodes[0].start()
    shop.after(400)
    nodes[1].start()


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """Run a node for the faults that it recovers from."""
    with Node(tmp_path_factory.mktemp("node")) as node:
        yield node


def messages(url: str, node: Node) -> dict[str, int]:
    """Return how many messages each queue of a virtual host holds, if any.

    Left out is the reply queue of the publisher, named like "8-4-4-4-12" hexadecimal digits: it has ended,
    and a task that ran again may have sent its result again.
    """
    queues = node.queues("messages", url.rpartition("/")[2] or "/")
    return {name: int(number) for name, number in queues.items() if int(number) and name.count("-") != 4}


# --- What is left -------------------------------------------------------------------------------
Fault = Callable[[Shop, list[Node]], None]


def break_under_load(
    fault: Fault, shop: Shop, nodes: list[Node], pace: float = 0, tasks: int = TASKS
) -> None:
    """Let a fault happen while a publisher and a worker are at work, and check what is left."""
    # Given a worker and a publisher under load
    shop.start_worker()
    command = [sys.executable, "-m", shop.module, str(tasks), str(pace)]
    environment = clean_environment(CELERY_BROKER_URL=shop.url, **shop.variables)
    try:
        with (
            (shop.folder / "publisher").open("w") as output,
            subprocess.Popen(command, env=environment, stdout=output) as publisher,
        ):
            try:
                # When something dies
                fault(shop, nodes)
                assert publisher.wait(timeout=240) == 0
            finally:
                publisher.kill()
        # Then each task that was accepted has run, at least once, and its result has come
        told = json.loads(shop.publisher()[-1])
        until(lambda: set(told["accepted"]) <= set(shop.done()), 60)
        assert told["wrong"] == []
        # And no queue holds a message
        try:
            until(lambda: not messages(shop.url, nodes[0]), 20)
        except AssertionError:
            left = messages(shop.url, nodes[0])
            raise AssertionError(f"not empty: {left}; refused: {told['refused']}") from None
        accepted, refused = len(told["accepted"]), len(told["refused"])
        again = sum(count - 1 for count in shop.done().values())
        name = " ".join((fault.__name__, *shop.arguments))
        print(
            f"{name}: {accepted} {shop.load} accepted, {refused} refused, {again} ran again, "
            f"longest pause {shop.pause():.1f} s"
        )
        assert accepted > 200
    finally:
        shop.worker.kill()


@pytest.mark.parametrize(
    ("fault", "arguments"),
    [
        (pool_processes_are_killed, ""),
        (the_worker_is_killed, ""),
        (the_worker_is_killed, "--pool threads"),
        (the_worker_is_killed, "--pool solo"),
        (the_worker_is_killed, "--prefetch-multiplier 32"),
        (the_worker_is_stopped, ""),
        (the_worker_is_stopped, "--prefetch-multiplier 32"),
        (the_worker_freezes, ""),
        (tasks_hang, ""),
        (nothing_happens, "--max-tasks-per-child 20"),
        (nothing_happens, "--max-memory-per-child 1"),  # KiB: each process is replaced after each task
    ],
)
def test_nothing_is_lost_with_a_worker_when(
    fault: Fault, arguments: str, fresh: str, session_node: Node, tmp_path: Path
) -> None:
    # A process that is replaced after each task costs a tenth of a second of processor time
    tasks = 300 if "--max-memory-per-child" in arguments else TASKS
    break_under_load(fault, Shop(fresh, tmp_path, *arguments.split()), [session_node], tasks=tasks)


class ShopWithChords(Shop):
    """The same with a hundred chords of ten tasks. Each body gets the result of each of its tasks."""

    module, load = "apps.chords", "chords"


@pytest.mark.parametrize("fault", [pool_processes_are_killed, the_worker_is_killed])
def test_no_chord_is_lost_with_a_worker_when(
    fault: Fault, fresh: str, session_node: Node, tmp_path: Path
) -> None:
    break_under_load(fault, ShopWithChords(fresh, tmp_path), [session_node])


@pytest.mark.parametrize(("sign", "repeated"), [(signal.SIGTERM, 0), (signal.SIGKILL, 4)])
def test_a_container_that_is_stopped_loses_nothing(
    fresh: str, tmp_path: Path, sign: signal.Signals, repeated: int
) -> None:
    # Given a worker of four processes, each of which has begun one of ten tasks
    shop = Shop(fresh, tmp_path)
    shop.run("for number in range(10): ledger.note_and_linger.apply_async((number,), ignore_result=True)")
    shop.start_worker()
    try:
        shop.after(4)
        # When its container stops it, or kills it at the end of the grace period
        end(shop.worker, sign)
        # Then another one runs the rest, and only what was killed a second time
        shop.start_worker()
        until(lambda: shop.done().total() == 10 + repeated, 60)
        end(shop.worker, signal.SIGTERM)
        assert sorted(shop.done()) == list(range(10))
        assert shop.done().total() == 10 + repeated
    finally:
        shop.worker.kill()


def test_a_worker_that_is_stopped_under_load_ends_at_once_and_repeats_nothing(
    fresh: str, tmp_path: Path
) -> None:
    # Given a long queue of short tasks
    shop = Shop(fresh, tmp_path)
    shop.run("ledger.app.publish_in_bulk(ledger.note.s(number, 0) for number in range(4000))")
    try:
        for stop in range(1, 6):
            # When a worker is stopped while it runs them
            shop.start_worker()
            shop.after(300 * stop)
            end(shop.worker, signal.SIGTERM, 20)
            # Then each task that has run is acknowledged
            left = depth(fresh, "default")
            assert shop.done().total() + left == 4000
    finally:
        shop.worker.kill()


def test_a_soft_shutdown_hands_back_what_it_can_not_finish(fresh: str, tmp_path: Path) -> None:
    # Given a worker that runs a task of a minute
    shop = Shop(fresh, tmp_path)
    shop.start_worker()
    try:
        with subprocess.Popen(
            [sys.executable, "-c", "from apps import ledger; print(ledger.linger.delay().get(timeout=60))"],
            env=clean_environment(CELERY_BROKER_URL=fresh, **shop.variables),
            stdout=subprocess.PIPE,
            text=True,
        ) as caller:
            until(lambda: "ledger.linger" in celery(fresh, "inspect", "active").stdout)
            # When it is told to hurry, and ends after worker_soft_shutdown_timeout
            end(shop.worker, signal.SIGQUIT)
            # Then the next worker gets the task
            shop.start_worker()
            assert caller.communicate(timeout=60)[0] == "finished\n"
    finally:
        shop.worker.kill()


@pytest.mark.parametrize(
    ("fault", "arguments"),
    [
        (connections_are_closed, ""),
        (connections_are_closed, "--pool threads"),
        (connections_are_closed, "--pool solo"),
        (connections_are_closed, "--prefetch-multiplier 32"),
        (rabbitmq_is_restarted, ""),
        (rabbitmq_is_killed, ""),
        (rabbitmq_freezes, ""),
        (memory_runs_out, ""),
        (the_disk_is_full, ""),
        (the_queue_is_full, ""),
    ],
)
def test_nothing_is_lost_with_rabbitmq_when(fault: Fault, arguments: str, node: Node, tmp_path: Path) -> None:
    # The pace (seconds): else the publisher may be through before the fault is there
    break_under_load(fault, Shop(node.url, tmp_path, *arguments.split()), [node], pace=0.02)


def test_no_chord_is_lost_when_rabbitmq_is_killed(node: Node, tmp_path: Path) -> None:
    break_under_load(rabbitmq_is_killed, ShopWithChords(node.url, tmp_path), [node], pace=0.2)


def test_no_chord_is_lost_in_a_cluster_when_leaders_are_killed(cluster: list[Node], tmp_path: Path) -> None:
    if cluster[0].control("-q", "version").startswith("3."):
        pytest.skip("RabbitMQ 3.10 sometimes keeps the consumer of a node that has died and is back")
    shop = ShopWithChords(";".join(node.url for node in cluster), tmp_path)
    break_under_load(leaders_are_killed, shop, cluster, pace=0.3)


BEGIN_A_CHORD = """
    group = str(uuid.uuid4())
    app.backend.apply_chord((group, []), {})
    queue = app.backend.chord_queue(group).name
"""
BEGIN_A_PROGRAM = """
    callers.append(caller := Celery(broker=app.conf.broker_url, backend="rpc://", set_as_current=False))
    with caller.producer_or_acquire() as producer, producer.connection._reraise_as_library_errors():
        caller.backend.on_task_call(producer, "1")
    queue = caller.oid
"""


@pytest.mark.parametrize(
    "begin", [BEGIN_A_CHORD, BEGIN_A_PROGRAM], ids=["the queue of a chord", "the reply queue of a program"]
)
def test_no_queue_is_used_that_a_dying_node_left_half_declared(begin: str, cluster: list[Node]) -> None:
    # Given a program that declares one queue after another
    program = (
        "import os, uuid\nfrom concurrent.futures import ThreadPoolExecutor\n"
        "from reliable import Celery\nfrom tasks import app\ncallers = []\n"
        "def begin(number):\n"
        f"{begin}"
        "    print(f'{number}\\n', end='')\n"
        "    return queue\n"
        "with ThreadPoolExecutor(8) as threads:\n"
        "    queues = list(threads.map(begin, range(120)))\n"
        "policy = app.conf.task_publish_retry_policy\n"
        "with app.amqp.producer_pool.acquire() as producer:\n"
        "    for queue in queues:\n"
        "        producer.publish('a message', routing_key=queue, retry=True, retry_policy=policy)\n"
        "print('all confirmed')\n"
        "os._exit(0)\n"  # Deleting a queue takes seconds while a node is dead
    )
    url = ";".join(node.url for node in reversed(cluster))
    with start_python("-c", program, CELERY_BROKER_URL=url) as caller:
        assert caller.stdout
        assert caller.stderr
        # When its node dies
        assert "40\n" in iter(caller.stdout.readline, "")
        cluster[2].kill()
        # Then each queue accepts a message
        assert caller.stdout.read().endswith("all confirmed\n"), caller.stderr.read()


def test_no_chord_waits_for_a_node_that_died_with_its_parts(cluster: list[Node], tmp_path: Path) -> None:
    # Given a chord whose second task is due later, and somebody who has taken the part of the first
    shop = Shop(";".join(node.url for node in cluster), tmp_path)
    shop.start_worker()
    program = (
        "from celery import chord\nimport tasks\n"
        "late = tasks.add.s(2, 0).set(countdown=10)\n"
        "result = chord([tasks.add.s(1, 0), late], tasks.total.s())()\n"
        "print(result.parent.id, flush=True)\n"
        "print(result.get(timeout=60))\n"
    )
    try:
        with (
            start_python("-c", program, CELERY_BROKER_URL=shop.url) as caller,
            Connection(cluster[2].url) as connection,
        ):
            assert caller.stdout
            queue = f"chord-{caller.stdout.readline().strip()}"
            until(lambda: depth(shop.url, queue) == 1)
            held: list[Any] = []
            connection.default_channel.basic_consume(queue, callback=held.append)
            until(lambda: connection.drain_events(timeout=10) or held)
            # When his node dies, and does not come back
            cluster[2].kill()
            # Then the second task calls the body
            assert caller.stdout.readline() == "3\n"
    finally:
        shop.worker.kill()


@pytest.mark.parametrize("fault", [leaders_are_killed, two_of_three_are_killed])
def test_nothing_is_lost_in_a_cluster_when(fault: Fault, cluster: list[Node], tmp_path: Path) -> None:
    # The broker URL lists all nodes
    shop = Shop(";".join(node.url for node in cluster), tmp_path)
    break_under_load(fault, shop, cluster, pace=0.03)  # seconds: the load goes on all the while
