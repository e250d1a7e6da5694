"""Taskiq with taskiq-aio-pika, as its guide sets it up. It has no results on RabbitMQ, and no batches.

https://taskiq-python.github.io/guide/getting-started.html
"""

import asyncio
import functools
from collections.abc import Iterable
from itertools import islice
from typing import Any

from taskiq_aio_pika import AioPikaBroker
from work import URL, mark, mark_slowly

WORKER = ("-m", "taskiq", "worker", "--log-level", "ERROR", "with_taskiq:broker")
ITEMS = 20_000
broker = AioPikaBroker(URL)


@broker.task(task_name="note")
async def note(payload: str) -> int:
    """Do the work in the event loop, as the guide does."""
    return mark(payload)


note_slowly = broker.task(task_name="note_slowly")(mark_slowly)  # sleeping: in a thread


@functools.cache
def loop() -> asyncio.AbstractEventLoop:
    """Start the event loop of this process, and connect."""
    loop = asyncio.new_event_loop()
    loop.run_until_complete(broker.startup())
    return loop


def send(kicks: Iterable[Any], together: int) -> None:
    """Publish tasks, so many at a time."""
    kicks = iter(kicks)
    while batch := list(islice(kicks, together)):
        loop().run_until_complete(wait(batch))


async def wait(batch: list[Any]) -> None:
    """Wait until all of them are published."""
    await asyncio.gather(*batch)


def publish(number: int, payload: str) -> None:
    """Publish tasks one at a time."""
    send((note.kiq(payload) for _ in range(number)), 1)


def publish_bulk(number: int, payload: str) -> None:
    """Publish tasks, a thousand of them at a time under way."""
    send((note.kiq(payload) for _ in range(number)), 1000)


def publish_slow(number: int, first: int = 0) -> None:
    """Publish tasks of 20 ms, which know their number."""
    send((note_slowly.kiq(one) for one in range(first, first + number)), 1000)


def publish_items(number: int) -> None:
    """Publish tiny items, each in a message of its own."""
    publish_bulk(number, "x")


def close() -> None:
    """Disconnect."""
    loop().run_until_complete(broker.shutdown())
