"""The app of this project with its settings, to which the tasks of the benchmark are added."""

import json
import os
import time
from typing import Any

from celery.worker.consumer import Consumer
from work import add_up, mark, mark_slowly

from reliable import result_consumer
from reliable.acknowledging import AcknowledgesInGroups
from tasks import app

settings = json.loads(os.environ["BENCHMARK_SETTINGS"])
if settings.pop("classic", False):
    for queue in app.conf.task_queues:
        queue.queue_arguments = {}
if settings.pop("unconfirmed", False):
    app.conf.broker_transport_options |= {"confirm_publish": False}
if settings.pop("ungrouped", False):
    AcknowledgesInGroups.call_soon_ack = Consumer.call_soon_ack  # type: ignore[method-assign]
    result_consumer.GROUP = 1
app.conf.update(settings)

WORKER = ("-m", "celery", "-A", "tasks", "worker", "-c2", "-lerror", "--include", "project")
ITEMS = 200_000
note = app.task(name="note", ignore_result=True)(mark)
note_slowly = app.task(name="note_slowly", ignore_result=True)(mark_slowly)
answer = app.task(name="answer")(mark)
total = app.task(name="total")(add_up)


def publish(number: int, payload: str) -> None:
    """Publish tasks one at a time."""
    for _ in range(number):
        note.delay(payload)


def publish_bulk(number: int, payload: str) -> None:
    """Publish tasks with a thousand confirms under way."""
    app.publish_in_bulk(note.s(payload) for _ in range(number))


def publish_slow(number: int, first: int = 0) -> None:
    """Publish tasks of 20 ms, which know their number."""
    app.publish_in_bulk(note_slowly.s(one) for one in range(first, first + number))


def publish_items(number: int) -> None:
    """Publish tiny items, a thousand in a message."""
    chunks: Any = note.chunks((("x",) for _ in range(number)), 1000)
    app.publish_in_bulk(chunk.set(ignore_result=True) for chunk in chunks.group().tasks)


def collect(number: int, payload: str) -> None:
    """Publish tasks and wait for their results."""
    calls = [answer.s(payload) for _ in range(number)]
    results = [call.freeze() for call in calls]
    app.publish_in_bulk(calls)
    assert sum(result.get(timeout=60) for result in results) == number * len(payload)


def call(number: int) -> list[float]:
    """Call a task and wait for its result, again and again; return the seconds of each."""
    seconds = []
    for _ in range(number):
        started = time.perf_counter()
        answer.delay("x").get(timeout=10)
        seconds.append(time.perf_counter() - started)
    return seconds


def close() -> None:
    """Disconnect."""
    pool: Any = app.pool
    pool.force_close_all()
