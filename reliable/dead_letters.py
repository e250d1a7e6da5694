"""Dead letters: the tasks that failed, kept in RabbitMQ until somebody runs them again or discards them."""

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from typing import Any

import celery
import click
from amqp import AMQPError, spec
from amqp.basic_message import Message
from amqp.exceptions import MessageNacked

from reliable.delivery import unpack
from reliable.publishing import SECRET, is_secret
from reliable.topology import DEAD_LETTERS

#: The headers that RabbitMQ adds. A replayed task is published without them.
ADDED_BY_RABBITMQ = ("x-death", "x-first-death-", "x-last-death-", "x-delivery-count", "x-acquired-count")


class Stuck(Exception):
    """A dead letter that cannot be replayed; the text gives the reason."""


class DeadLetter:
    """A message of the queue `dead-letters`. Anybody may have made it, with any headers."""

    def __init__(self, app: celery.Celery, message: Message) -> None:
        self.app, self.message = app, message
        self.headers: dict[str, Any] = message.headers or {}
        deaths: Any = self.headers.get("x-death")  # RabbitMQ notes the last one first
        is_noted = isinstance(deaths, list) and deaths and isinstance(deaths[0], dict)
        self.death: dict[str, Any] = deaths[0] if is_noted else {}
        self.id = str(self.headers.get("id", ""))
        self.task = shorten(self.headers.get("task", "not a task"), 100)
        self.queue = str(self.death.get("queue", ""))
        self.reason = shorten(self.death.get("reason", "published here"), 16)

    @property
    def name(self) -> str:
        """Return what to call it on a terminal."""
        return shorten(self.id, 64) or self.task

    @property
    def is_secret(self) -> bool:
        """Return whether the arguments are hidden."""
        return is_secret(self.app, self.headers.get("task"))

    @property
    def count(self) -> int:
        """Return how often the task has become a dead letter."""
        replays = self.headers.get("replays")
        return 1 + (replays if isinstance(replays, int) else 0)

    def summary(self) -> dict[str, Any]:
        """Return one row of the list."""
        arguments = f"{self.headers.get('argsrepr', '')} {self.headers.get('kwargsrepr', '')}"
        arguments = SECRET["argsrepr"] if self.is_secret else arguments.removesuffix(" {}").strip()
        died, age = self.death.get("time"), timedelta()
        if isinstance(died, datetime):
            age = datetime.now(timezone.utc) - died.replace(tzinfo=timezone.utc)
        return {
            "task": self.task,
            "id": shorten(self.id, 64),
            "arguments": shorten(arguments or self.message.body, 40),
            "reason": self.reason,
            "queue": shorten(self.queue, 40),
            "count": self.count,
            "age": str(timedelta(seconds=int(age.total_seconds()))),
        }

    def everything(self) -> dict[str, Any]:
        """Return the whole dead letter: its headers with the deaths, its properties and its body."""
        body: Any = self.message.body
        try:
            if compression := self.headers.get("compression"):
                body = unpack(body, compression)
            body = json.loads(body, object_hook=self.hide_arguments)
        except Exception:  # noqa: BLE001  (anybody may have made it)
            body = repr(body)
        properties = {
            name: value for name, value in self.message.properties.items() if name != "application_headers"
        }
        return {
            "headers": self.headers | SECRET if self.is_secret else self.headers,
            "properties": properties,
            "body": SECRET["argsrepr"] if self.is_secret else body,
        }

    def hide_arguments(self, part: dict[str, Any]) -> dict[str, Any]:
        """Hide the arguments of a secret task that follows in a chain, a chord or a `link`."""
        hidden = {"args": SECRET["argsrepr"], "kwargs": {}}
        return part | hidden if is_secret(self.app, part.get("task")) else part

    def replay(self) -> None:
        """Publish the task to the queue it came from. Delete the dead letter once RabbitMQ confirms that.

        Raises:
            Stuck: it did not come from a queue, the app does not have that queue, or the queue is full.
        """
        if not self.queue:
            raise Stuck("it did not come from a queue")
        if self.queue not in self.app.amqp.queues:
            raise Stuck(f"this app has no queue {shorten(self.queue, 40)}")
        kept = {name: value for name, value in self.headers.items() if not name.startswith(ADDED_BY_RABBITMQ)}
        # It may run however late it is, and be retried as often as a new task
        kept |= {"expires": None, "retries": 0, "replays": self.count}
        properties = {**self.message.properties, "application_headers": kept}
        properties.pop("expiration", None)
        queue = self.app.amqp.queues[self.queue]
        try:
            self.message.channel.basic_publish(
                Message(self.message.body, **properties), queue.exchange.name, queue.routing_key
            )
        except MessageNacked:
            raise Stuck(f"the queue {self.queue} is full") from None
        self.delete()

    def delete(self) -> None:
        """Delete the dead letter from RabbitMQ."""
        self.message.channel.basic_ack(self.message.delivery_tag)


def shorten(text: object, width: int) -> str:
    """Return at most `width` characters of a text, with '?' for each one that cannot be printed."""
    characters = [character if character.isprintable() else "?" for character in str(text)[: width + 1]]
    return "".join(characters if len(characters) <= width else [*characters[: width - 1], "\u2026"])


def read(app: celery.Celery, channel: Any, label: str = "") -> Iterator[DeadLetter]:
    """Yield the dead letters that are there now. One that is not deleted stays in RabbitMQ.

    With a label, a progress bar is shown on a terminal.
    """
    number = DEAD_LETTERS(channel).queue_declare(passive=True).message_count
    hidden = not label or not sys.stderr.isatty()
    with click.progressbar(range(number), label=label, file=sys.stderr, hidden=hidden) as steps:
        for _ in steps:
            if message := channel.basic_get(DEAD_LETTERS.name):
                message.channel = channel
                yield DeadLetter(app, message)


@contextlib.contextmanager
def requeueing_channel(connection: Any) -> Iterator[Any]:
    """Yield a channel. At the end, return to RabbitMQ the messages that were not deleted, in their order.

    Closing the channel also returns them, but RabbitMQ before 4.1.1 does so in no order if there are more
    than 32. If it then restarts, messages deleted later may come back, and others may be lost instead.
    https://github.com/rabbitmq/rabbitmq-server/pull/13971
    """
    with connection.channel() as channel:
        try:
            yield channel
        finally:
            with contextlib.suppress(AMQPError, OSError):
                channel.send_method(spec.Basic.Nack, "Lbb", (0, True, True))  # Requeue all


@contextlib.contextmanager
def wait_for(app: celery.Celery, task_id: str) -> Iterator[DeadLetter]:
    """Wait for the dead letter of a task, which may come after its error.

    Raises:
        LookupError: it has not come within 30 seconds.
    """
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with app.connection_for_write() as connection, requeueing_channel(connection) as channel:
            for letter in read(app, channel):
                if letter.id == task_id:
                    yield letter
                    return
        time.sleep(0.05)
    raise LookupError(f"There is no dead letter of task {task_id}")
