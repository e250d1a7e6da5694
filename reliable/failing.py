"""When a task fails, every task that should follow it fails as well: in its chain, or the body of its chord.

Every caller that waits for one of these gets the error.

https://docs.celeryq.dev/en/stable/userguide/canvas.html#error-handling
"""

from collections.abc import Iterator
from typing import Any

from celery.app.task import Context
from celery.backends.rpc import RPCBackend
from celery.canvas import Signature, _chain, chord, group, maybe_signature
from celery.exceptions import TaskRevokedError
from celery.utils.log import get_logger
from kombu.utils.functional import maybe_list

from reliable.errors import UNREACHABLE, UnreportedError, is_outage

logger = get_logger(__name__)


def walk(task: Signature) -> Iterator[Signature]:
    """Yield the tasks of a group, of a chain or of the body of a chord, and then the whole itself."""
    inner = [task.body] if isinstance(task, chord) else getattr(task, "tasks", [])
    for later in inner:
        yield from walk(later)
    yield task


def context(task: Signature) -> Context:
    """Return what a result backend needs for a task that will not run."""
    options, errbacks = task.options, maybe_list(task.options.get("link_error")) or []
    request = Context(options, id=task.id, task=task.task, group=options.get("group_id"), delivery_info={})
    request.update(errbacks=errbacks, correlation_id=task.id)
    return request


class FailingBackend(RPCBackend):
    """A result backend that reports a failure to every caller that waits for a later task."""

    def mark_as_failure(self, task_id: str, exc: Exception, *args: Any, **options: Any) -> None:
        """Report a failure.

        Raises:
            reliable.errors.UnreportedError: RabbitMQ cannot be reached, or accepts no messages.
        """
        try:
            super().mark_as_failure(task_id, exc, *args, **options)
        except UNREACHABLE as error:
            if not is_outage(error):
                raise
            raise UnreportedError(str(error)) from error

    def mark_as_retry(self, *args: Any, **options: Any) -> Any:
        """Report a retry, if RabbitMQ can be reached.

        If this raised an error, Celery would publish the retry twice.
        """
        try:
            return super().mark_as_retry(*args, **options)
        except UNREACHABLE as error:
            logger.warning("Cannot report a retry: %s", error)

    def mark_as_revoked(self, task_id: str, reason: str = "", request: Any = None, **options: Any) -> None:
        """Fail the steps of a chain after one that was revoked or expired. Celery forgets them.

        It also forgets the `link_error` of an expired task.
        """
        super().mark_as_revoked(task_id, reason, request=request, **options)
        if request:
            error = TaskRevokedError(reason)
            self._fail_chain(request.chain, error)
            if reason == "expired":
                self.call_errbacks(request, error)

    def _fail_chain(self, chain: Any, exc: Exception, *args: Any, **options: Any) -> None:
        """Fail the steps of a chain after a failed one. Celery forgets a group, whose caller would wait."""
        super()._fail_chain(chain, exc, *args, **options)
        for step in (maybe_signature(step, app=self.app) for step in chain or ()):
            while isinstance(step, chord):
                step = step.body  # noqa: PLW2901
            if isinstance(step, (group, _chain)):
                self.report(step, exc)

    def fail(self, task: Signature, error: Exception) -> None:
        """Report a failure to all that waits for a later task: caller, `link_error`, chain, another chord.

        Celery's own method for chords needs a running task, which the main process of a worker does not have.
        It also forgets the other chord.
        """
        self.report(task, error)
        for later in walk(task):
            self.call_errbacks(context(later), error)

    def call_errbacks(self, request: Context, error: Exception) -> None:
        """Call the tasks of a `link_error`. If that fails, log it."""
        try:
            if request.errbacks:
                self._call_task_errbacks(request, error, None)
        except Exception:  # The worker goes on
            logger.exception("A link_error of the task %s cannot be called", request.id)

    def report(self, task: Signature, error: Exception) -> None:
        """Report a failure to every caller that waits for a later task. Call no `link_error`."""
        for later in walk(task):
            self.mark_as_failure(later.id, error, request=context(later), call_errbacks=False)
