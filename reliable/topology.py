"""Exchanges and queues: what they are, and how a program declares them.

https://www.rabbitmq.com/docs/queues#optional-arguments
"""

from typing import Any

import celery
from amqp import NotFound
from celery.utils.log import get_logger
from kombu import Connection, Exchange, Queue
from kombu.common import Broadcast
from kombu.exceptions import OperationalError
from kombu.transport.native_delayed_delivery import (
    bind_queue_to_native_delayed_delivery_exchange,
    declare_native_delayed_delivery_exchanges_and_queues,
)

from reliable.errors import exit_now

logger = get_logger(__name__)

#: A queue with copies on several nodes of a cluster. https://www.rabbitmq.com/docs/quorum-queues
QUORUM = {"x-queue-type": "quorum"}
#: Since RabbitMQ 4.0 a quorum queue without a limit of its own drops a message that was requeued 20 times.
_KEEP = QUORUM | {"x-delivery-limit": 1_000_000}
#: A queue that comes and goes with a program. When a node dies, RabbitMQ 4.3 holds back the messages of its
#: consumers for a minute, or for this many milliseconds.
_TEMPORARY = _KEEP | {"x-consumer-disconnected-timeout": 2000}
#: Keeps a message that no binding matches. Otherwise RabbitMQ confirms it, and drops it.
#: https://www.rabbitmq.com/docs/ae
UNROUTED = Queue("unrouted", Exchange("unrouted", "fanout"), queue_arguments=_KEEP)
#: Keeps a task that failed, with the reason. https://www.rabbitmq.com/docs/dlx
DEAD_LETTERS = Queue("dead-letters", Exchange("dead-letters", "fanout"), queue_arguments=_KEEP)
#: A topic exchange, since Celery's delay queues do not support a direct one.
TASKS = Exchange("tasks", "topic", arguments={"alternate-exchange": UNROUTED.exchange.name})
#: The arguments of a quorum queue for tasks. The limit ends a task that kills its whole worker each time, and
#: at-least-once keeps a dead letter from being lost on its way.
QUORUM_QUEUE = QUORUM | {"x-delivery-limit": 20, "x-dead-letter-strategy": "at-least-once"}
#: How long RabbitMQ waits by default for the acknowledgement of a message, in milliseconds.
CONSUMER_TIMEOUT = 1_800_000
#: How long a worker may take, after two tasks have run, to acknowledge the second one, in milliseconds.
ACKNOWLEDGING = 120_000
#: How long to wait for the node of a classic queue, in seconds. Without a limit it can be a minute.
NODE_TIMEOUT = 2


def consumer_timeout(time_limit: float) -> float:
    """Return how long RabbitMQ must wait for the acknowledgement of a task, in milliseconds.

    Another task of the same worker process may run before it. Each takes at most `time_limit` seconds.
    """
    return 2000 * time_limit + ACKNOWLEDGING


def work_queue(name: str, arguments: dict[str, Any] = QUORUM_QUEUE, time_limit: float | None = None) -> Queue:
    """Describe a queue for tasks. It keeps the tasks that fail, and refuses messages when it is full.

    Args:
        name: also the routing key. The program exits if the name has a dot, since a queue `low` would also
            receive the delayed tasks of a queue `mail.low`.
        arguments: the optional arguments of the queue.
        time_limit: the longest `time_limit` of its tasks, in seconds, if that is above 14 minutes. RabbitMQ
            has supported `x-consumer-timeout` since 3.12; for an older one, set `consumer_timeout` in
            rabbitmq.conf.
    """
    if "." in name:
        exit_now(f"The queue name {name!r} has a dot", "use another character, such as '-'")
    always: dict[str, Any] = {
        "x-dead-letter-exchange": DEAD_LETTERS.exchange.name,
        "x-overflow": "reject-publish",
    }
    if time_limit:
        always["x-consumer-timeout"] = round(consumer_timeout(time_limit))
    return Queue(name, TASKS, routing_key=name, queue_arguments=always | arguments)


def is_cluster(app: celery.Celery) -> bool:
    """Return whether the broker URL names several nodes."""
    return len(app.connection_for_write().alt) > 1


def temporary(app: celery.Celery) -> dict[str, Any]:
    """Return the arguments of a queue that comes and goes with a program.

    On one node it is classic: RabbitMQ never frees the name of a quorum queue. In a cluster it is a quorum
    queue, since a classic one is out of reach while its node is down.
    """
    return dict(_TEMPORARY) if is_cluster(app) else {}


def ensure_connection(app: celery.Celery, connection: Connection) -> None:
    """Connect, to any node of the URL, and try for as long as a publish does.

    Raises:
        kombu.exceptions.OperationalError: RabbitMQ cannot be reached.
    """
    policy = {**app.conf.task_publish_retry_policy}
    policy.pop("retry_errors", None)  # For a publish only
    connection.ensure_connection(**policy)


def declare_if_reachable(app: celery.Celery, queue: Queue) -> bool:
    """Declare a queue. Return False if it is out of reach, since its node in a cluster is down."""
    options = {"read_timeout": NODE_TIMEOUT}
    try:
        with app.connection_for_write(transport_options=options) as connection:
            ensure_connection(app, connection)
            queue(connection.channel()).declare()
    except (NotFound, TimeoutError, OperationalError):
        logger.warning("The queue %s is out of reach: its RabbitMQ node is down", queue.name)
        return False
    return True


def declare(app: celery.Celery, connection: Connection) -> list[Queue]:
    """Declare the queues of an app and Celery's delay queues. They must exist before the first message.

    Returns:
        The work queues that are out of reach.

    Raises:
        amqp.PreconditionFailed: a queue exists with other arguments.
        amqp.AccessRefused: the user may not declare a queue.
    """
    queues = [queue for queue in app.amqp.queues.values() if not isinstance(queue, Broadcast)]
    missing: list[Queue] = []
    in_cluster = is_cluster(app)
    with connection.channel() as channel:
        UNROUTED(channel).declare()
        DEAD_LETTERS(channel).declare()
        for queue in queues:
            is_quorum = QUORUM.items() <= (queue.queue_arguments or {}).items()
            if is_quorum or not in_cluster:
                queue(channel).declare()
            elif not declare_if_reachable(app, queue):
                missing.append(queue)
    if connection.transport.driver_type == "amqp":
        declare_native_delayed_delivery_exchanges_and_queues(connection, "quorum")
        for queue in queues:
            if queue not in missing:
                bind_queue_to_native_delayed_delivery_exchange(connection, queue)
    return missing
