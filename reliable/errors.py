"""Error messages in two lines: what happened, and one thing that fixes it."""

import ssl
import sys
from typing import NoReturn

from amqp import AccessRefused, AMQPError, NotAllowed, NotFound, PreconditionFailed
from celery.exceptions import ImproperlyConfigured
from kombu import Connection
from kombu.exceptions import OperationalError

#: What a program gets when RabbitMQ cannot be reached, or does not accept a message.
UNREACHABLE = (OperationalError, AMQPError, OSError)

CHECK_RABBITMQ = "docker compose ps, or rabbitmqctl status"
FIX_LOGIN = (
    "correct the user, password and virtual host in CELERY_BROKER_URL or .env; "
    "rabbitmqctl set_permissions grants rights"
)
FIX_MISSING = "correct the virtual host in CELERY_BROKER_URL or .env; the first worker declares what it needs"
FIX_ARGUMENTS = (
    "delete it once rabbitmqctl list_queues shows 0 messages: celery -A APP amqp queue.delete NAME "
    "(an exchange: celery -A APP amqp exchange.delete NAME no)"
)

#: What an error means, and how to fix it. The first entry that fits is used.
MEANINGS: list[tuple[type[Exception], str, str]] = [
    (ImproperlyConfigured, "A setting is wrong", "correct .env as .env.example shows"),
    (ImportError, "A setting is wrong", "correct .env as .env.example shows"),
    (PreconditionFailed, "RabbitMQ has this queue or exchange with other arguments", FIX_ARGUMENTS),
    (NotFound, "RabbitMQ has no such queue or exchange", FIX_MISSING),
    (AccessRefused, "RabbitMQ refuses this user, its password or its rights", FIX_LOGIN),
    (NotAllowed, "RabbitMQ does not let this user into the virtual host", FIX_LOGIN),
    (AMQPError, "RabbitMQ reports an error", CHECK_RABBITMQ),
    (TimeoutError, "RabbitMQ does not answer", "check its memory and disk space with rabbitmqctl status"),
]


class UnreportedError(OperationalError):
    """RabbitMQ cannot be reached, so the caller of a task is not informed of its failure."""


def is_outage(error: Exception) -> bool:
    """Return whether RabbitMQ is unreachable or accepts no messages, rather than refusing only this one."""
    refused = (AccessRefused, NotFound, PreconditionFailed)
    return isinstance(error, UNREACHABLE) and not isinstance(error, refused)


def exit_now(what: str, fix: str) -> NoReturn:
    """Print what is wrong and how to fix it, two lines on stderr, and exit with status 2."""
    print(f"{what}\nFix: {fix}", file=sys.stderr)
    raise SystemExit(2)


def describe_error(error: Exception) -> tuple[str, str]:
    """Return what an error of a setting, of RabbitMQ or of the connection to it means, and how to fix it."""
    text = " ".join(str(error).split())
    if "message size" in text:
        return f"The message is too large: {text}", "send less in one message, or raise max_message_size"
    if "is down" in text:
        return f"A RabbitMQ node is down: {text}", CHECK_RABBITMQ
    if "invalid arg" in text:
        fix = "remove it from the queue; x-max-priority may come from the setting task_queue_max_priority"
        return f"This kind of queue does not support the argument: {text}", fix
    for kind, what, fix in MEANINGS:
        if isinstance(error, kind):
            return f"{what}: {text}".removesuffix(": "), fix
    return f"The connection to RabbitMQ failed: {text}", CHECK_RABBITMQ


def describe_failed_connection(connection: Connection, error: Exception) -> tuple[str, str]:
    """Return why the connection to RabbitMQ failed, and how to fix it. The password is hidden."""
    uri, cause = connection.as_uri(), error.__cause__ or error
    if isinstance(cause, AMQPError):
        return describe_error(cause)
    if isinstance(cause, ssl.SSLCertVerificationError):
        return (
            f"The certificate of {uri} is refused ({cause.verify_message})",
            "correct RABBITMQ_CA or the host",
        )
    if isinstance(cause, ssl.SSLError):
        return (
            f"{uri} does not support TLS ({cause.reason})",
            "correct RABBITMQ_PORT; with TLS it is usually 5671",
        )
    was_cut = isinstance(cause, ConnectionResetError) or "unexpectedly closed" in str(error)
    doubt = "; does that port require TLS?" if was_cut else ""
    return (
        f"Cannot connect to RabbitMQ at {uri} ({error}{doubt})",
        "docker compose up -d --wait, or correct .env",
    )
