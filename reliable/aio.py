"""Results in asyncio: any number of coroutines wait at once, and none blocks the event loop.

    result = await asyncio.to_thread(add.delay, 2, 2)  # Returns once RabbitMQ has confirmed the task
    four = await aget(result, timeout=5)

https://docs.python.org/3/library/asyncio-task.html#asyncio.to_thread
"""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

from celery.result import AsyncResult
from celery.utils.log import get_logger

from reliable.result_consumer import TURN, ResultConsumer

logger = get_logger(__name__)

#: How often to look for a result in a database, in seconds.
INTERVAL = 0.5


class Receiver:
    """A thread that receives the results for all coroutines of a program."""

    def __init__(self, consumer: ResultConsumer) -> None:
        self.consumer = consumer
        self.new: SimpleQueue[tuple[AsyncResult, Callable[[Any], None]]] = SimpleQueue()
        threading.Thread(target=self.run, daemon=True).start()

    def run(self) -> None:
        """Receive. Registering a result takes a lock, so a coroutine must not do it."""
        while True:
            while not self.new.empty():
                result, on_ready = self.new.get()
                result.then(on_ready, weak=True)
            try:
                self.consumer.drain_events(TURN)
            except TimeoutError:
                pass
            except Exception:  # A callback failed. If this thread ended, all coroutines would wait forever
                logger.exception("A callback of a result failed")
            time.sleep(0.0001)  # Otherwise other threads would wait for the lock


async def aget(result: AsyncResult, timeout: float | None = None) -> Any:
    """Wait for a result, and return it, as `result.get()` does. The coroutine can be cancelled.

    Args:
        result: what `delay()` or `apply_async()` of a task, a chain or a chord returned.
        timeout: how long to wait, in seconds.

    Raises:
        asyncio.TimeoutError: it did not come in time.
        Exception: whatever the task raised.
    """
    if getattr(result, "ignored", False):
        return None
    consumer = getattr(result.backend, "result_consumer", None)
    waiting = wait(result, consumer) if isinstance(consumer, ResultConsumer) else poll(result)
    await asyncio.wait_for(waiting, timeout)
    return await asyncio.to_thread(result.get)


async def wait(result: AsyncResult, consumer: ResultConsumer) -> None:
    """Wait until the receiver has a result."""
    loop, is_ready = asyncio.get_running_loop(), asyncio.Event()

    def on_ready(_: Any) -> None:
        with contextlib.suppress(RuntimeError):  # The loop has ended
            loop.call_soon_threadsafe(is_ready.set)

    if not consumer.receiver:
        consumer.receiver = Receiver(consumer)
    consumer.receiver.new.put((result, on_ready))
    await is_ready.wait()


async def poll(result: AsyncResult) -> None:
    """Wait until a database has a result."""
    while not await asyncio.to_thread(result.ready):
        await asyncio.sleep(INTERVAL)
