"""Tasks that fail in odd ways."""

import os
import signal
import sys
import time
from typing import Any

import celery
from celery import current_task
from celery.exceptions import TimeLimitExceeded
from celery.signals import task_postrun
from celery.worker.control import inspect_command
from celery.worker.request import Request as CeleryRequest

from reliable import Task
from tasks import app


@inspect_command()
def timers(state: Any) -> int:
    """Return how many timers the worker has."""
    return len(state.consumer.timer)


@app.task
def size(text: str) -> int:
    """Return the length of a text."""
    return len(text)


@app.task
def text(characters: int) -> str:
    """Return a text of this length."""
    return "x" * characters


@app.task
def unserialisable() -> object:
    """Return what is not JSON."""
    return object()


@app.task
def out_of_memory() -> None:
    """Raise MemoryError."""
    raise MemoryError("no more of it")


@app.task
def pass_a_time_limit_on() -> None:
    """Raise TimeLimitExceeded, as a task may that waits for a program of its own."""
    raise TimeLimitExceeded(5)


@app.task
def lose_a_connection() -> None:
    """Raise an error of the task's own, as of a web service that is down."""
    raise ConnectionError("the bank is away")


@app.task(time_limit=2)
def wait_with_a_limit(seconds: float) -> float:
    """Take so many seconds, within a limit."""
    print("started", file=sys.stderr)
    time.sleep(seconds)
    return seconds


@app.task(base=celery.Task, time_limit=1)
def wait_as_a_plain_task() -> None:
    """Exceed the hard limit in a task of Celery's own class."""
    time.sleep(30)


class LoggedRequest(CeleryRequest):
    """A class of its own for deliveries, as Celery's user guide describes it."""


class LoggedTask(Task):
    """A base class of its own."""

    Request = LoggedRequest


@app.task(base=LoggedTask, time_limit=1)
def wait_as_a_logged_task() -> None:
    """Exceed the hard limit in a task with its own classes."""
    time.sleep(30)


@app.task
def complain() -> None:
    """Run as `link_error` of another task."""
    print("complained", file=sys.stderr)


@app.task(bind=True)
def replace(self: Task, in_a_chain: bool) -> Any:
    """Have another task return the length of "four", or that of its number of digits."""
    raise self.replace(text.s(4) | size.s() if in_a_chain else size.s("four"))


@app.task(max_retries=0)
def kill_itself() -> None:
    """Kill the process."""
    os.kill(os.getpid(), signal.SIGKILL)


@app.task(max_retries=0, acks_on_failure=True)
def kill_itself_and_forget() -> None:
    """Kill the process, and leave no dead letter."""
    os.kill(os.getpid(), signal.SIGKILL)


@app.task(max_retries=0)
def leave() -> None:
    """End the process, as a program of the command line does when its arguments are wrong."""
    sys.exit("usage: …")


@app.task
def report_progress(file: str) -> None:
    """Report progress, and wait until a file exists."""
    current_task.update_state(state="PROGRESS", meta={"percent": 50})
    while not os.path.exists(file):
        time.sleep(0.05)


@app.task(time_limit=3600)
def wait_long() -> str:
    """Have a limit above the global one."""
    return "done"


@app.task(bind=True)
def retry_soon(self: Task) -> int:
    """Retry after half a second."""
    if not self.request.retries:
        raise self.retry(countdown=0.5)
    return int(self.request.retries)


@task_postrun.connect
def die(task: Task, retval: Any, **_: Any) -> None:
    """Kill the process after the payment, and before its acknowledgement, in the first attempt."""
    if task.name == "tasks.charge_card":
        print(f"charge_card: {retval}", file=sys.stderr)
        if "paid at attempt 1" in str(retval):
            os.kill(os.getpid(), signal.SIGKILL)
