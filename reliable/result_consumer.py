"""How a program receives results: all of its threads share one connection, and take turns."""

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator
from itertools import takewhile
from typing import Any, NoReturn

from amqp import AMQPError
from celery.backends.asynchronous import Drainer
from celery.backends.rpc import ResultConsumer as CeleryResultConsumer
from celery.states import READY_STATES
from kombu import Message

from reliable.errors import UNREACHABLE

#: How long a thread receives before another has its turn, in seconds.
TURN = 0.1
#: How long to wait before connecting again, in seconds.
RECONNECT = 0.5
#: How many results to acknowledge at a time. `benchmarks/benchmark.py` measures the gain.
GROUP = 20


class ResultConsumer(CeleryResultConsumer):
    """Receives results from the reply queue, and acknowledges them in groups.

    After a lost connection RabbitMQ redelivers the results of the last group. Reading a result twice does no
    harm.
    """

    _connection: Any
    _consumer: Any
    on_message: Any

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        # Under gevent and eventlet Celery receives in a greenlet of its own, which would keep the lock.
        self.drainer = Drainer(self)
        #: Held by the thread that receives for all threads of the program.
        self.lock = threading.RLock()
        #: The thread that receives for coroutines. See `reliable/aio.py`.
        self.receiver: Any = None
        #: How many results are not acknowledged yet.
        self.unacknowledged = 0
        #: Whether it has started to consume, at the first `get()`. From then on it receives all results, and
        #: the queue holds none for other readers.
        self.has_started = False
        #: The last state of each task that has not ended, such as PROGRESS.
        self.unfinished: dict[str, dict[str, Any]] = {}
        #: When the last result came, in seconds of the monotonic clock.
        self.last_result = time.monotonic()
        #: When the last state of each task came, oldest first.
        self.received_at: dict[str, float] = {}

    @property
    def is_consuming(self) -> bool:
        """Return whether it consumes from the reply queue now."""
        return self._consumer is not None

    def consume_from(self, task_id: str) -> None:
        """Do nothing. `drain_events` starts to consume, since it can wait for RabbitMQ."""

    def drain_events_until(
        self, p: Any, timeout: float | None = None, on_interval: Callable[[], Any] | None = None
    ) -> Iterator[None]:
        """Receive until a promise is fulfilled. Threads take turns, and each one receives for all.

        Raises:
            TimeoutError: it was not fulfilled within `timeout` seconds.
        """
        deadline = time.monotonic() + (math.inf if timeout is None else timeout)
        while not p.ready:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise TimeoutError
            with self.lock, contextlib.suppress(TimeoutError):
                if not p.ready:
                    self.drain_events(min(remaining, TURN))
            if on_interval:
                on_interval()
            if not p.ready:
                yield  # Celery then sleeps for a moment

    def drain_events(self, timeout: float | None = None) -> None:
        """Receive what comes within `timeout` seconds, and connect first if the connection was lost.

        Raises:
            TimeoutError: nothing came.
        """
        with self.lock:
            try:
                if not self.is_consuming:
                    self.connect()
            except UNREACHABLE:
                time.sleep(RECONNECT)
                self.disconnect()
            try:
                if self._connection.supports_heartbeats:
                    self._connection.heartbeat_check()
                self._connection.drain_events(timeout=timeout)
            except TimeoutError:
                raise
            except UNREACHABLE:
                self.disconnect()

    def connect(self) -> None:
        """Consume from the reply queue over a connection of its own.

        Heartbeats let both ends notice that a firewall has cut it. Otherwise this program receives nothing,
        and RabbitMQ keeps sending. RabbitMQ also closes the connection if this program does not read from it
        for a while, since the program then sends no heartbeats.
        """
        self._connection = self.app.connection(heartbeat=self.app.conf.broker_heartbeat)
        self._consumer = self.Consumer(
            self._connection.default_channel,
            [self.backend.binding],
            callbacks=[self.acknowledge, self.on_state_change],
            accept=self.accept,
        )
        self.unacknowledged = 0
        self._consumer.consume()
        self.has_started = True

    def acknowledge(self, _state: Any, message: Message) -> None:
        """Acknowledge this result and those before it, if they are enough for a group."""
        self.unacknowledged += 1
        if self.unacknowledged >= GROUP:
            message.ack(multiple=True)
            self.unacknowledged = 0

    def disconnect(self) -> NoReturn:
        """Drop a connection that failed. Raises TimeoutError."""
        self._connection.collect()
        self._connection = self._consumer = None
        raise TimeoutError from None

    def stop(self) -> None:
        """Stop receiving, even when RabbitMQ has closed the connection of a program that was idle."""
        with contextlib.suppress(AMQPError, OSError):
            super().stop()

    def on_state_change(self, meta: dict[str, Any], message: Message) -> None:
        """Pass a state to the callers that wait for it, and forget old results that nobody has asked for.

        Raises:
            RuntimeError: `on_message` failed. Its own error could pass for a lost connection.
        """
        self.last_result = time.monotonic()
        on_message, self.on_message = self.on_message, None
        news = dict(meta)
        try:
            super().on_state_change(meta, message)
        finally:
            self.on_message = on_message
        self.received_at.pop(meta["task_id"], None)
        self.received_at[meta["task_id"]] = self.last_result
        if meta["status"] in READY_STATES:
            self.unfinished.pop(meta["task_id"], None)
        else:
            self.unfinished[meta["task_id"]] = meta
        oldest = self.last_result - (self.backend.expires or math.inf)
        for task_id in list(takewhile(lambda task_id: self.received_at[task_id] < oldest, self.received_at)):
            del self.received_at[task_id]
            self.unfinished.pop(task_id, None)
            with contextlib.suppress(KeyError):
                del self._pending_messages[task_id]
        # Call on_message last: if it fails, the state must not be lost
        try:
            if on_message:
                on_message(news)
        except UNREACHABLE as error:
            raise RuntimeError("on_message failed") from error
