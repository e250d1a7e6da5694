"""The Celery app of a small shop: what makes every task safe, then the tasks.

    $ celery -A tasks worker
    $ celery -A tasks beat

The shop's checkout page must answer at once, while slow work goes on behind it. Mail, payment and
stock are simulated, and say so; counting words and sealing vouchers are real work.
"""

import bz2
import contextlib
import functools
import hashlib
import itertools
import lzma
import math
import os
import re
import signal
import sqlite3
import tempfile
import threading
import time
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, ClassVar, cast

from amqp import AccessRefused, AMQPError, NotAllowed, NotFound, PreconditionFailed
from amqp.exceptions import MessageNacked
from celery import Celery, Task
from celery.app.control import Control
from celery.backends.rpc import ResultConsumer, RPCBackend
from celery.canvas import Signature
from celery.exceptions import InvalidTaskError, Retry, TimeLimitExceeded, WorkerShutdown
from celery.result import task_join_will_block  # type: ignore[attr-defined]  # the stubs lack it
from celery.signals import worker_process_init
from celery.utils.log import get_logger
from celery.utils.time import maybe_make_aware
from celery.worker.consumer import Consumer
from celery.worker.control import inspect_command
from celery.worker.request import Request
from kombu import Connection, Message, Producer, Queue, compression
from kombu.common import maybe_declare
from kombu.exceptions import ContentDisallowed, OperationalError
from kombu.pidbox import Mailbox
from kombu.transport import TRANSPORT_ALIASES
from kombu.transport.native_delayed_delivery import (
    bind_queue_to_native_delayed_delivery_exchange,
    declare_native_delayed_delivery_exchanges_and_queues,
)
from kombu.transport.pyamqp import SSLTransport

import celeryconfig

logger = get_logger(__name__)
QUORUM = {"x-queue-type": "quorum"}
SECRET = {"argsrepr": "(secret)", "kwargsrepr": "{}"}  # what logs and monitors show of arguments


# --- What comes from outside --------------------------------------------------------------------
class TLSTransport(SSLTransport):
    """AMQP over TLS, with a certificate that bears the host name of the node in use.

    kombu checks no host name, or, of several nodes, each for that of the first.
    """

    def establish_connection(self) -> Any:
        """Connect to the node whose turn it is. Raises ssl.SSLError, an OSError."""
        client: Any = self.client
        name = client.hostname
        client.ssl = {**celeryconfig.broker_use_ssl, "server_hostname": name}
        try:
            return super().establish_connection()
        finally:
            client.hostname = name  # kombu makes 127.0.0.1 of localhost


TRANSPORT_ALIASES["amqps"] = f"{__name__}:TLSTransport"


def bounded(new_decompressor: Callable[[], Any]) -> Callable[[bytes], bytes]:
    """Make a function that unpacks a message, up to 16 MiB: else a small one could fill the memory.

    The function raises ValueError.
    """

    def unpack(packed: bytes) -> bytes:
        unpacked: bytes = new_decompressor().decompress(packed, 2**24 + 1)
        if len(unpacked) > 2**24:
            raise ValueError("more than 16 MiB when it is unpacked")
        return unpacked

    return unpack


def refuse(_: bytes) -> bytes:
    """Raise ValueError, in the place of the compressions that can't be bounded."""
    raise ValueError("not compressed by zlib, bzip2 or lzma")


for _name in compression.encoders():
    compression.register(refuse, refuse, _name)
compression.register(zlib.compress, bounded(zlib.decompressobj), "application/x-gzip")
compression.register(bz2.compress, bounded(bz2.BZ2Decompressor), "application/x-bz2")
compression.register(lzma.compress, bounded(lzma.LZMADecompressor), "application/x-lzma")


# --- What makes a task safe ---------------------------------------------------------------------
class PoisonError(Exception):
    """Raised in the place of a task that was delivered too often, for its caller to see."""


class SafeRequest(Request):
    """What a worker knows of one delivery, and what it does when that goes wrong.

    https://docs.celeryq.dev/en/stable/userguide/tasks.html#requests-and-custom-requests
    """

    NONE = type(None)
    TYPES: ClassVar[dict[str, tuple[type, ...]]] = {  # of the parts of a message
        "args": (list, tuple),
        "kwargs": (dict,),
        "id": (str,),
        **dict.fromkeys(
            ("stamped_headers", "timelimit", "callbacks", "errbacks", "chain"), (list, tuple, NONE)
        ),
        **dict.fromkeys(("chord", "stamps"), (dict, NONE)),
        **dict.fromkeys(("root_id", "parent_id", "group", "shadow", "argsrepr", "kwargsrepr"), (str, NONE)),
        **dict.fromkeys(("retries", "group_index", "replaced_task_nesting", "ignore_result"), (int, NONE)),
    }

    def __init__(self, message: Message, **options: Any) -> None:
        """Take a message. Raises InvalidTaskError for one that would block a process of the pool for ever."""
        super().__init__(message, **options)
        *_, embed = options["body"] if options.get("decoded") else message.payload
        if fault := self.fault(self.request_dict | {"embed": embed}):
            raise InvalidTaskError(f"this is no task: {fault}")
        if cast(SafeTask, self.task).secret:  # whoever published it may not have hidden them
            self._argsrepr, self._kwargsrepr = SECRET.values()
            self.request_dict.update(SECRET)

    def fault(self, parts: dict[str, Any]) -> str | None:
        """Return which part of a message is not as Celery makes it."""
        embed = parts["embed"] or {}
        if not isinstance(embed, dict) or set(embed) - {"callbacks", "errbacks", "chain", "chord"}:
            return "embed"
        everything = parts | embed
        for name, types in self.TYPES.items():
            if not isinstance(everything.get(name), types):
                return name
        longest, limits = celeryconfig.task_time_limit, parts.get("timelimit") or (None, None)
        latest = datetime.now(timezone.utc) + timedelta(seconds=longest)
        rules = {
            "stamped_headers": all(isinstance(stamp, str) for stamp in parts.get("stamped_headers") or ()),
            "retries": 0 <= (parts.get("retries") or 0) < 1000,
            "timelimit": len(limits) == 2
            and all(
                limit is None or (isinstance(limit, (int, float)) and 0 < limit <= longest)
                for limit in limits
            ),
            # It is over when a task has come through the delay queues, which memory:// has not
            "eta": not self.eta or self.eta <= latest or os.environ.get("CELERY_BROKER_URL") == "memory://",
        }
        return next((name for name, kept in rules.items() if not kept), None)

    def cancel(self, pool: Any, signal: Any = None, emit_retry: bool = False) -> None:
        """Stop a task whose connection is lost: RabbitMQ delivers it again.

        Celery would first tell its caller, of a retry, or that it was revoked, in vain for up to 20 seconds.
        """
        self._already_cancelled = True
        super().cancel(pool, signal, emit_retry=False)

    def on_failure(self, exc_info: Any, *args: Any, **options: Any) -> None:
        """Keep a task over its hard time limit, or out of memory, as a dead letter.

        Celery acknowledges the first, or delivers it for ever; at a MemoryError the whole worker exits.
        """
        error = exc_info.exception
        error = error if isinstance(error, Retry) else getattr(error, "exc", error)  # billiard wraps it
        if isinstance(error, (TimeLimitExceeded, MemoryError)):
            self.reject(requeue=False)
        try:
            super().on_failure(exc_info, *args, **options)
        except MemoryError:
            pass
        except (OperationalError, *self.connection_errors):
            raise
        except Exception:  # odd parts of its message: it would block a process of the pool for ever
            logger.exception("What follows a failure failed, too")
            self.reject(requeue=False)

    def info(self, safe: bool = False) -> Any:
        """Answer `celery inspect active`, without the arguments of a secret task."""
        return super().info(safe=safe or cast(SafeTask, self.task).secret)


class SafeTask(Task[Any, Any]):
    """The class of every task here: a poison guard, and the traps of publishing made harmless."""

    Request = f"{__name__}:SafeRequest"
    secret = False  # whether its arguments are left out of logs, of monitors and of --dead-letters

    def before_start(self, task_id: str, args: Any, kwargs: Any) -> None:
        """Give up a task that took `poison_limit` processes with it, so that no caller waits for ever.

        A quorum queue counts earlier deliveries in the header x-delivery-count. Raises PoisonError.
        """
        deliveries = (self.request.headers or {}).get("x-delivery-count", 0)
        if deliveries >= celeryconfig.poison_limit:
            raise PoisonError(f"{self.name} was delivered {deliveries} times before, and never finished")

    def apply_async(self, *args: Any, **options: Any) -> Any:
        """Publish the task as Task.apply_async does, after the topology, and never with a delay < 1 s.

        RabbitMQ's delay queues count whole seconds. kombu refuses a shorter delay, and a `retry()`
        with one would be lost. https://github.com/celery/kombu (native_delayed_delivery.py)
        Raises kombu's OperationalError with the reason, where Celery's is empty.
        """
        if isinstance(options.get("eta"), datetime):
            eta = maybe_make_aware(options.pop("eta"))
            options["countdown"] = (eta - self.app.now()).total_seconds()
        if (countdown := options.get("countdown")) is not None:
            options["countdown"] = max(countdown, 1) if countdown > 0 else None
        if self.secret:
            options |= SECRET
        if not self.app.current_worker_task:  # a worker has declared it already
            declare_topology_once()
        try:
            return super().apply_async(*args, **options)
        except OperationalError as error:
            known: dict[Any, str] = {MessageNacked: "its queue is full", TimeoutError: "no confirm in time"}
            why = known.get(type(error.__cause__), error)
            raise OperationalError(f"RabbitMQ did not take {self.name}: {why}") from error


class SafeMailbox(Mailbox):
    """The queues of remote control, as quorum queues: else a dead node stops a worker of a cluster."""

    def get_queue(self, hostname: str) -> Queue:
        """Describe the queue that takes the commands for a worker node."""
        queue = super().get_queue(hostname)
        queue.queue_arguments = QUORUM
        return queue

    def get_reply_queue(self) -> Queue:
        """Describe the queue that takes the answers for a program that asked."""
        queue = super().get_reply_queue()
        queue.queue_arguments = QUORUM
        return queue


class SafeControl(Control):
    """Remote control with these queues."""

    Mailbox = SafeMailbox


app = Celery(__name__, task_cls=SafeTask, control=SafeControl)
app.config_from_object(celeryconfig)


def is_reachable(queue: Queue) -> bool:
    """Declare a work queue, and tell whether that was done in two seconds.

    It is not for a classic queue whose node in a cluster is down: RabbitMQ says 404, or nothing for a minute.
    """
    limits = {"read_timeout": 2}
    try:
        with app.connection_for_write(transport_options=limits) as connection:
            queue(connection.channel()).declare()
    except (NotFound, TimeoutError):
        logger.warning("The queue %s can't be used: its RabbitMQ node is down", queue.name)
        return False
    return True


def declare_topology(connection: Connection) -> list[Queue]:
    """Declare each queue that `celeryconfig` names, and Celery's delay queues; return those out of reach.

    They must be there before the first message. Raises amqp.PreconditionFailed (406) where one
    exists with other arguments, another amqp.AMQPError where the user may not declare it.
    """
    with connection.channel() as channel:
        for queue in (celeryconfig.unrouted, celeryconfig.dead_letters):
            queue(channel).declare()
    unreachable = [queue for queue in celeryconfig.task_queues if not is_reachable(queue)]
    if connection.transport.driver_type == "amqp":
        declare_native_delayed_delivery_exchanges_and_queues(connection, "quorum")
        for queue in celeryconfig.task_queues:
            if queue not in unreachable:
                bind_queue_to_native_delayed_delivery_exchange(connection, queue)
    return unreachable


@functools.cache
def declare_topology_once() -> None:
    """Declare the topology before a process publishes first.

    Raises kombu's OperationalError without RabbitMQ, and what declare_topology raises.
    """
    with app.connection_for_write() as connection:
        connection.ensure_connection(**app.conf.task_publish_retry_policy)
        declare_topology(connection)


INEQUIVALENT_CURE = (
    "delete it once it is empty: celery -A tasks amqp queue.delete NAME (or exchange.delete NAME no)"
)
ACCESS_CURE = "correct user, password and virtual host in .env; rabbitmqctl set_permissions gives rights"


class SafeConsumer(Consumer):
    """The consumer of a worker: it declares the topology, and loses no message that is not JSON.

    https://docs.celeryq.dev/en/stable/userguide/configuration.html#worker-consumer
    """

    class Blueprint(Consumer.Blueprint):
        """The steps in which it starts, without two.

        DelayedDelivery waits for each node that is down; an odd event ends Gossip, and with it the worker.
        """

        default_steps: ClassVar = [
            step
            for step in Consumer.Blueprint.default_steps
            if "DelayedDelivery" not in step and "Gossip" not in step
        ]

    left_out: ClassVar[list[Queue]] = []  # queues on a RabbitMQ node that is down
    held: ClassVar[deque[Callable[[], Any]]] = deque()  # acknowledgements that wait for others
    ack_delay = 0.01  # seconds that they wait at most

    def connect(self) -> Connection:
        """Connect, also again, and declare the topology; a queue with other arguments ends the worker."""
        try:
            connection: Connection = super().connect()
            for queue in declare_topology(connection):
                if queue.name in self.app.amqp.queues.consume_from:  # not with the option -Q for others
                    self.app.amqp.queues.deselect([queue.name])
                    self.left_out.append(queue)
        except PreconditionFailed as error:
            logger.critical("%s\nCure: %s", error.reply_text, INEQUIVALENT_CURE)
            raise WorkerShutdown(2) from None
        except (AccessRefused, NotAllowed) as error:  # without: it tries again at once, and for ever
            if self.restart_count:
                raise  # it was let in before, and may be again
            logger.critical("%s\nCure: %s", error.reply_text, ACCESS_CURE)
            raise WorkerShutdown(2) from None
        self.timer.call_after(15, self.take_back)
        if self.hub:
            self.timer.call_repeatedly(10, self.sweep)
        return connection

    def sweep(self) -> None:
        """Forget the time limits of tasks that have ended.

        Without: each stays in memory until its time comes, 500 bytes a task for a quarter of an hour.
        """
        timers = [timer for timer in self.timer.queue if not timer.entry.canceled]
        self.timer.clear()
        for timer in timers:
            self.timer.enter_at(timer.entry, timer.eta, timer.priority)

    def take_back(self) -> None:
        """Consume again from the queues whose node is back; look again after 15 seconds while one is not."""
        for queue in filter(is_reachable, self.left_out.copy()):
            self.left_out.remove(queue)
            self.add_task_queue(queue.name)
        if self.left_out:
            self.timer.call_after(15, self.take_back)

    def call_soon_ack(self, p: Any, *args: Any, **options: Any) -> None:
        """Hold acknowledgements back, and send them in groups: RabbitMQ writes a group to disk at once.

        No process waits for that: of what is prefetched for later, half at most is held back, so nothing
        with a prefetch multiplier of 1. Only prefork has its event loop free while tasks run.
        """
        if not (self.hub and self.pool.uses_semaphore):
            super().call_soon_ack(p, *args, **options)
            return
        self.held.append(functools.partial(p, *args, **options))
        later = self.qos.value - self.qos.value / max(self.prefetch_multiplier, 1)
        if len(self.held) >= later / 2:
            self.hub.call_soon(self.send_held)
        elif len(self.held) == 1:
            self.timer.call_after(self.ack_delay, self.send_held)

    def send_held(self, _: Any = None) -> None:
        """Send the acknowledgements that were held back."""
        with contextlib.suppress(IndexError):  # there are no more
            while True:
                self.held.popleft()()

    def register_with_event_loop(self, hub: Any) -> None:
        """Begin on a new connection; what is held when the event loop ends is sent, or would run again."""
        self.held.clear()
        hub.on_close.add(self.send_held)
        super().register_with_event_loop(hub)

    def connection_for_write(self, url: str | None = None, heartbeat: float | None = None) -> Connection:
        """Connect to publish events, unconfirmed: else a dead monitor's queue stops a worker of a cluster."""
        unconfirmed = {"confirm_publish": False}
        connection = self.app.connection_for_write(url, heartbeat=heartbeat, transport_options=unconfirmed)
        return cast(Connection, self.ensure_connected(connection))

    def create_task_handler(self, *args: Any, **options: Any) -> Callable[[Message], None]:
        """Make what takes a message; if it fails, it is the message's fault: without, the worker ends."""
        handle = super().create_task_handler(*args, **options)

        def on_task_received(message: Message) -> None:
            try:
                if message.content_type not in (message.accept or ()):
                    raise ContentDisallowed(f"{message.content_type!r} is not accepted")
                handle(message)
            except self.connection_errors:
                raise
            except Exception as error:  # noqa: BLE001  (whatever odd headers lead to)
                self.on_decode_error(message, error)

        return on_task_received

    def on_decode_error(self, message: Message, exc: Exception) -> None:
        """Reject the message; Celery's own method acknowledges it, and so drops it."""
        logger.critical("A message that can't be decoded goes to dead-letters: %r", str(exc))
        channel: Any = message.channel
        unacknowledged = channel.no_ack_consumers or ()  # those of remote control
        if not message.acknowledged and message.delivery_info.get("consumer_tag") not in unacknowledged:
            message.reject_log_error(logger, self.connection_errors)

    def on_unknown_message(self, body: Any, message: Message) -> None:
        """Reject a message that is no task; Celery would log its body, which may hold secrets."""
        super().on_unknown_message("(hidden)", message)

    def on_unknown_task(self, body: Any, message: Message, exc: Exception) -> None:
        """Reject a task that is not there, and tell its caller."""
        super().on_unknown_task("(hidden)", message, exc)

    def on_invalid_task(self, body: Any, message: Message, exc: Exception) -> None:
        """Reject a message that lacks a part of a task, or is none of ours."""
        self.on_decode_error(message, exc)


class SafeResultConsumer(ResultConsumer):
    """What takes results from the reply queue, and acknowledges each when the program has it."""

    _connection: Any
    _consumer: Any

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.lock = threading.RLock()  # without: threads that wait for results of one caller lose them
        self.alive = time.monotonic()  # when a result came last

    def consume_from(self, task_id: str) -> None:
        """Leave it to drain_events, which can wait for RabbitMQ."""

    def drain_events(self, timeout: float | None = None) -> None:
        """Take what comes within `timeout` seconds. A lost connection is made again, while somebody waits.

        Raises TimeoutError, upon which `get()` calls again, until its own time is over.
        """
        with self.lock:
            consuming = self._consumer is not None
            try:
                if not consuming:
                    self.start("", no_ack=False)
                    self._consumer.register_callback(lambda _, message: message.ack())
                    consuming = True
                self._connection.drain_events(timeout=timeout)
            except (AMQPError, OperationalError, OSError) as error:
                if not (consuming and isinstance(error, TimeoutError)):
                    self._connection.collect()
                    self._connection = self._consumer = None
                    time.sleep(timeout or 1)
                raise TimeoutError from None

    def on_state_change(self, meta: dict[str, Any], message: Message) -> None:
        """Hand a state to those who wait for it. Raises RuntimeError where their `on_message` failed."""
        self.alive = time.monotonic()
        try:
            super().on_state_change(meta, message)
        except OSError as error:  # it would pass for a lost connection
            raise RuntimeError("on_message failed") from error


class SafeRPCBackend(RPCBackend):
    """The rpc:// result backend, but no result is lost while the program that waits for it lives."""

    ResultConsumer = SafeResultConsumer

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._pending_messages.maxsize = None  # without: of more than 8,192 results the first are dropped

    def add_pending_result(self, result: Any, *args: Any, **options: Any) -> Any:
        """Wait for a result, or find it among those that came before; not while another thread takes it."""
        with self.result_consumer.lock:
            added = super().add_pending_result(result, *args, **options)
            if not self._pending_messages.get(result.id, True):
                del self._pending_messages[result.id]  # without: its empty buffer stays for ever
            return added

    def get_task_meta(self, task_id: str, backlog_limit: int = 1000) -> Any:
        """Return the state of a task, for `.state` and `.ready()`.

        Once `get()` was called, the consumer takes what comes, and Celery's own method sees nothing.
        """
        with self.result_consumer.lock:
            if self.result_consumer._consumer is not None:
                with contextlib.suppress(TimeoutError):
                    for _ in range(backlog_limit):
                        self.result_consumer.drain_events(timeout=0.01)
            return super().get_task_meta(task_id, backlog_limit)

    @property
    def binding(self) -> Queue:
        """Describe the reply queue: it outlives a connection and a node, and expires after its program."""
        queue: Queue = self.Queue(
            self.oid, self.exchange, self.oid, expires=self.expires, queue_arguments=QUORUM
        )
        return queue

    def on_task_call(self, producer: Producer, task_id: str) -> None:
        """Declare the reply queue before the first call, and after a lost connection; keep it from expiring.

        It does when nobody consumes from it, though it is declared again, as it is a quorum queue.
        Celery's own method declares it at every call, and never gives up.
        """
        connection: Any = producer.connection
        declared = connection.declared_entities  # kombu's own notes, empty after a lost connection
        unread = time.monotonic() - self.result_consumer.alive > (self.expires or math.inf) / 2
        if task_join_will_block() or (self.oid in declared and not unread):
            return  # the first: a task has no reply queue, as it must not wait for another task
        channel: Any = producer.channel
        maybe_declare(self.binding(channel), retry=True, **app.conf.task_publish_retry_policy)
        declared.add(self.oid)
        if unread:
            with contextlib.suppress(TimeoutError):
                self.result_consumer.drain_events(timeout=0.01)


app.loader.override_backends = {"rpc": f"{__name__}:SafeRPCBackend"}


@worker_process_init.connect
def connect_early(**_: Any) -> None:
    """Connect a process of the pool before its first task ends: else the first result waits for that."""

    def connect() -> None:
        pool: Any = app.pool
        with contextlib.suppress(Exception), pool.acquire(block=True) as connection:
            connection.ensure_connection(**app.conf.task_publish_retry_policy)

    threading.Thread(target=connect, daemon=True).start()  # a process must be up within four seconds


def is_secret(name: object) -> bool:
    """Tell whether the arguments of the task of this name are secret; of an unknown one they are not."""
    return bool(getattr(app.tasks.get(str(name)), "secret", False))


def shown(signature: Signature | None) -> str:
    """Return what an error may tell of a task: not the arguments of a secret one."""
    return str(signature.task) if signature and is_secret(signature.task) else f"{signature!s:.100}"


def publish_in_bulk(signatures: Iterable[Signature], window: int = 1000) -> int:
    """Publish any number of tasks, each confirmed by RabbitMQ, and return their number.

    It goes on while no more than `window` messages (at least 1) are not confirmed, and keeps no more
    tasks than that in memory. A signature is a task or a chain. For results, keep what `freeze()` of
    each returns, in the same thread; without, let the task ignore its result, or results pile up.
    Raises kombu's OperationalError with the task that RabbitMQ refused, or the first it left open.
    Any other error comes as it is, from `signatures` or from JSON: what was before it may be published.
    """
    declare_topology_once()
    # The transport option makes py-amqp wait after each message: here the waiting is done below.
    with app.connection_for_write(transport_options={"confirm_publish": False}) as connection:
        channel: Any = connection.channel()
        producer = app.amqp.Producer(channel)
        unconfirmed: dict[int, Signature] = {}  # by delivery tag: the first message has 1, and so on

        def confirm(tag: int, multiple: bool) -> None:
            for confirmed in list(itertools.takewhile(tag.__ge__, unconfirmed)) if multiple else [tag]:
                del unconfirmed[confirmed]

        def refuse(tag: int, multiple: bool) -> None:
            raise OperationalError(f"RabbitMQ refused {shown(unconfirmed[tag])}")

        confirms = connection.transport.driver_type == "amqp"  # the embedded broker knows none
        if confirms:
            channel.events["basic_ack"].add(confirm)
            channel.events["basic_nack"].add(refuse)
            channel.confirm_select()
        errors: Any = (OperationalError, *connection.connection_errors, *connection.channel_errors)

        @contextlib.contextmanager
        def telling() -> Iterator[None]:
            try:
                yield
            except errors as error:
                first = shown(next(iter(unconfirmed.values()), None))
                raise OperationalError(f"{len(unconfirmed)} not confirmed, first {first}: {error}") from error

        number = 0
        for number, task in enumerate(signatures, start=1):
            with telling():
                if confirms:
                    unconfirmed[number] = task
                task.apply_async(producer=producer, retry=False, add_to_parent=False)
                while len(unconfirmed) >= window:
                    connection.drain_events()
        with telling():
            while unconfirmed:
                connection.drain_events()
    return number


# --- Calling a task -----------------------------------------------------------------------------
@app.task
def add(x: int, y: int) -> int:
    """Return the sum of two amounts."""
    return x + y


# --- Slow work that the checkout page need not wait for -----------------------------------------
@app.task
def send_email(address: str, seconds: float = 0.5) -> str:
    """Pretend to send an e-mail through a slow server: simulated by sleeping for `seconds`."""
    time.sleep(seconds)
    return f"sent to {address}"


# --- Real input: customers' reviews, or any text ------------------------------------------------
@app.task
def count_words(text: str) -> dict[str, int]:
    """Return how often each word, be it in capitals or not, stands in `text`."""
    return Counter(re.findall(r"\w+", text.casefold()))


# --- Workflows: small tasks for a chain, a group and a chord ------------------------------------
@app.task
def add_tax(cents: int, percent: int = 20) -> int:
    """Return an amount in cents with its tax."""
    return cents + cents * percent // 100


@app.task
def total(amounts: list[int]) -> int:
    """Return the sum of amounts in cents."""
    return sum(amounts)


@app.task
def receipt(cents: int) -> str:
    """Return the line that the customer reads."""
    return f"You paid {cents / 100:.2f} EUR"


# --- Custom states: the customer watches the parcel being packed --------------------------------
@app.task(bind=True)
def pack_order(self: SafeTask, items: int, seconds: float = 0.1) -> int:
    """Pack `items`, simulated by sleeping for `seconds` each, and report PROGRESS after each."""
    for packed in range(1, items + 1):
        time.sleep(seconds)
        self.update_state(state="PROGRESS", meta={"packed": packed, "items": items})
    return items


# --- Retries: each later than the one before; and a payment that is made once, however often it runs
class GatewayBusyError(Exception):
    """The payment gateway asks to come back later."""


USER = getattr(os, "getuid", int)()  # 0 on Windows, where each user has a folder for temporary files
BOOKS = Path(tempfile.gettempdir(), f"simulated-gateway-{USER}.sqlite3")


def charge_once(order: str) -> bool:
    """Charge an order at the simulated gateway, whose books hold it once; tell whether it was new to them."""
    with contextlib.closing(sqlite3.connect(BOOKS)) as books, books:
        books.execute("CREATE TABLE IF NOT EXISTS charges (order_number PRIMARY KEY)")
        return books.execute("INSERT OR IGNORE INTO charges VALUES (?)", (order,)).rowcount == 1


# Without jitter, so that the lesson can foretell each delay. In earnest keep Celery's default, a
# random delay up to that one: then a thousand tasks do not come back at the same moment.
@app.task(
    bind=True,
    autoretry_for=(GatewayBusyError,),
    retry_backoff=1,
    max_retries=5,
    retry_jitter=False,
    secret=True,  # without: the number of the card is in the log at a failure, and in every monitor
)
def charge_card(self: SafeTask, order: str, busy: int = 2, card: str = "4111 1111 1111 1111") -> str:
    """Charge a card at a simulated gateway that is busy `busy` times. Raises GatewayBusyError.

    The number of the order is its idempotency key: a task that is delivered twice, or published
    twice by a caller who was not sure, pays once.
    """
    if self.request.retries < busy:
        raise GatewayBusyError(f"attempt {self.request.retries + 1} of {order}: gateway busy")
    if not charge_once(order):
        return f"{order} was paid before"
    return f"{order} paid at attempt {self.request.retries + 1}"


# --- Scheduled work: once at a time, or again and again by beat ---------------------------------
@app.task
def remind(customer: str) -> float:
    """Remind a customer of a full basket (simulated); return when, in seconds since the epoch."""
    return time.time()


@app.task(ignore_result=True)
def report_stock() -> None:
    """Report what is in stock (simulated): the periodic task of `celeryconfig.beat_schedule`."""
    logger.info("Stock: all lamps are there")


# --- Failures: each is told to its caller -------------------------------------------------------
class OutOfStockError(Exception):
    """There is nothing to ship, yet."""


@app.task
def ship(item: str, in_stock_from: float) -> str:
    """Ship what is in stock from a time on (seconds since the epoch). Raises OutOfStockError."""
    if time.time() < in_stock_from:
        raise OutOfStockError(f"{item}: out of stock")
    return f"{item}: shipped"


@app.task(soft_time_limit=1)
def draw_label(seconds: float) -> str:
    """Draw a label, simulated by sleeping; SoftTimeLimitExceeded is raised in here after a second."""
    time.sleep(seconds)
    return "label"


@app.task(time_limit=1)
def draw_stubborn_label(seconds: float) -> str:
    """Draw a label in code that a soft limit can't interrupt: its process is killed after a second."""
    time.sleep(seconds)
    return "label"


# --- Priorities: real work for a processor, in the queue that knows what is urgent --------------
# A classic queue counts no deliveries, so that nothing would stop a crash loop: fail at the first.
@app.task(reject_on_worker_lost=False)
def serve_customer(name: str) -> float:
    """Seal a gift voucher with scrypt, as one hashes a password; return when it was done (epoch, s)."""
    hashlib.scrypt(name.encode(), salt=b"shop", n=2**14, r=8, p=1)
    return time.time()


# --- Several worker nodes -----------------------------------------------------------------------
@app.task(bind=True)
def worker_name(self: SafeTask, seconds: float = 0.0) -> str:
    """Return the name of the worker node that ran this, after a pause of `seconds`."""
    time.sleep(seconds)
    return str(self.request.hostname)


@inspect_command()
def reload_prices(state: Any) -> dict[str, str]:
    """Answer a broadcast: a remote control command, which every worker node runs and replies to."""
    return {"ok": "prices reloaded"}


# --- Large workloads ----------------------------------------------------------------------------
@app.task(ignore_result=True)
def check_price(item: int) -> bool:
    """Do next to nothing, as tiny tasks do: what counts is the cost of the messages."""
    return item >= 0


# --- Crashes (only for a prefork pool: anywhere else they kill the worker itself) ---------------
@app.task(bind=True)
def print_label(self: SafeTask, crashes: int) -> str:
    """Kill its own process at the first `crashes` deliveries, as a fault in C code would; return the last."""
    process = f"{os.getpid()} of {self.request.hostname}"
    self.update_state(state="PRINTING", meta={"process": process})
    if (self.request.headers or {}).get("x-delivery-count", 0) < crashes:
        os.kill(os.getpid(), signal.SIGKILL)
    return process
