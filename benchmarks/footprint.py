"""What callers, workers and remote control leave in RabbitMQ: memory, processes, atoms, queues, connections.

    $ pip install -e '.[dev]'
    $ python benchmarks/footprint.py

It starts a RabbitMQ of its own (rabbitmq-server must be on PATH). An atom is never freed: a number that grows
with each caller ends a node some day.
"""

import os
import re
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch
from uuid import uuid4

import click

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from reliable import Celery, topology  # noqa: E402
from reliable.rabbitmq_node import Node  # noqa: E402
from reliable.testing import Worker, until  # noqa: E402
from run_tasks import table  # noqa: E402

#: Collect garbage, and count.
COUNT = (
    "[erlang:garbage_collect(P) || P <- erlang:processes()], "
    "{erlang:memory(total), erlang:system_info(process_count), erlang:system_info(atom_count), "
    "length(rabbit_amqqueue:list()), length(rabbit_networking:connections()), length(rabbit_channel:list())}."
)
#: How many idle workers are there.
WORKERS = 10
COLUMNS = ("memory, KiB", "processes", "atoms", "queues", "connections", "channels")


def count(node: Node) -> list[int]:
    """Return what RabbitMQ has of each column."""
    memory, *others = (int(number) for number in re.findall(r"\d+", node.control("eval", COUNT)))
    return [memory // 1024, *others]


def caller(url: str) -> Celery:
    """Return an app as another program would have it, with a reply queue of its own."""
    app = Celery("caller", broker=url, backend="rpc://", set_as_current=False)
    name = app.__dict__["oid"] = str(uuid4())
    app.conf.broker_heartbeat = 0  # Each one would have to receive now and then
    # Otherwise kombu shares the connections with the other apps of this process
    app.conf.broker_transport_options |= {"client_properties": {"connection_name": name}}
    return app


def call(app: Celery) -> None:
    """Call a task, and take its result."""
    app.send_task("tasks.add", (2, 2)).get(timeout=30)


def leave(app: Celery) -> None:
    """End as a program ends: the reply queue is deleted, and the connections are closed."""
    app.backend.result_consumer.stop()
    app.backend.delete_queue(os.getpid())
    app.pool.force_close_all()


class Footprint:
    """The rows of the table: each one shows what has come since the row before."""

    def __init__(self, node: Node) -> None:
        self.node, self.rows = node, list[dict[str, Any]]()
        self.before = count(node)

    def note(self, what: str, number: int = 1) -> None:
        """Add a row: what has come, for each of so many."""
        now = count(self.node)
        each = [(after - before) / number for before, after in zip(self.before, now, strict=True)]
        self.rows.append({"for each": what, **dict(zip(COLUMNS, each, strict=True))})
        self.before = now


def keep(url: str, number: int) -> list[Celery]:
    """Run callers that wait for their next call."""
    callers = [caller(url) for _ in range(number)]
    for app in callers:
        call(app)
    return callers


def idle_worker(url: str, folder: Path, name: str) -> Worker:
    """Return a worker of two processes that is not running yet."""
    logs = folder / name
    logs.mkdir()
    worker = Worker("tasks", url, logs, "-c2", "-n", f"{name}@localhost", PYTHONPATH=str(HERE.parent))
    worker.name = f"{name}@localhost"
    return worker


def has_reply_queues(node: Node) -> bool:
    """Return whether queues are left in which a starting worker received the replies of the others."""
    return any(name.endswith(".reply.celery.pidbox") for name in node.queues("name"))


@click.command()
@click.option("--callers", default=1000, show_default=True, help="How many callers are there at a time.")
@click.option("--calls", default=10_000, show_default=True, help="How many callers come and go.")
@click.option("--inspects", default=1000, show_default=True, help="How many `inspect` calls are made.")
def main(callers: int, calls: int, inspects: int) -> None:
    """Count what is left in RabbitMQ, in about twenty minutes."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        node = stack.enter_context(Node(folder))
        worker = stack.enter_context(idle_worker(node.url, folder, "first"))
        call(caller(node.url))
        until(lambda: not has_reply_queues(node))
        footprint = Footprint(node)
        for number in range(WORKERS):
            stack.enter_context(idle_worker(node.url, folder, f"idle{number}"))
        until(lambda: not has_reply_queues(node))
        footprint.note("idle worker of two processes", WORKERS)
        for kind, arguments in (("classic", {}), ("quorum", topology.QUORUM)):
            with patch.object(topology, "temporary", return_value=arguments):
                waiting = keep(node.url, callers)
            footprint.note(f"caller, with a {kind} reply queue", callers)
            for waits in waiting:
                leave(waits)
            until(lambda: count(node)[3] <= footprint.before[3] - callers)
            footprint.note(f"the same, after it has ended ({kind})", callers)
        for _ in range(calls):
            short = caller(node.url)
            call(short)
            leave(short)
        footprint.note(f"of {calls:,} callers, one after another", calls)
        for _ in range(inspects):
            short = caller(node.url)
            short.control.ping(destination=[worker.name], timeout=5, limit=1)
            short.pool.force_close_all()
        until(lambda: count(node)[3] <= footprint.before[3], 60)
        footprint.note(f"of {inspects:,} calls of inspect", inspects)
        version = node.control("-q", "version").strip()
    print("\n".join([f"RabbitMQ {version}", *table(footprint.rows)]))


if __name__ == "__main__":
    main()
