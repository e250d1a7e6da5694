"""The consumer of a worker: it connects, receives messages and acknowledges them.

https://docs.celeryq.dev/en/stable/userguide/extending.html#consumer
"""

from collections.abc import Callable
from typing import Any

from amqp import AccessRefused, NotAllowed, PreconditionFailed
from celery.app.task import Context
from celery.exceptions import WorkerShutdown
from celery.utils.log import get_logger
from celery.worker.consumer import Consumer as CeleryConsumer
from kombu import Connection, Queue
from kombu.exceptions import ContentDisallowed, OperationalError

from reliable import topology
from reliable.acknowledging import AcknowledgesInGroups
from reliable.delivery import Message
from reliable.errors import describe_error

logger = get_logger(__name__)

#: How often a worker looks for queues that were out of reach, in seconds.
LOOK_AGAIN = 15
#: How often a worker forgets the time limits of tasks that ended, in seconds.
SWEEP = 10


class Consumer(AcknowledgesInGroups):
    """The consumer of a worker. It declares the topology, and loses no message."""

    class Blueprint(CeleryConsumer.Blueprint):
        """The steps in which a consumer starts.

        Left out are DelayedDelivery, which waits for each node that is down (the topology does its work), and
        Gossip, which ends the worker at an event that it does not understand.
        """

        default_steps = [  # noqa: RUF012  (as Celery declares it)
            step
            for step in CeleryConsumer.Blueprint.default_steps
            if "DelayedDelivery" not in step and "Gossip" not in step
        ]

    def __init__(self, *args: Any, **options: Any) -> None:
        self.out_of_reach: list[Queue] = []
        super().__init__(*args, **options)

    # --- Connecting ---
    def connect(self) -> Connection:
        """Connect, also after a lost connection, and declare the topology.

        Raises:
            celery.exceptions.WorkerShutdown: nobody but an operator can fix it.
        """
        try:
            connection = super().connect()
            missing = topology.declare(self.app, connection)
        except PreconditionFailed as error:
            self.shut_down(error)
        except (AccessRefused, NotAllowed) as error:
            if self.restart_count:
                raise  # It was let in before, and may be again
            self.shut_down(error)  # Otherwise it would try again at once, forever
        self.app.topology_is_declared = True
        if connection.transport.driver_type == "amqp":
            connection.default_channel.Message = Message
        consumed = self.app.amqp.queues.consume_from  # Fewer than all, with the option -Q
        self.out_of_reach += [queue for queue in missing if queue.name in consumed]
        self.app.amqp.queues.deselect([queue.name for queue in self.out_of_reach])
        if self.out_of_reach:
            self.timer.call_after(LOOK_AGAIN, self.look_again)
        if self.hub:
            self.timer.call_repeatedly(SWEEP, self.sweep_timers)
        return connection

    def shut_down(self, error: Exception) -> None:
        """End the worker, with the reason and a fix in its log."""
        logger.critical("%s\nFix: %s", *describe_error(error))
        raise WorkerShutdown(2) from None

    def look_again(self) -> None:
        """Consume from the queues whose RabbitMQ node is back."""
        for queue in self.out_of_reach.copy():
            if not topology.is_out_of_reach(self.app, queue):
                self.out_of_reach.remove(queue)
                self.add_task_queue(queue.name)
        if self.out_of_reach:
            self.timer.call_after(LOOK_AGAIN, self.look_again)

    def sweep_timers(self) -> None:
        """Forget the time limits of tasks that ended. Otherwise each uses memory until its time has come."""
        timers = [timer for timer in self.timer.queue if not timer.entry.canceled]
        self.timer.clear()
        for timer in timers:
            self.timer.enter_at(timer.entry, timer.eta, timer.priority)

    def connection_for_write(self, url: str | None = None, heartbeat: float | None = None) -> Connection:
        """Connect to publish events, without confirms.

        Otherwise the queue of a dead monitor refuses an event, and the worker publishes it again, forever.
        """
        options = {"confirm_publish": False}
        connection = self.app.connection_for_write(url, heartbeat=heartbeat, transport_options=options)
        return self.ensure_connected(connection)

    # --- Messages that cannot be run become dead letters ---
    def create_task_handler(self, *args: Any, **options: Any) -> Callable[[Message], None]:
        """Return what receives a message, and refuses one that is odd. Celery would end the worker."""
        receive = super().create_task_handler(*args, **options)

        def on_task_received(message: Message) -> None:
            try:
                if message.content_type not in (message.accept or ()):
                    raise ContentDisallowed(f"{message.content_type!r} is not accepted")
                receive(message)
            except self.connection_errors:
                raise
            except Exception as error:  # noqa: BLE001  (whatever odd headers lead to)
                self.refuse(message, error)

        return on_task_received

    def refuse(self, message: Message, error: Exception) -> None:
        """Report an error to the caller, and make its message a dead letter. Celery would acknowledge it."""
        logger.critical("A message is refused, and becomes a dead letter: %r", str(error))
        needs_no_ack = message.channel.no_ack_consumers or ()  # The messages of remote control
        if message.acknowledged or message.delivery_info.get("consumer_tag") in needs_no_ack:
            return
        caller = {name: message.properties.get(name) for name in ("reply_to", "correlation_id")}
        try:
            if all(isinstance(value, str) for value in caller.values()):
                self.app.backend.mark_as_failure(caller["correlation_id"], error, request=Context(**caller))
        except OperationalError as unreported:
            logger.critical("Its caller cannot be told, so RabbitMQ delivers it again: %s", unreported)
            message.requeue()
        else:
            message.reject_log_error(logger, self.connection_errors)

    def on_decode_error(self, message: Message, exc: Exception) -> None:
        """Refuse a message whose body cannot be decoded."""
        self.refuse(message, exc)

    def on_invalid_task(self, body: Any, message: Message, exc: Exception) -> None:
        """Refuse a message that lacks a part of a task."""
        self.refuse(message, exc)

    def on_unknown_message(self, body: Any, message: Message) -> None:
        """Refuse a message that is not a task; Celery would log its body, which may hold secrets."""
        super().on_unknown_message("(hidden)", message)

    def on_unknown_task(self, body: Any, message: Message, exc: Exception) -> None:
        """Refuse a task that this worker does not have, and report that to its caller."""
        super().on_unknown_task("(hidden)", message, exc)
