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
    if embedded:
        where, reason = "", "--embedded"
    elif app.conf.broker_url == "memory://":
        where, reason = "", "memory://"
    else:
        where, reason = find_rabbitmq(app), f"cannot connect to {app.connection_for_write().as_uri()}"
    if not where:
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

    Raises:
        kombu.exceptions.OperationalError: RabbitMQ does not answer within five seconds.
        amqp.AMQPError: it refuses the user, or a queue that `app.declare_topology_once` declares.
    """
    limits = {"read_timeout": 1.5, "write_timeout": 1.5}  # Seconds: another program may listen on that port
    with app.connection_for_write(connect_timeout=1.5, transport_options=limits) as connection:
        connection.ensure_connection(max_retries=1, interval_start=0)
        version = connection.connection.server_properties["version"]
        app.declare_topology_once()
        return f"RabbitMQ {version} at {connection.as_uri()}"  # Without the password


def find_workers(app: celery.Celery) -> dict[str, Any]:
    """Return the statistics of each worker node that answers within a second, by its name."""
    return app.control.inspect(timeout=1).stats() or {}


def start_embedded(app: celery.Celery) -> None:
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
        concurrency=8,
        without_gossip=True,
        without_mingle=True,
    )
    threading.Thread(target=worker.start, daemon=True).start()
    worker.ensure_started()
