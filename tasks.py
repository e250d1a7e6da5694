"""The Celery app of a small shop: what makes every task safe, then the tasks.

    $ celery -A tasks worker
    $ celery -A tasks beat

The shop's checkout page must answer at once, while slow work goes on behind it. Mail, payment and
stock are simulated, and say so; counting words and sealing vouchers are real work.
"""

import functools
import hashlib
import itertools
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Iterable
from datetime import datetime
from typing import Any

from amqp import PreconditionFailed
from celery import Celery, Task
from celery.backends.rpc import RPCBackend
from celery.canvas import Signature
from celery.exceptions import WorkerShutdown
from celery.result import task_join_will_block  # type: ignore[attr-defined]  # the stubs lack it
from celery.utils.log import get_logger
from celery.utils.time import maybe_make_aware
from celery.worker.consumer import Consumer
from celery.worker.control import inspect_command
from kombu import Connection, Message, Producer
from kombu.common import maybe_declare
from kombu.exceptions import OperationalError
from kombu.transport.native_delayed_delivery import (
    bind_queue_to_native_delayed_delivery_exchange,
    declare_native_delayed_delivery_exchanges_and_queues,
)

import celeryconfig

logger = get_logger(__name__)


# --- What makes a task safe ---------------------------------------------------------------------
class PoisonError(Exception):
    """Raised in the place of a task that was delivered too often, for its caller to see."""


class SafeTask(Task[Any, Any]):
    """The class of every task here: a poison guard, and two traps of publishing made harmless."""

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
        """
        if isinstance(options.get("eta"), datetime):
            eta = maybe_make_aware(options.pop("eta"))
            options["countdown"] = (eta - self.app.now()).total_seconds()
        if (countdown := options.get("countdown")) is not None:
            options["countdown"] = max(countdown, 1) if countdown > 0 else None
        if not self.app.current_worker_task:  # a worker has declared it already
            declare_topology_once()
        return super().apply_async(*args, **options)


app = Celery("tasks", task_cls=SafeTask)
app.config_from_object(celeryconfig)


def declare_topology(connection: Connection) -> None:
    """Declare each queue that `celeryconfig` names, and the delay queues of Celery.

    They must be there before the first message. Raises amqp.PreconditionFailed (406) where one
    exists with other arguments, another amqp.AMQPError where the user may not declare it.
    """
    queues = [celeryconfig.unrouted, celeryconfig.dead_letters, *celeryconfig.task_queues]
    with connection.channel() as channel:
        for queue in queues:
            queue(channel).declare()
    if connection.transport.driver_type == "amqp":
        declare_native_delayed_delivery_exchanges_and_queues(connection, "quorum")
        for queue in celeryconfig.task_queues:
            bind_queue_to_native_delayed_delivery_exchange(connection, queue)


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


class SafeConsumer(Consumer):
    """The consumer of a worker: it declares the topology, and loses no message that is not JSON.

    https://docs.celeryq.dev/en/stable/userguide/configuration.html#worker-consumer
    """

    def connect(self) -> Connection:
        """Connect, also again, and declare the topology; a queue with other arguments ends the worker."""
        connection: Connection = super().connect()
        try:
            declare_topology(connection)
        except PreconditionFailed as error:
            logger.critical("%s\nCure: %s", error.reply_text, INEQUIVALENT_CURE)
            raise WorkerShutdown(2) from None
        return connection

    def on_decode_error(self, message: Message, exc: Exception) -> None:
        """Reject the message; Celery's own method acknowledges it, and so drops it."""
        logger.critical("A message that can't be decoded goes to dead-letters: %s", exc)
        message.reject()


class SafeRPCBackend(RPCBackend):
    """The rpc:// result backend, but a publisher does not wait for ever for a broker that is down."""

    def on_task_call(self, producer: Producer, task_id: str) -> None:
        """Declare the reply queue, in as many attempts as publishing has; Celery's own never ends."""
        channel: Any = producer.channel
        if not task_join_will_block():  # in a worker it is declared already
            maybe_declare(self.binding(channel), retry=True, **app.conf.task_publish_retry_policy)


app.loader.override_backends = {"rpc": "tasks:SafeRPCBackend"}


def publish_in_bulk(signatures: Iterable[Signature], window: int = 1000) -> int:
    """Publish any number of tasks, each confirmed by RabbitMQ, and return their number.

    It waits for the confirms of `window` messages at a time, not of each. Results are ignored.
    Raises kombu's OperationalError with the task that RabbitMQ refused, or the first it left open.
    """
    declare_topology_once()
    # The transport option makes py-amqp wait after each message: here the waiting is done below.
    with app.connection_for_write(transport_options={"confirm_publish": False}) as connection:
        channel: Any = connection.channel()
        producer = app.amqp.Producer(channel)
        unconfirmed: dict[int, Signature] = {}  # by delivery tag: the first message has 1, and so on

        def confirm(tag: int, multiple: bool) -> None:
            for confirmed in [t for t in unconfirmed if t <= tag] if multiple else [tag]:
                del unconfirmed[confirmed]

        def refuse(tag: int, multiple: bool) -> None:
            raise OperationalError(f"RabbitMQ refused {unconfirmed[tag]}")

        confirms = connection.transport.driver_type == "amqp"  # the embedded broker knows none
        if confirms:
            channel.events["basic_ack"].add(confirm)
            channel.events["basic_nack"].add(refuse)
            channel.confirm_select()
        errors: Any = (OperationalError, *connection.connection_errors)
        published, remaining = 0, iter(signatures)
        while batch := list(itertools.islice(remaining, window)):
            unconfirmed.update(enumerate(batch, start=published + 1))
            try:
                for task in batch:
                    task.apply_async(producer=producer, ignore_result=True, retry=False)
                while confirms and unconfirmed:
                    connection.drain_events()
            except errors as error:
                first = next(iter(unconfirmed.values()))
                raise OperationalError(f"{len(unconfirmed)} not confirmed, first {first}: {error}") from error
            published += len(batch)
            unconfirmed.clear()
    return published


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
def pack_order(self: SafeTask, items: int, seconds: float = 0.2) -> int:
    """Pack `items`, simulated by sleeping for `seconds` each, and report PROGRESS after each."""
    for packed in range(1, items + 1):
        time.sleep(seconds)
        self.update_state(state="PROGRESS", meta={"packed": packed, "items": items})
    return items


# --- Retries: each later than the one before ----------------------------------------------------
class GatewayBusyError(Exception):
    """The payment gateway asks to come back later."""


# Without jitter, so that the lesson can foretell each delay. In earnest keep Celery's default, a
# random delay up to that one: then a thousand tasks do not come back at the same moment.
@app.task(bind=True, autoretry_for=(GatewayBusyError,), retry_backoff=1, max_retries=5, retry_jitter=False)
def charge_card(self: SafeTask, order: str, busy: int = 2) -> str:
    """Charge a card at a simulated gateway that is busy `busy` times. Raises GatewayBusyError."""
    if self.request.retries < busy:
        raise GatewayBusyError(f"attempt {self.request.retries + 1} of {order}: gateway busy")
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
