"""A failed task fails what was to come after it: the rest of its chain, a group, the body of a chord.

Every caller that waits for one of these gets the error.

https://docs.celeryq.dev/en/stable/userguide/canvas.html#error-handling
"""

from typing import Any

from celery.app.task import Context
from celery.backends.rpc import RPCBackend
from celery.canvas import Signature, group, maybe_signature
from kombu.utils.functional import maybe_list


class FailingBackend(RPCBackend):
    """A result backend that reports a failure to all that wait for a later task."""

    def _fail_chain(self, chain: Any, exc: Exception, *args: Any, **options: Any) -> None:
        """Fail the steps of a chain after a failed one. Celery forgets a group, whose caller would wait."""
        super()._fail_chain(chain, exc, *args, **options)
        for step in (maybe_signature(step, app=self.app) for step in chain or ()):
            for task in step.tasks if isinstance(step, group) else ():
                self.fail(task, exc)

    def fail(self, task: Signature, error: Exception) -> None:
        """Report a failure to all that wait for a later task: caller, `link_error`, chain, another chord.

        Celery's own method for chords needs a running task, which the main process of a worker does not have.
        It also forgets the other chord.
        """
        inner = task.tasks if isinstance(task, group) else [getattr(task, "body", None)]  # Of a chord
        for later in filter(None, inner):
            self.fail(later, error)
        options = task.options
        request = Context(
            options, id=task.id, task=task.task, group=options.get("group_id"), delivery_info={}
        )
        request.update(errbacks=maybe_list(options.get("link_error")), correlation_id=task.id)
        self.mark_as_failure(task.id, error, request=request)
