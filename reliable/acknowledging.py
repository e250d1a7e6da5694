"""Acknowledgements in groups, since RabbitMQ writes a group to disk in one go.

A worker does so with a prefetch multiplier above 1. `benchmarks/benchmark.py` measures the gain, which is
noticeable from a multiplier of about 4.
"""

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

from celery.worker.consumer import Consumer

#: How long an acknowledgement may wait for others, in seconds.
DELAY = 0.01


class AcknowledgesInGroups(Consumer):
    """A consumer that holds acknowledgements until it has several, or for at most DELAY.

    No worker process waits for this. The consumer holds acknowledgements for at most half of the messages
    that are prefetched for later, so for none with a prefetch multiplier of 1.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        self.held_acks: deque[Callable[[], Any]] = deque()
        super().__init__(*args, **options)

    def call_soon_ack(self, p: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Hold an acknowledgement. Only a prefork worker has its event loop free to send it later."""
        if not (self.hub and self.pool.uses_semaphore):
            return super().call_soon_ack(p, *args, **options)
        self.held_acks.append(partial(p, *args, **options))
        prefetched_for_later = self.qos.value - self.qos.value / max(self.prefetch_multiplier, 1)
        if len(self.held_acks) >= prefetched_for_later / 2:
            self.hub.call_soon(self.send_held_acks)
        elif len(self.held_acks) == 1:
            self.timer.call_after(DELAY, self.send_held_acks)
        return None

    def send_held_acks(self, _hub: Any = None) -> None:
        """Send the acknowledgements that are held."""
        while self.held_acks:
            self.held_acks.popleft()()

    def register_with_event_loop(self, hub: Any) -> None:
        """Forget the acknowledgements of the old connection. Send the held ones when the event loop ends."""
        self.held_acks.clear()
        hub.on_close.add(self.send_held_acks)
        super().register_with_event_loop(hub)
