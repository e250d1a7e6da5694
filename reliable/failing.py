"""A failed task fails what was to come after it: the rest of its chain, a group, the body of a chord.

Every caller that waits for one of these gets the error.

https://docs.celeryq.dev/en/stable/userguide/canvas.html#error-handling
"""

from typing import Any

from celery.app.task import Context
from celery.backends.rpc import RPCBackend
from celery.canvas import Signature, chord, group, maybe_signature
from celery.exceptions import TaskRevokedError
from kombu.utils.functional import maybe_list


def inner_tasks(task: Signature) -> list[Signature]:
    """Return the tasks inside a chord, a group or a chain whose results are the result of the whole."""
    if isinstance(task, chord):
        return [task.body]
    inner = getattr(task, "tasks", [])
    return list(inner if isinstance(task, group) else inner[-1:])


class FailingBackend(RPCBackend):
    """A result backend that reports a failure to all that wait for a later task."""

    def _fail_chain(self, chain: Any, exc: Exception, *args: Any, **options: Any) -> None:
        """Fail the steps of a chain after a failed one. Celery forgets a group, whose caller would wait."""
        super()._fail_chain(chain, exc, *args, **options)
        for step in (maybe_signature(step, app=self.app) for step in chain or ()):
            for task in step.tasks if isinstance(step, group) else ():
                self.fail(task, exc)

    def mark_as_revoked(self, task_id: str, reason: str = "", request: Any = None, **options: Any) -> None:
        """Fail the steps of a chain after one that was revoked or came too late. Celery forgets them."""
        super().mark_as_revoked(task_id, reason, request=request, **options)
        if request:
            self._fail_chain(request.chain, TaskRevokedError(reason))

    def fail(self, task: Signature, error: Exception) -> None:
        """Report a failure to all that wait for a later task: caller, `link_error`, chain, another chord.

        Celery's own method for chords needs a running task, which the main process of a worker does not have.
        It also forgets the other chord.
        """
        for later in inner_tasks(task):
            self.fail(later, error)
        options = task.options
        request = Context(
            options, id=task.id, task=task.task, group=options.get("group_id"), delivery_info={}
        )
        request.update(errbacks=maybe_list(options.get("link_error")), correlation_id=task.id)
        self.mark_as_failure(task.id, error, request=request)
