"""What is wrong around a program, in two lines: what happened, and one thing that fixes it."""

import ssl
import sys
from typing import NoReturn

from amqp import AccessRefused, AMQPError, NotAllowed, PreconditionFailed
from kombu import Connection

CHECK_RABBITMQ = "docker compose ps, or rabbitmqctl status"
FIX_LOGIN = "correct the user, password and virtual host in .env; rabbitmqctl set_permissions grants rights"
FIX_ARGUMENTS = (
    "delete it once it is empty: celery -A APP amqp queue.delete NAME (or exchange.delete NAME no)"
)


def exit_now(what: str, fix: str) -> NoReturn:
    """Print what is wrong and how to fix it, two lines on stderr, and exit with status 2."""
    print(f"{what}\nFix: {fix}", file=sys.stderr)
    raise SystemExit(2)


def describe_error(error: Exception) -> tuple[str, str]:
    """Return what an error of RabbitMQ, or of the connection to it, means, and how to fix it."""
    text = " ".join(str(error).split())
    if isinstance(error, PreconditionFailed):
        return f"RabbitMQ has it with other arguments: {text}", FIX_ARGUMENTS
    if isinstance(error, AccessRefused):
        return f"RabbitMQ refuses this user or password: {text}", FIX_LOGIN
    if isinstance(error, NotAllowed):
        return f"RabbitMQ does not let this user into the virtual host: {text}", FIX_LOGIN
    if isinstance(error, AMQPError):
        return f"RabbitMQ reports an error: {text}", CHECK_RABBITMQ
    if isinstance(error, TimeoutError):
        return f"RabbitMQ does not answer: {text}", "rabbitmqctl status shows what it is short of"
    return f"The connection to RabbitMQ failed: {text}", CHECK_RABBITMQ


def describe_failed_connection(connection: Connection, error: Exception) -> tuple[str, str]:
    """Return why nothing could connect to RabbitMQ, and how to fix it. The password is hidden."""
    uri, cause = connection.as_uri(), error.__cause__ or error
    if isinstance(cause, AMQPError):
        return describe_error(cause)
    if isinstance(cause, ssl.SSLCertVerificationError):
        return f"{uri}: its certificate is refused: {cause.verify_message}", "correct RABBITMQ_CA or the host"
    if isinstance(cause, ssl.SSLError):
        return (
            f"{uri}: it does not speak TLS ({cause.reason})",
            "correct RABBITMQ_PORT, with TLS usually 5671",
        )
    was_cut = isinstance(cause, ConnectionResetError) or "unexpectedly closed" in str(error)
    doubt = "; does that port speak TLS?" if was_cut else ""
    return (
        f"Cannot connect to RabbitMQ at {uri} ({error}{doubt})",
        "docker compose up -d --wait, or correct .env",
    )
