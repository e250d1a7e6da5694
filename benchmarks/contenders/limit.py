"""The limit: kombu and py-amqp alone, with a quorum queue, confirms, and acknowledgement after the work."""

import functools
import json
import multiprocessing
import time
import uuid
from collections.abc import Callable
from itertools import takewhile
from typing import Any

from kombu import Connection, Consumer, Message, Producer, Queue
from work import URL, mark, mark_slowly

WORKER = ("limit.py",)
ITEMS = 200_000
QUORUM = {"x-queue-type": "quorum"}
queue = Queue("limit", routing_key="limit", queue_arguments=QUORUM)


class Publisher:
    """A channel that knows what to do when a message is confirmed."""

    def __init__(self, connection: Connection) -> None:
        self.connection, self.tag = connection, 0
        self.under_way: dict[int, Callable[[], None]] = {}
        channel: Any = connection.channel()
        channel.events["basic_ack"].add(self.confirm)
        channel.confirm_select()
        queue(channel).declare()
        self.producer = Producer(channel)

    def confirm(self, tag: int, multiple: bool) -> None:
        """Take note of one confirm, or of all up to it."""
        for confirmed in list(takewhile(tag.__ge__, self.under_way)) if multiple else [tag]:
            self.under_way.pop(confirmed)()

    def publish(self, body: dict[str, Any], key: str = "limit", then: Any = int, **properties: Any) -> None:
        """Publish a message, and do `then` once it is confirmed."""
        self.tag += 1
        self.under_way[self.tag] = then
        self.producer.publish(json.dumps(body), routing_key=key, content_type="text/plain", **properties)

    def wait(self, most: int = 0) -> None:
        """Wait until no more than so many messages are not confirmed."""
        while len(self.under_way) > most:
            self.connection.drain_events()


def work() -> None:
    """Consume, and work; the result is confirmed before the task is acknowledged."""
    with Connection(URL) as connection:
        results = Publisher(connection)

        def on_message(message: Message) -> None:
            body = json.loads(str(message.body))
            if "number" in body:
                mark_slowly(body["number"])
            for item in body.get("items", ()):
                done = mark(item)
            if reply_to := message.properties.get("reply_to"):
                asked = message.properties["correlation_id"]
                results.publish({"result": done}, reply_to, message.ack, correlation_id=asked)
            else:
                message.ack()

        with Consumer(connection.channel(), [queue], on_message=on_message, prefetch_count=32):
            while True:
                connection.drain_events()


@functools.cache
def publisher() -> Publisher:
    """Connect, once in a process that publishes."""
    return Publisher(Connection(URL))


def send(bodies: Any, window: int) -> None:
    """Publish messages with no more than `window` of them not confirmed."""
    for body in bodies:
        publisher().publish(body)
        publisher().wait(window - 1)
    publisher().wait()


def publish(number: int, payload: str) -> None:
    """Publish tasks one at a time."""
    send(({"items": [payload]} for _ in range(number)), 1)


def publish_bulk(number: int, payload: str) -> None:
    """Publish tasks with a thousand confirms under way."""
    send(({"items": [payload]} for _ in range(number)), 1000)


def publish_slow(number: int, first: int = 0) -> None:
    """Publish tasks of 20 ms, which know their number."""
    send(({"number": one} for one in range(first, first + number)), 1000)


def publish_items(number: int) -> None:
    """Publish tiny items, a thousand in a message."""
    send(({"items": ["x"] * 1000} for _ in range(number // 1000)), 1000)


def ask(number: int, payload: str, window: int) -> list[float]:
    """Publish tasks and wait for their results, so many at a time; return the seconds of each."""
    seconds: list[float] = []
    reply = Queue(str(uuid.uuid4()), expires=60, queue_arguments=QUORUM)
    with Connection(URL) as connection:
        publisher = Publisher(connection)

        def on_message(message: Message) -> None:
            assert json.loads(str(message.body))["result"] == len(payload)
            seconds.append(time.perf_counter() - float(message.properties["correlation_id"]))
            message.ack()

        with Consumer(connection.channel(), [reply], on_message=on_message):
            for sent in range(number):
                now = repr(time.perf_counter())
                publisher.publish({"items": [payload]}, reply_to=reply.name, correlation_id=now)
                while sent + 1 - len(seconds) >= window:
                    connection.drain_events()
            while len(seconds) < number:
                connection.drain_events()
    return seconds


def collect(number: int, payload: str) -> None:
    """Publish tasks and wait for their results."""
    ask(number, payload, 1000)


def call(number: int) -> list[float]:
    """Call a task and wait for its result, again and again; return the seconds of each."""
    return ask(number, "x", 1)


if __name__ == "__main__":
    multiprocessing.Process(target=work, daemon=True).start()
    work()
