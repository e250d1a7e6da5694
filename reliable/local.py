"""A broker and workers for one run of a program: the running ones, or new ones."""

import atexit
import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import celery
from celery.contrib.testing.worker import TestWorkController
from celery.result import allow_join_result
from kombu.exceptions import OperationalError

from reliable.environment import names_rabbitmq
from reliable.errors import describe_failed_connection, exit_now
from reliable.own_worker import own_worker


@dataclass
class Run:
    """What a program uses for one run."""

    description: str
    #: The statistics of each worker node, by its name.
    workers: dict[str, Any]
    #: Whether broker and worker are in this process.
    embedded: bool = False

    @property
    def processes(self) -> int:
        """Return how many tasks the workers run at a time."""
        return sum(worker["pool"]["max-concurrency"] for worker in self.workers.values())

    @property
    def has_processes(self) -> bool:
        """Return whether each worker runs its tasks in processes, so that it survives the death of one."""
        return all("prefork" in worker["pool"]["implementation"] for worker in self.workers.values())


@contextlib.contextmanager
def find_or_start(app: celery.Celery, embedded: bool = False) -> Iterator[Run]:
    """Find RabbitMQ and its workers. If no worker answers, start one.

    Without RabbitMQ, run a broker and a worker in this process. The program exits if the environment or
    `.env` names a RabbitMQ that cannot be reached.
    """
    where = "" if embedded or app.conf.broker_url == "memory://" else find_rabbitmq(app)
    if not where:
        uri = app.connection_for_write().as_uri()
        reason = "--embedded" if embedded or "memory:" in uri else f"cannot connect to RabbitMQ at {uri}"
        start_embedded(app)
        with allow_join_result():  # The program waits for results in the process of the worker
            yield Run(f"Embedded broker and worker ({reason})", find_workers(app), embedded=True)
    elif workers := find_workers(app):
        yield Run(f"{where}, with its workers", workers)
    else:
        with own_worker(app) as worker:
            yield Run(f"{where}, with a worker of our own", worker)


def run_until_exit(app: celery.Celery) -> None:
    """Print what `find_or_start` finds or starts, and keep it running until the web server ends.

    If the environment names a RabbitMQ, do nothing.
    """
    if app.conf.broker_url == "memory://" or not names_rabbitmq():
        running = contextlib.ExitStack()
        atexit.register(running.close)
        print(running.enter_context(find_or_start(app)).description, file=sys.stderr)


def find_rabbitmq(app: celery.Celery) -> str:
    """Return where RabbitMQ is, or "". Exit if the environment names it and it cannot be reached."""
    app.conf.broker_transport_options |= {"on_blocked": report_block}
    try:
        return connect(app)
    except (OperationalError, OSError) as error:
        if names_rabbitmq():
            exit_now(*describe_failed_connection(app.connection_for_write(), error))
        return ""


def report_block(_reason: str) -> None:
    """Print that RabbitMQ blocks publishers. https://www.rabbitmq.com/docs/connection-blocked"""
    print("RabbitMQ accepts no messages: it is short of memory or disk space. Waiting …", file=sys.stderr)


def connect(app: celery.Celery) -> str:
    """Connect to RabbitMQ, declare the topology, and return the version and where it is.

    If RabbitMQ does not answer, this fails within five seconds. Raises what a connection and
    `app.declare_topology_once` raise.
    """
    limits = {"read_timeout": 1.5, "write_timeout": 1.5}  # Seconds: another program may listen on that port
    with app.connection_for_write(connect_timeout=1.5, transport_options=limits) as connection:
        connection.ensure_connection(max_retries=1, interval_start=0)
        version = connection.connection.server_properties["version"]
        app.declare_topology_once()
        return f"RabbitMQ {version} at {connection.as_uri()}"  # Without the password


def find_workers(app: celery.Celery, *names: str) -> dict[str, Any]:
    """Return the statistics of each worker node that answers, by its name.

    With names, it waits up to five seconds for these nodes. Without names, it waits one second for any node.
    """
    inspect = app.control.inspect(list(names) or None, timeout=5 if names else 1, limit=len(names) or None)
    return inspect.stats() or {}


def start_embedded(app: celery.Celery, concurrency: int = 8) -> None:
    """Use kombu's broker in this process, and run a worker in a thread until the process ends.

    Stopping that worker would take four seconds, so nothing stops it.
    """
    os.environ["CELERY_BROKER_URL"] = app.conf.broker_url = "memory://"
    app.conf.broker_transport_options = {"polling_interval": 0.01}  # Seconds
    app.set_default()  # For the threads of the worker
    worker = TestWorkController(
        app=app,
        hostname="embedded@localhost",
        pool="threads",
        concurrency=concurrency,
        without_gossip=True,
        without_mingle=True,
    )
    threading.Thread(target=worker.start, daemon=True).start()
    worker.ensure_started()
