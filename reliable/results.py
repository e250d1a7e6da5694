"""The rpc:// result backend: a result reaches the program that called the task, as long as that program runs.

https://docs.celeryq.dev/en/stable/userguide/tasks.html#rpc-result-backend-rabbitmq-qpid
"""

import atexit
import contextlib
import itertools
import math
import os
import sys
import threading
import time
from typing import Any

from amqp import AMQPError
from celery import states
from celery.result import task_join_will_block
from kombu import Producer, Queue

from reliable.chords import ChordBackend
from reliable.errors import UNREACHABLE
from reliable.result_consumer import RECONNECT, ResultConsumer

#: How many times to look again for the state of a task when RabbitMQ reports an error, once a second.
ATTEMPTS = 5
#: How long a program waits before it looks for new states again, in seconds.
LOOK_AGAIN = 0.02


class RPCBackend(ChordBackend):
    """Results as messages in a reply queue of the program that calls, one for all of its threads."""

    ResultConsumer = ResultConsumer

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.deletes_queue_at_exit = False
        self.declaring = threading.Lock()
        self.attempts = itertools.count()  # To declare the reply queue for the first time
        self.receive_again = 0.0  # When `receive` looks again, in seconds of the monotonic clock
        # Otherwise Celery drops the oldest of more than 8,192 unread results.
        self._pending_messages.maxsize = None

    @property
    def retry_policy(self) -> dict[str, Any]:
        """Return how many times, and at what intervals, to publish a state again.

        A task waits for RabbitMQ as long as it takes, since a late result is better than an error. The main
        process of a worker has other work to do.
        """
        most = None if self.app.current_worker_task else 1
        return {**self.app.conf.task_publish_retry_policy, "max_retries": most}

    @property
    def binding(self) -> Queue:
        """Describe the reply queue: it outlives a connection, and expires when it is not used.

        The results in it expire as well. Otherwise it grows while a program never asks for them.
        """
        # A result may come long after this program last used the queue
        expires = self.expires and 2 * self.expires
        return self.temporary_queue(self.oid, expires=expires, message_ttl=self.expires)

    def add_pending_result(self, result: Any, *args: Any, **options: Any) -> Any:
        """Wait for a result, or find it among those that came before."""
        with self.result_consumer.lock:
            added = super().add_pending_result(result, *args, **options)
            if not self._pending_messages.get(result.id, True):
                del self._pending_messages[result.id]  # Otherwise its empty buffer stays forever
            return added

    def get_task_meta(self, task_id: str, backlog_limit: int = sys.maxsize) -> Any:
        """Return the state of a task, for `.state` and `.ready()`.

        By default Celery raises an error if more than 1,000 results wait, for example from a hundred chords.
        After the first `get()` the consumer receives all results, and Celery's own method finds none.
        """
        with self.result_consumer.lock:
            if self.result_consumer.has_started:
                self.receive()
            self.delete_queue_at_exit()  # Celery declares the queue to look into it
            meta = self.look_up(task_id, backlog_limit)
            unfinished = self.result_consumer.unfinished.get(task_id)
            is_unknown = meta["status"] == states.PENDING
            return self.meta_from_decoded(dict(unfinished)) if unfinished and is_unknown else meta

    def receive(self) -> None:
        """Receive the waiting results, unless that was done just now: a group asks for each of its tasks."""
        now = time.monotonic()
        if now < self.receive_again:
            return
        for _ in range(2):  # If RabbitMQ has closed the connection of a program that was idle, connect again
            timeout = 0.01 if self.result_consumer.is_consuming else 1
            with contextlib.suppress(TimeoutError):
                while time.monotonic() < now + 1:  # Not for longer, even if results keep coming
                    self.result_consumer.drain_events(timeout)
                    timeout = 0.01
            if self.result_consumer.is_consuming:
                break
        pause = LOOK_AGAIN if self.result_consumer.is_consuming else RECONNECT
        self.receive_again = time.monotonic() + pause

    def _slurp_from_queue(self, *args: Any, **options: Any) -> Any:
        """Look into the reply queue, unless the consumer receives all that comes there."""
        return () if self.result_consumer.has_started else super()._slurp_from_queue(*args, **options)

    def look_up(self, task_id: str, backlog_limit: int) -> Any:
        """Look into the reply queue. Try again while a cluster elects a leader, which takes some seconds."""
        for _ in range(ATTEMPTS):
            with contextlib.suppress(AMQPError, OSError):
                return super().get_task_meta(task_id, backlog_limit)
            time.sleep(1)
        return super().get_task_meta(task_id, backlog_limit)

    def on_task_call(self, producer: Producer, task_id: str) -> None:
        """Declare the reply queue before the first call, and again after a lost connection.

        Celery declares it at every call. A call within a task has no reply queue, since a task must not wait
        for another. The queue expires if nobody consumes from it, so after half of `result_expires` without a
        result, this method starts to consume.
        """
        if task_join_will_block():
            return
        declared = producer.connection.declared_entities  # kombu forgets them with the connection
        unread = time.monotonic() - self.result_consumer.last_result
        is_expiring = unread > (self.expires or math.inf) / 2
        if self.oid in declared and not is_expiring:
            return
        with self.declaring:  # No other thread may publish before the first declaration is done
            is_new = not self.deletes_queue_at_exit
            self.declare(self.binding, producer, self.attempts if is_new else None)
            self.delete_queue_at_exit()
        declared.add(self.oid)
        if is_expiring:
            with contextlib.suppress(TimeoutError):
                self.result_consumer.drain_events(timeout=0.01)

    def delete_queue_at_exit(self) -> None:
        """Delete the reply queue when this program ends."""
        if not self.deletes_queue_at_exit:
            atexit.register(self.delete_queue, os.getpid())
            self.deletes_queue_at_exit = True

    def delete_queue(self, pid: int) -> None:
        """Delete the reply queue of this program as it ends, unless RabbitMQ is down: then the queue expires.

        A forked process, which has another `pid`, leaves the queue of its parent alone.
        """
        if os.getpid() != pid:
            return
        away_or_closed = (*UNREACHABLE, RuntimeError)
        with contextlib.suppress(*away_or_closed), self.app.pool.acquire() as connection:
            if connection.connected:
                with contextlib.suppress(*UNREACHABLE):
                    connection.drain_events(timeout=0.01)  # Notice if RabbitMQ has closed it
            connection.ensure_connection(max_retries=1, interval_start=0)
            self.binding(connection.default_channel).delete()
