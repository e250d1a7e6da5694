"""Publishing a task: RabbitMQ has confirmed it, or its caller gets an error."""

import contextlib
from collections.abc import Iterator
from typing import Any

import celery
from amqp.exceptions import MessageNacked, NotFound
from celery.canvas import Signature
from celery.utils.time import maybe_iso8601, maybe_make_aware, subtract_datetimes
from kombu.exceptions import OperationalError

#: What logs and monitors show instead of the arguments of a secret task.
SECRET = {"argsrepr": "(secret)", "kwargsrepr": "{}"}


class QueueFullError(OperationalError):
    """The queue of a task has reached its maximum length, and refuses more."""


class Task(celery.Task):
    """The class of every task of `reliable.Celery`."""

    Request: str | type = "reliable.delivery:Request"
    #: Whether logs, monitors and the list of dead letters hide the arguments.
    secret = False
    #: How long a retry waits, in seconds, including the retry of a task whose process was killed.
    default_retry_delay = 1

    def on_replace(self, sig: Signature) -> Any:
        """Send the result of a replacement to the caller. With rpc:// Celery would send it to the worker."""
        last = sig
        while last.task in ("celery.chain", "celery.chord"):
            last = last.body if last.task == "celery.chord" else last.tasks[-1]
        last.set(reply_to=self.request.reply_to)
        return super().on_replace(sig)


def is_secret(app: celery.Celery, name: object) -> bool:
    """Return whether the arguments of the task of this name are secret. An unknown task has no secrets."""
    return bool(getattr(app.tasks.get(str(name)), "secret", False))


def prepare(app: celery.Celery, name: str, options: dict[str, Any]) -> None:
    """Adapt the options of a publish to RabbitMQ's delay queues, and hide the arguments of a secret task."""
    if eta := options.pop("eta", None):
        eta = maybe_make_aware(maybe_iso8601(eta))
        options["countdown"] = subtract_datetimes(eta, app.now()).total_seconds()
    countdown = options.get("countdown")
    if countdown is not None:
        # Celery's delay queues count whole seconds. kombu refuses a shorter delay, and a retry with one
        # would be lost.
        options["countdown"] = max(countdown, 1) if countdown > 0 else None
    if is_secret(app, name):
        options |= SECRET


@contextlib.contextmanager
def explained(name: str) -> Iterator[None]:
    """Give the error of a refused task a message. Celery's error has none.

    Raises:
        QueueFullError: the queue of the task of this name is full.
        kombu.exceptions.OperationalError: RabbitMQ did not accept the task for another reason.
    """
    try:
        yield
    except NotFound as error:
        if "is down" not in str(error):  # It is the exchange that does not exist
            raise
        raise OperationalError(f"RabbitMQ did not accept {name}: the node of its queue is down") from error
    except OperationalError as error:
        cause = error.__cause__
        refused = f"RabbitMQ did not accept {name}"
        if isinstance(cause, MessageNacked):
            raise QueueFullError(f"{refused}: its queue is full") from error
        late = "it did not confirm in time, so the task may still run"
        reason = late if isinstance(cause, TimeoutError) else error
        raise OperationalError(f"{refused}: {reason}") from error
