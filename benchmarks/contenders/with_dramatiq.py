"""Dramatiq on RabbitMQ, as its guide sets it up. It has no results there, and no batches.

https://dramatiq.io/guide.html
"""

import dramatiq
from dramatiq.brokers.rabbitmq import RabbitmqBroker
from work import URL, mark, mark_slowly

WORKER = ("-m", "dramatiq", "with_dramatiq", "--processes", "2")
ITEMS = 20_000
dramatiq.set_broker(RabbitmqBroker(url=URL))


@dramatiq.actor
def note(payload: str) -> None:
    """Do the work; a value that is returned would be logged with a warning, as there are no results."""
    mark(payload)


note_slowly = dramatiq.actor(actor_name="note_slowly")(mark_slowly)


def publish(number: int, payload: str) -> None:
    """Publish tasks one at a time."""
    for _ in range(number):
        note.send(payload)


publish_bulk = publish


def publish_slow(number: int, first: int = 0) -> None:
    """Publish tasks of 20 ms, which know their number."""
    for one in range(first, first + number):
        note_slowly.send(one)


def publish_items(number: int) -> None:
    """Publish tiny items, each in a message of its own: a group of Dramatiq is no more than that."""
    dramatiq.group(note.message("x") for _ in range(number)).run()


def close() -> None:
    """Disconnect."""
    dramatiq.get_broker().close()
