"""Celery with the settings of its First Steps page, which are none.

https://docs.celeryq.dev/en/stable/getting-started/first-steps-with-celery.html
"""

import json
import os
import time
from typing import Any

from celery import Celery
from work import URL, add_up, mark, mark_slowly

WORKER = ("-m", "celery", "-A", "stock", "worker", "-c2", "-lerror")
ITEMS = 200_000
app = Celery("stock", backend="rpc://", broker=URL)
app.conf.update(json.loads(os.environ["BENCHMARK_SETTINGS"]))
# "Ignore results you don't want": https://docs.celeryq.dev/en/stable/userguide/tasks.html
note = app.task(name="note", ignore_result=True)(mark)
note_slowly = app.task(name="note_slowly", ignore_result=True)(mark_slowly)
answer = app.task(name="answer")(mark)
total = app.task(name="total")(add_up)


def publish(number: int, payload: str) -> None:
    """Publish tasks one at a time."""
    for _ in range(number):
        note.delay(payload)


def publish_bulk(number: int, payload: str) -> None:
    """Publish tasks through one producer, as the user guide advises."""
    with app.producer_or_acquire() as producer:
        for _ in range(number):
            note.apply_async((payload,), producer=producer)


def publish_slow(number: int, first: int = 0) -> None:
    """Publish tasks of 20 ms, which know their number."""
    for one in range(first, first + number):
        note_slowly.delay(one)


def publish_items(number: int) -> None:
    """Publish tiny items, a thousand in a message."""
    chunks: Any = note.chunks((("x",) for _ in range(number)), 1000)
    chunks.apply_async(ignore_result=True)


def collect(number: int, payload: str) -> None:
    """Publish tasks and wait for their results."""
    with app.producer_or_acquire() as producer:
        results = [answer.apply_async((payload,), producer=producer) for _ in range(number)]
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
