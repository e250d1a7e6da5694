"""Messages that a worker cannot process: each becomes a dead letter, and its caller gets an error.

Celery either acknowledges such a message, so that it is lost, or ends the worker.
"""

import contextlib
from collections.abc import Callable
from typing import Any

from celery import signals
from celery.app.task import Context
from celery.exceptions import NotRegistered, WorkerLostError
from celery.utils.log import get_logger
from celery.worker.consumer import Consumer
from kombu.exceptions import ContentDisallowed

from reliable.delivery import Message
from reliable.errors import UnreportedError

logger = get_logger(__name__)

#: How many deliveries of any kind a message may have, as a multiple of `x-delivery-limit`. Since RabbitMQ
#: 4.3, that limit does not count a delivery that a worker requeues, or that outlasts the acknowledgement
#: time-out.
ACQUISITIONS = 5


class RefusesMessages(Consumer):
    """A consumer that turns a message that it cannot process into a dead letter, and informs the caller."""

    def create_task_handler(self, *args: Any, **options: Any) -> Callable[[Message], None]:
        """Return a function that receives messages, and refuses malformed ones.

        With Celery's own function, such a message would end the worker.
        """
        receive = super().create_task_handler(*args, **options)

        def on_task_received(message: Message) -> None:
            try:
                if message.content_type not in (message.accept or ()):
                    raise ContentDisallowed(f"{message.content_type!r} is not accepted")
                if self.is_last_delivery(message):
                    raise WorkerLostError(
                        "It was delivered too often: it may have killed its worker each time"
                    )
                receive(message)
            except self.connection_errors:
                raise
            except Exception as error:  # noqa: BLE001  (whatever odd headers lead to)
                self.refuse(message, error)

        return on_task_received

    def is_last_delivery(self, message: Message) -> bool:
        """Return whether RabbitMQ would give up on this message if it came back once more.

        RabbitMQ cannot report this to the caller, so a worker does. Otherwise the caller of a task that kills
        its whole worker each time would wait in vain.
        """
        if not message.delivery_info.get("redelivered"):  # kombu's in-memory broker does not set it
            return False
        name = message.delivery_info["routing_key"].rpartition(".")[2]  # The delay queues put bits before it
        queue = self.app.amqp.queues.get(name)
        limit = ((queue and queue.queue_arguments) or {}).get("x-delivery-limit")
        if not limit:
            return False
        deliveries = message.headers.get("x-delivery-count", 0)
        acquisitions = message.headers.get("x-acquired-count", 0)
        return bool(deliveries >= limit or acquisitions >= ACQUISITIONS * limit)

    def refuse(self, message: Message, error: Exception) -> None:
        """Report an error to the caller, and make its message a dead letter."""
        logger.critical("A message is refused, and becomes a dead letter: %r", str(error))
        needs_no_ack = message.channel.no_ack_consumers or ()  # The messages of remote control
        if message.acknowledged or message.delivery_info.get("consumer_tag") in needs_no_ack:
            return
        try:
            self.report(message, error)
        except UnreportedError as unreported:
            logger.critical(
                "Cannot report a refused message to its caller, so RabbitMQ will redeliver it: %s", unreported
            )
            message.requeue()
            return
        except Exception:  # Odd parts of the message
            logger.exception("Cannot report a refused message to its caller")
        message.reject_log_error(logger, self.connection_errors)

    def report(self, message: Message, error: Exception) -> None:
        """Report an error to the caller of a message and to its chord, and run the tasks of its `link_error`.

        Raises:
            reliable.errors.UnreportedError: RabbitMQ does not accept the report.
        """
        reply_to, task_id = (message.properties.get(name) for name in ("reply_to", "correlation_id"))
        if not (isinstance(reply_to, str) and isinstance(task_id, str)):
            return
        request = Context(id=task_id, reply_to=reply_to, correlation_id=task_id, delivery_info={})
        with contextlib.suppress(Exception):  # Its body may be anything
            *_, options = message.payload
            request.update({name: options[name] for name in ("errbacks", "chain", "chord")})
            request.update({name: message.headers[name] for name in ("group", "group_index")})
        self.app.backend.mark_as_failure(task_id, error, request=request)

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
        """Refuse a task that this worker does not have."""
        name, task_id = (message.headers.get(header) for header in ("task", "id"))
        logger.error("Received unregistered task of type %r", name)
        self.refuse(message, NotRegistered(name))
        if self.event_dispatcher:
            self.event_dispatcher.send("task-failed", uuid=task_id, exception=f"NotRegistered({name!r})")
        signals.task_unknown.send(sender=self, message=message, exc=exc, name=name, id=task_id)
