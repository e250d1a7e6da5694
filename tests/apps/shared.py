"""Tasks that any app can use, as a reusable Django app has them."""

import os
import signal

from celery import Task, shared_task


@shared_task
def double(number: int) -> int:
    """Return twice the number."""
    return 2 * number


@shared_task(bind=True)
def crash_once(self: Task) -> int:
    """Kill the worker process in the first attempt. Return the number of retries."""
    if not self.request.retries:
        os.kill(os.getpid(), signal.SIGKILL)
    return int(self.request.retries)
