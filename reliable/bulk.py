"""Publishing in bulk: many messages are under way at a time, and RabbitMQ confirms each one.

https://www.rabbitmq.com/docs/confirms#publisher-confirms
"""

import contextlib
import socket
from collections.abc import Iterable, Iterator
from itertools import takewhile
from typing import Any

import celery
from celery.canvas import Signature
from kombu import Producer, Queue
from kombu.exceptions import OperationalError

from reliable import topology
from reliable.publishing import is_secret

#: How many messages `publish_in_bulk` leaves unconfirmed at a time.
WINDOW = 1000


def publish_in_bulk(app: celery.Celery, signatures: Iterable[Signature], window: int) -> int:
    """Publish any number of tasks, each confirmed by RabbitMQ, and return their number.

    Args:
        signatures: each one is a task, such as `add.s(2, 2)`. To get results, call `freeze()` on
            each one, and keep the result object that it returns. Otherwise let the task ignore its result,
            or results pile up.
        window: how many messages may be unconfirmed at a time, at least 1.

    Raises:
        kombu.exceptions.OperationalError: names the task that RabbitMQ refused, or the first that may be
            lost. The tasks before it are published.
        kombu.exceptions.EncodeError: an argument is not JSON. Tasks before it may be published.
    """
    # With this option on, py-amqp waits after each message. Here `unconfirmed.wait()` waits, once the window
    # is full.
    with app.connection_for_write(transport_options={"confirm_publish": False}) as connection:
        topology.ensure_connection(app, connection)
        unconfirmed = Unconfirmed(app, connection)
        producer = BulkProducer(unconfirmed.channel)
        number = 0
        for signature in signatures:
            with unconfirmed.explained():
                unconfirmed.current = signature
                signature.apply_async(producer=producer, retry=False, add_to_parent=False)
                unconfirmed.wait(window - 1)
            number += 1
        with unconfirmed.explained():
            unconfirmed.wait(0)
    return number


class BulkProducer(Producer):
    """A producer that copies a queue only if the queue is not declared yet."""

    def maybe_declare(self, entity: Queue, *args: Any, **options: Any) -> Any:
        """Declare a queue, unless it was declared through this connection."""
        if entity.can_cache_declaration and hash(entity) in self.connection.declared_entities:
            return False
        return super().maybe_declare(entity, *args, **options)


class Unconfirmed:
    """The messages of a channel that RabbitMQ has not confirmed yet, each with the task that it is for.

    https://www.rabbitmq.com/docs/confirms#publisher-confirms
    """

    def __init__(self, app: celery.Celery, connection: Any) -> None:
        self.app, self.connection = app, connection
        self.channel = connection.channel()
        self.current: Signature  # The task that is being published
        self.tasks: dict[int, Signature] = {}  # By delivery tag: the first message has 1, and so on
        self.last_tag = 0
        if connection.transport.driver_type == "amqp":  # The embedded broker does not confirm
            self.publish = self.channel.basic_publish
            self.channel.basic_publish = self.count
            self.channel.events["basic_ack"].add(self.confirm)
            self.channel.events["basic_nack"].add(self.refuse)
            self.channel.confirm_select()
            # Small messages leave together. py-amqp sends each one at once, for callers that wait for it.
            connection.connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 0)

    def count(self, *args: Any, **options: Any) -> Any:
        """Publish a message, and note it."""
        self.last_tag += 1
        self.tasks[self.last_tag] = self.current
        return self.publish(*args, **options)

    def confirm(self, tag: int, multiple: bool) -> None:
        """Forget a message, or all up to this one."""
        for confirmed in list(takewhile(lambda earlier: earlier <= tag, self.tasks)) if multiple else [tag]:
            del self.tasks[confirmed]

    def refuse(self, tag: int, multiple: bool) -> None:
        """Raise OperationalError with the task that RabbitMQ refused."""
        raise OperationalError(f"RabbitMQ refused {describe(self.app, self.tasks[tag])}")

    def wait(self, most: int) -> None:
        """Wait until no more than this many messages are unconfirmed."""
        while len(self.tasks) > most:
            self.connection.drain_events()

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Turn an error of publishing into one that names the first task that may be lost."""
        errors = (OperationalError, *self.connection.connection_errors, *self.connection.channel_errors)
        try:
            yield
        except errors as error:
            number, first = len(self.tasks) or 1, next(iter(self.tasks.values()), self.current)
            text = f"tasks not confirmed: {number}; the first is {describe(self.app, first)} ({error})"
            raise OperationalError(text) from error


def describe(app: celery.Celery, signature: Signature) -> str:
    """Return the name of a task, with its arguments unless they are secret."""
    return str(signature.task) if is_secret(app, signature.task) else f"{signature!s:.100}"
