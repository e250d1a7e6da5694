"""The Celery app: it puts the parts of this package together, and does nothing else."""

import contextlib
import copy
import os
import weakref
from collections.abc import Iterable
from typing import Any, ClassVar

import celery
import click
from celery.loaders.app import AppLoader
from kombu import pools

from reliable import bulk, publishing, topology
from reliable.remote_control import Control
from reliable.settings import LOOKED_UP, SETTINGS


def add_settings(sender: celery.Celery, source: Any, **_: Any) -> None:
    """Let the settings of this package override Celery's defaults, and the app's settings override both.

    Settings from `app.add_defaults()` override settings that an app reads with `config_from_object()`.
    """
    source.maps.insert(-1, copy.deepcopy(SETTINGS))  # An app may change them in place


def speed_up_settings(sender: celery.Celery, source: Any, **_: Any) -> None:
    """Put the settings that Celery looks up at each call near the front of its search order.

    Settings that an app has changed still come first.

    The search through all defaults took a quarter of the time of publishing in bulk.
    """
    source.maps.insert(1, {name: source[name] for name in LOOKED_UP})


def start_anew(app: "Celery | None") -> None:
    """Give a forked process, such as one of `gunicorn --preload`, connections and a reply queue of its own.

    Celery does so for its own processes only. Others would write to the sockets of their parent.
    """
    if app:
        pools.connections.clear()
        pools.producers.clear()
        app._after_fork()
        app.__dict__.pop("oid", None)
        app.__dict__.pop("control", None)
        app._backend_cache = None


class Loader(AppLoader):
    """The loader of the app, which has its own rpc:// result backend."""

    override_backends: ClassVar = {"rpc": "reliable.results:RPCBackend"}


class Celery(celery.Celery):
    """A Celery app whose defaults keep tasks from being lost. It takes the arguments of `celery.Celery`."""

    task_cls = "reliable.publishing:Task"
    control_cls = Control
    loader_cls = "reliable.app:Loader"  # A string, which Celery expects where Django is configured
    topology_is_declared = False

    def on_init(self) -> None:
        """Add the settings of this package and an option of `celery worker`, and prepare for a fork."""
        self.on_after_configure.connect(add_settings)
        self.on_after_configure.connect(speed_up_settings)
        if hasattr(os, "register_at_fork"):  # Not on Windows
            reference = weakref.ref(self)
            os.register_at_fork(after_in_child=lambda: start_anew(reference()))
        alive_file = click.Option(["--alive-file"], help="Touch this file every 5 seconds while consuming.")
        self.user_options["worker"].add(alive_file)  # See `reliable/alive.py`

    @property
    def thread_oid(self) -> str:
        """Return the name of the reply queue, one for all threads.

        Celery has one for each, and gives the queue of a thread that ended to a new thread.
        """
        return str(self.oid)

    def _connection(self, url: str, *, transport_options: Any = None, **options: Any) -> Any:
        """Connect with the transport options of this package and of the app.

        With Celery's method an app that sets any of them would lose all others, including the confirms.
        """
        ours = SETTINGS["broker_transport_options"]
        transport_options = {**ours, **self.conf.broker_transport_options, **(transport_options or {})}
        return super()._connection(url, transport_options=transport_options, **options)

    def declare_topology_once(self) -> None:
        """Declare exchanges and queues before this app publishes for the first time.

        Raises:
            kombu.exceptions.OperationalError: RabbitMQ cannot be reached.
            amqp.PreconditionFailed: a queue exists with other arguments.
            amqp.AccessRefused: the user may not declare a queue.
        """
        if not self.topology_is_declared:
            with self.connection_for_write() as connection:
                topology.ensure_connection(self, connection)
                topology.declare(self, connection)
            self.topology_is_declared = True

    def send_task(self, name: str, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
        """Publish a task by name. Each way to call a task ends here.

        Raises:
            kombu.exceptions.OperationalError: RabbitMQ did not accept the message; the text gives the reason.
            amqp.PreconditionFailed: the message is larger than RabbitMQ's max_message_size.
        """
        publishing.prepare(self, name, options)
        # In a worker, the topology is already declared
        if not self.current_worker_task:
            self.declare_topology_once()
        # A producer of `publish_in_bulk` has its own way to report errors
        in_bulk = isinstance(options.get("producer"), bulk.BulkProducer)
        with contextlib.nullcontext() if in_bulk else publishing.explained(name):
            return super().send_task(name, args, kwargs, **options)

    def publish_in_bulk(self, signatures: Iterable[Any], window: int = bulk.WINDOW) -> int:
        """Publish any number of tasks, each confirmed by RabbitMQ. See `bulk.publish_in_bulk`."""
        self.declare_topology_once()
        return bulk.publish_in_bulk(self, signatures, window)
