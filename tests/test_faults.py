"""Break a part under load, and look at what is left: no task that was accepted may be lost.

A publisher hands over 1,000 tasks, each of which writes its number to a ledger on disk. In the middle
of it something dies. A publish that raised an error is the publisher's to repeat, and is not counted.
"""

import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import PROJECT, Node, Worker, clean_environment, until
from kombu import Connection, Queue

TASKS = 1000

LEDGER = '''
import os, sys, time
from kombu.exceptions import OperationalError
from tasks import app

@app.task(ignore_result=True)
def note(number):
    """Take a hundredth of a second, and write a number to the ledger."""
    time.sleep(0.01)
    ledger = os.open(os.environ["LEDGER"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(ledger, b"%d\\n" % number)
    os.close(ledger)

if __name__ == "__main__":
    import ledger
    for number in range(int(sys.argv[1])):
        try:
            ledger.note.delay(number)
        except OperationalError:
            continue  # refused, and told so
        print(number, flush=True)
'''


class Shop:
    """A publisher and a worker at work, on a broker and with a ledger of their own."""

    def __init__(self, url: str, folder: Path) -> None:
        (folder / "ledger.py").write_text(LEDGER)
        self.url, self.folder, self.ledger = url, folder, folder / "ledger"
        self.variables = {"LEDGER": str(self.ledger), "PYTHONPATH": f"{folder}{os.pathsep}{PROJECT}"}
        self.worker = self.new_worker()

    def new_worker(self) -> Worker:
        """Return a worker of four processes that is not started yet."""
        return Worker(self.url, self.folder, "-c4", "--include", "ledger", **self.variables)

    def done(self) -> Counter[int]:
        """Return how often each number stands in the ledger."""
        return Counter(map(int, self.ledger.read_text().split())) if self.ledger.exists() else Counter()

    def after(self, number: int) -> None:
        """Wait until so many tasks have run."""
        until(lambda: len(self.done()) >= number, 60)


def pool_processes_are_killed(shop: Shop, _node: Node) -> None:
    """Kill ten processes of the pool, one after another, under load."""
    assert shop.worker.process
    for kill in range(10):
        shop.after(100 + 50 * kill)
        children = psutil.Process(shop.worker.process.pid).children()
        children[kill % len(children)].kill()


def the_worker_is_killed(shop: Shop, _node: Node) -> None:
    """Kill the worker with all its processes, and start another of the same name."""
    shop.after(200)
    shop.worker.kill()
    shop.worker = shop.new_worker()
    shop.worker.start()


def the_worker_is_stopped(shop: Shop, _node: Node) -> None:
    """Stop the worker while it runs tasks, and start another."""
    shop.after(200)
    shop.worker.stop(signal.SIGTERM)
    shop.worker = shop.new_worker()
    shop.worker.start()


def connections_are_closed(shop: Shop, node: Node) -> None:
    """Close every connection, as an administrator may."""
    for number in (100, 300):
        shop.after(number)
        node.control("close_all_connections", "a test")


def the_broker_is_killed(shop: Shop, node: Node) -> None:
    """Kill RabbitMQ, and start it again on its data."""
    shop.after(200)
    node.kill()
    node.start()


@pytest.mark.parametrize(
    "fault",
    [
        pool_processes_are_killed,
        the_worker_is_killed,
        the_worker_is_stopped,
        connections_are_closed,
        the_broker_is_killed,
    ],
)
def test_no_accepted_task_is_lost_when(
    fault: Callable[[Shop, Node], None], node: Node, tmp_path: Path
) -> None:
    # Given a worker and a publisher under load
    shop = Shop(node.url, tmp_path)
    shop.worker.start()
    try:
        with subprocess.Popen(
            [sys.executable, str(tmp_path / "ledger.py"), str(TASKS)],
            env=clean_environment(CELERY_BROKER_URL=node.url, **shop.variables),
            stdout=subprocess.PIPE,
            text=True,
        ) as publisher:
            # When something dies
            fault(shop, node)
            printed, _ = publisher.communicate(timeout=90)
        # Then each task that was accepted has run, at least once
        accepted = set(map(int, printed.split()))
        until(lambda: accepted <= set(shop.done()), 60)
        # And nothing is left in a queue, or was given up
        with Connection(node.url) as connection, connection.channel() as channel:
            for name in ("default", "dead-letters", "unrouted"):
                queue: Any = Queue(name)(channel)
                until(lambda queue=queue: queue.queue_declare(passive=True).message_count == 0, 20)  # type: ignore[misc]
        again = sum(count - 1 for count in shop.done().values())
        print(
            f"{fault.__name__}: {len(accepted)} accepted, {TASKS - len(accepted)} refused, {again} ran again"
        )
        assert len(accepted) > TASKS // 2
    finally:
        shop.worker.kill()
