"""Chords on RabbitMQ alone. Celery has them only for other result backends.

The parts of a chord, which are the results of its tasks, wait in a queue of the chord. Each task adds its
part before its message is acknowledged. The task that finds all parts there takes them, calls the body, and
deletes the queue. If its worker dies in between, RabbitMQ requeues the parts, and redelivers that task. So a
body is called once, or again after a crash.

https://docs.celeryq.dev/en/stable/userguide/canvas.html#chords
"""

import contextlib
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from amqp import ChannelError, ConsumerCancelled, NotFound
from celery import states
from celery.app.task import Context
from celery.canvas import Signature, maybe_signature
from celery.exceptions import ChordError, SoftTimeLimitExceeded
from celery.result import GroupResult
from celery.utils.log import get_logger
from kombu import Producer, Queue

from reliable import topology
from reliable.errors import UNREACHABLE, is_outage
from reliable.failing import FailingBackend
from reliable.publishing import QueueFullError

logger = get_logger(__name__)

#: How long a task waits before it tries again to add its part, and how long it waits for further parts, in
#: seconds.
RETRY = 1
#: How long a chord may take, in seconds. After that, its queue expires. Its tasks may wait for longer than
#: `result_expires`.
EXPIRES = 7 * 24 * 60 * 60
#: How long a task waits for another one that has the parts, in seconds. RabbitMQ 3.10 sometimes keeps the
#: consumer of a node that died and came back, and does not redeliver the consumer's messages.
PARTS_TIMEOUT = 5 * 60
#: How many tasks a chord may have: RabbitMQ sends at most this many parts before one is acknowledged, the
#: largest prefetch count. Without a prefetch count, a quorum queue sends only 2,000.
MOST_PARTS = 65_535


def count_tasks(results: Iterable[Any]) -> int:
    """Return how many tasks will add a part to a chord of these results."""
    return sum(count_tasks(result) if isinstance(result, GroupResult) else 1 for result in results)


def ids(results: Iterable[Any]) -> list[Any]:
    """Return the ids of the tasks of these results. The ids of a group form a nested list."""
    return [ids(result) if isinstance(result, GroupResult) else result.id for result in results]


def arrange(results: dict[str, Any], shape: list[Any]) -> list[Any]:
    """Return the results of tasks in the shape of their ids."""
    return [arrange(results, step) if isinstance(step, list) else results[step] for step in shape]


class ChordBackend(FailingBackend):
    """A result backend with chords."""

    def ensure_chords_allowed(self) -> None:
        """Allow chords, which Celery's rpc:// backend refuses."""

    def temporary_queue(
        self, name: str, arguments: dict[str, Any] | None = None, **limits: float | None
    ) -> Queue:
        """Describe a queue that expires when it is not used.

        It is bound to an exchange, though nobody publishes to it there. Without Khepri, the newer metadata
        store of RabbitMQ, a new queue is safe on disk only after the next queue or binding is declared. When
        RabbitMQ was killed less than two seconds after it had declared a queue, the queue and its messages
        were gone in 3 of 30 runs.
        """
        arguments = topology.temporary(self.app) | (arguments or {})
        return self.Queue(name, topology.TASKS, name, queue_arguments=arguments, **limits)

    def chord_queue(self, group_id: str) -> Queue:
        """Describe the queue for the parts of a chord. Only one task at a time gets them.

        https://www.rabbitmq.com/docs/consumers#single-active-consumer
        """
        sac = {"x-single-active-consumer": True}
        return self.temporary_queue(f"chord-{group_id}", sac, expires=EXPIRES)

    def apply_chord(self, header_result_args: Any, body: Any, **_: Any) -> None:
        """Declare the queue of a chord before its tasks are published, and put their number into its body.

        Raises:
            ValueError: it has more than 65,535 tasks.
            kombu.exceptions.OperationalError: RabbitMQ cannot be reached.
        """
        group_id, results = header_result_args
        body["chord_size"] = count_tasks(results)
        if body["chord_size"] > MOST_PARTS:
            raise ValueError(f"a chord can have at most {MOST_PARTS:,} tasks, got {body['chord_size']:,}")
        if any(isinstance(result, GroupResult) for result in results):  # A chain that ends in a group
            body["shape"] = ids(results)
        with self.app.amqp.producer_pool.acquire(block=True) as producer:
            self.declare(self.chord_queue(group_id), producer, itertools.count())

    def declare(self, queue: Queue, producer: Producer, attempts: Iterator[int] | None = None) -> None:
        """Declare a queue on the connection of a producer, and connect the producer again if it is lost.

        A node that died while it declared the queue may have left a broken one, which RabbitMQ 4 reports as
        declared, but which accepts no messages. So with `attempts`, for a queue that nobody has published to
        yet, every attempt but the first deletes the queue before.

        Raises:
            kombu.exceptions.OperationalError: RabbitMQ cannot be reached.
        """

        def declare() -> None:
            declared = queue(producer.channel)
            if attempts and next(attempts):
                declared.delete()
            declared.declare()

        producer.connection.ensure(producer, declare, **self.app.conf.task_publish_retry_policy)()

    def on_chord_part_return(self, request: Context, state: str, result: Any, **_: Any) -> None:
        """Add the part of a task to its chord. Wait while RabbitMQ is unreachable, as for a result.

        Raises:
            amqp.PreconditionFailed: the part is too large. The task then fails.
            kombu.exceptions.OperationalError, amqp.AMQPError, OSError: RabbitMQ cannot be reached.
                Raised only in the main process of a worker, which has other work to do.
        """
        body, queue = dict(request.chord), self.chord_queue(request.group)
        size, shape = body.pop("chord_size"), body.pop("shape", None)
        self.retry_during_outage(self.add_part, queue, request, state, result)
        self.retry_during_outage(self.complete_in_turn, queue, size, body, shape)

    def retry_during_outage(self, step: Callable[..., None], *args: Any) -> None:
        """Run a step, and repeat it while RabbitMQ cannot be reached."""
        while True:
            try:
                return step(*args)
            except UNREACHABLE as error:
                if not is_outage(error) or not self.app.current_worker_task:
                    raise
                logger.warning("A chord waits for RabbitMQ: %s", error)
                time.sleep(RETRY)

    def add_part(self, queue: Queue, request: Context, state: str, result: Any) -> None:
        """Publish the part of a task."""
        part = {
            "index": request.group_index,
            "task_id": request.id,
            "state": state,
            "result": self.encode_result(result, state),
        }
        with self.app.amqp.producer_pool.acquire(block=True) as producer:
            publish = {"retry": True, "retry_policy": self.retry_policy, "serializer": self.serializer}
            producer.publish(part, routing_key=queue.name, delivery_mode=2, **publish)

    def complete_in_turn(self, queue: Queue, size: int, body: Any, shape: list[Any] | None) -> None:
        """Complete a chord, if all parts are there and no other task is completing it."""
        deadline = time.monotonic() + PARTS_TIMEOUT
        while self.may_be_complete(queue, size):
            if time.monotonic() > deadline:
                self.give_up(queue, body)
            else:
                self.complete(queue, size, body, shape)

    def give_up(self, queue: Queue, body: Any) -> None:
        """Fail a chord whose parts somebody holds and does not use. Otherwise its tasks wait forever."""
        error = ChordError("RabbitMQ does not redeliver the parts of the chord")
        logger.critical("%s %s", error, queue.name)
        self.fail(maybe_signature(body, app=self.app), error)
        with self.app.amqp.producer_pool.acquire(block=True) as producer:
            queue(producer.channel).delete()

    def may_be_complete(self, queue: Queue, size: int) -> bool:
        """Return whether all parts of a chord are in its queue, or another task may be holding them.

        That task may die before it calls the body.
        """
        with self.app.amqp.producer_pool.acquire(block=True) as producer:
            topology.ensure_connection(self.app, producer.connection)
            try:
                with producer.connection.channel() as channel:
                    declared = queue(channel).queue_declare(passive=True)
            except ChannelError as error:
                if str(error.reply_code) != "404":  # Not found; kombu's in-memory broker has it as text
                    raise
                return False
        return declared.message_count >= size or declared.consumer_count > 0

    def complete(self, queue: Queue, size: int, body: Any, shape: list[Any] | None) -> None:
        """Take the parts of a chord. If none is missing, call the body, and delete the queue.

        A part is missing if another task holds it, or if one task has run twice and its two parts were
        counted. The duplicate is dropped, and the others are requeued.
        """
        parts: dict[str, dict[str, Any]] = {}

        def take(message: Any) -> None:
            message = channel.message_to_python(message)
            message.accept = self.accept
            part = message.payload
            if part["task_id"] in parts:
                channel.basic_ack(message.delivery_tag)
            parts.setdefault(part["task_id"], part)

        with self.app.connection_for_read() as connection:
            topology.ensure_connection(self.app, connection)
            channel = connection.channel()
            channel.basic_qos(0, MOST_PARTS, False)
            # Another task may delete the queue
            with contextlib.suppress(TimeoutError, ConsumerCancelled, NotFound):
                channel.basic_consume(queue.name, no_ack=False, consumer_tag="parts", callback=take)
                while len(parts) < size:
                    connection.drain_events(timeout=RETRY)
            if len(parts) == size:
                self.call_body(maybe_signature(body, app=self.app), parts, shape)
                queue(channel).delete()

    def call_body(self, body: Signature, parts: dict[str, dict[str, Any]], shape: list[Any] | None) -> None:
        """Call the body of a chord with the results, or fail it with the first error of a task.

        A body that cannot be called fails as well, for example if its queue is full. Otherwise each process
        of a worker might wait for the others to take a task from that queue.
        """
        in_order = sorted(parts.values(), key=lambda part: part["index"] or 0)
        failed = [part for part in in_order if part["state"] != states.SUCCESS]
        results = {part["task_id"]: part["result"] for part in in_order}
        try:
            if failed:
                cause = self.exception_to_python(failed[0]["result"])
                raise ChordError(f"Dependency {failed[0]['task_id']} raised {cause!r}") from cause
            body.delay(arrange(results, shape or list(results)))
        except ChordError as error:
            self.fail(body, error)
        except SoftTimeLimitExceeded:
            raise
        except Exception as error:
            if is_outage(error) and not isinstance(error, QueueFullError):
                raise
            self.fail(body, ChordError(f"Callback error: {error!r}"))
