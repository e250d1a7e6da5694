"""A message in a worker, and the one place that handles each kind of failure.

https://docs.celeryq.dev/en/stable/userguide/tasks.html#requests-and-custom-requests
"""

import bz2
import contextlib
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from functools import partial
from typing import Any

from billiard.einfo import ExceptionInfo
from celery.app.task import Context
from celery.exceptions import InvalidTaskError, Retry, TimeLimitExceeded, WorkerLostError
from celery.utils.log import get_logger
from celery.worker.request import Request as CeleryRequest
from kombu.compression import decompress
from kombu.transport.pyamqp import Message as AMQPMessage

from reliable.errors import UnreportedError
from reliable.publishing import SECRET

NoneType = type(None)
logger = get_logger(__name__)

#: How large a message may be when it is unpacked, in bytes. Otherwise a small one could fill the memory.
LARGEST = 16 * 2**20
#: How long a worker may hold a task until it is due, in seconds.
LATEST_ETA = 15 * 60
#: The compressions that can be bounded. Others, such as zstd, are left to kombu.
DECOMPRESSORS: dict[str, Callable[[], Any]] = {
    "application/x-gzip": zlib.decompressobj,
    "application/x-bz2": bz2.BZ2Decompressor,
    "application/x-lzma": lzma.LZMADecompressor,
}


def unpack(body: bytes, compression: str) -> bytes:
    """Return the body of a message as it was before it was compressed.

    Raises:
        ValueError: it is larger than LARGEST.
        KeyError: the compression is not installed.
    """
    if compression not in DECOMPRESSORS:
        return decompress(body, compression)
    unpacked: bytes = DECOMPRESSORS[compression]().decompress(body, LARGEST + 1)
    if len(unpacked) > LARGEST:
        raise ValueError(f"the body has more than {LARGEST} bytes when it is unpacked")
    return unpacked


class Message(AMQPMessage):
    """A message that a worker unpacks only up to the limit LARGEST."""

    body: bytes

    def __init__(self, msg: Any, channel: Any = None, **options: Any) -> None:
        headers = msg.properties.get("application_headers") or {}
        compression = headers.pop("compression", None)  # Hidden from kombu, which would unpack it all
        super().__init__(msg, channel, **options)
        if compression is None:
            return
        self.headers["compression"] = compression
        try:
            self.body = unpack(self.body, compression)
        except Exception:  # noqa: BLE001  (whatever the body is)
            self.errors.append(sys.exc_info())


class Request(CeleryRequest):
    """One delivery of a task."""

    is_over_its_limit = False
    is_reporting = False
    #: The acknowledgement or rejection that is sent once the failure has been reported.
    held_step: Callable[[], None] | None = None

    def __init_subclass__(cls, **options: Any) -> None:
        """Change the class that Celery derives for each task.

        When a task has called `sys.exit()` in a thread, Celery passes the error to `on_success`, which fails.
        """
        super().__init_subclass__(**options)
        on_success = cls.on_success

        def on_success_or_exit(self: Any, outcome: Any, **options: Any) -> Any:
            if isinstance(outcome, ExceptionInfo):
                return self.on_failure(outcome)
            return on_success(self, outcome, **options)

        cls.on_success = on_success_or_exit

    def __init__(self, message: Any, **options: Any) -> None:
        """Check a message.

        Raises:
            celery.exceptions.InvalidTaskError: parts of it are not as Celery makes them. Later they would
                leave a worker process waiting forever, or the message would be lost.
        """
        super().__init__(message, **options)
        if self.is_secret:  # Its caller may not know
            self.request_dict.update(SECRET)
            self._argsrepr, self._kwargsrepr = SECRET.values()
        limits = self.request_dict.get("timelimit") or (None, None)
        stamps = self.request_dict.get("stamped_headers") or []
        if not isinstance(self.kwargs, dict):
            raise InvalidTaskError("the keyword arguments are not a mapping")
        if len(limits) != 2 or not all(isinstance(limit, (int, float, NoneType)) for limit in limits):
            raise InvalidTaskError("the time limits must be two numbers or None")
        hard, soft = limits[0] or self.task.time_limit, limits[1] or self.task.soft_time_limit
        if hard and soft:  # A pool begins to wait for the hard limit when the soft one has passed
            self.time_limits = (hard, min(hard, soft))
        if any(callable(getattr(Context, name, None)) for name in self.request_dict):
            raise InvalidTaskError("a header has the name of a method")
        if not isinstance(stamps, list) or not all(isinstance(stamp, str) for stamp in stamps):
            raise InvalidTaskError("the stamped headers must be names")
        # Through the delay queues a task arrives when it is due. Otherwise it would wait in the worker
        # without an acknowledgement, and RabbitMQ would redeliver it after 30 minutes, again and again.
        latest = datetime.now(timezone.utc) + timedelta(seconds=LATEST_ETA)
        if self.eta and self.eta > latest and isinstance(message, Message):
            raise InvalidTaskError(
                "the eta is more than 15 minutes away, and the task did not come through the delay queues"
            )

    @property
    def is_secret(self) -> bool:
        """Return whether the arguments are hidden."""
        return bool(getattr(self.task, "secret", False))

    def on_failure(self, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False) -> None:
        """Keep a task that ran out of memory as a dead letter. Celery would end the whole worker."""
        error = exc_info.exception
        if not isinstance(error, Retry):
            error = getattr(error, "exc", error)  # billiard wraps it
        self.is_over_its_limit = isinstance(error, TimeLimitExceeded)
        if self.is_over_its_limit and not return_ok:  # Its process is killed, and on_timeout comes next
            return
        is_lost = isinstance(error, (WorkerLostError, SystemExit, KeyboardInterrupt))
        if is_lost and not (self._already_cancelled or self._already_revoked):
            # Celery logs it without the id of the task
            logger.error("Task %s[%s] lost its process: %r", self.name, self.id, error)
        with self.reporting_first(), contextlib.suppress(MemoryError):
            if isinstance(error, MemoryError):
                self.reject(requeue=False)
            super().on_failure(exc_info, send_failed_event, return_ok)

    def on_timeout(self, soft: bool, timeout: float) -> None:
        """Report a time limit to the caller. After the hard one the task becomes a dead letter."""
        self.is_over_its_limit = not soft
        with self.reporting_first():
            super().on_timeout(soft, timeout)

    def acknowledge(self) -> None:
        """Acknowledge the message."""
        self.do_when_reported(super().acknowledge)

    def reject(self, requeue: bool = False) -> None:
        """Reject the message. Celery would requeue a task over its hard time limit forever."""
        self.do_when_reported(partial(super().reject, requeue=requeue and not self.is_over_its_limit))

    def do_when_reported(self, step: Callable[[], None]) -> None:
        """Acknowledge or reject the message: now, or once a failure has been reported."""
        if self.is_reporting:
            self.held_step = step
        else:
            step()

    @contextlib.contextmanager
    def reporting_first(self) -> Iterator[None]:
        """Report a failure, and then acknowledge or reject the message. Celery does it in the other order.

        If RabbitMQ does not accept the report, the message is requeued.
        """
        self.is_reporting = True
        try:
            yield
        except UnreportedError as error:
            logger.critical(
                "Cannot report the failure of %s to its caller, so RabbitMQ will redeliver it: %s",
                self,
                error,
            )
            self.held_step = partial(super().reject, requeue=True)
        except Exception:  # Odd parts of the message. Otherwise the worker process is never free again
            logger.exception("Handling the failure of a task failed as well")
            self.held_step = partial(super().reject, requeue=False)
        finally:
            self.is_reporting = False
        if self.held_step:
            self.held_step()

    def cancel(self, pool: Any, signal: Any = None, emit_retry: bool = False) -> None:
        """Stop a task whose connection is lost. RabbitMQ delivers it again.

        Celery would first report a retry to its caller, which it cannot do while RabbitMQ is down, and then
        that the task was revoked.
        """
        self._already_cancelled = True
        super().cancel(pool, signal, emit_retry=False)

    def info(self, safe: bool = False) -> Any:
        """Answer `celery inspect active`, without the arguments of a secret task."""
        return super().info(safe=safe or self.is_secret)
