"""Tasks that end their worker or block it, on a queue that delivers a message three times at most."""

import os
import signal
import time
from pathlib import Path

from reliable import Celery
from reliable.environment import read_environment
from reliable.topology import QUORUM_QUEUE, work_queue

app = Celery("deadly")
app.conf.update(read_environment(Path(".env"))._asdict())
app.conf.task_queues = [work_queue("default", QUORUM_QUEUE | {"x-delivery-limit": 2})]


@app.task
def kill_the_worker() -> None:
    """Kill the main process of the worker, and with it this one."""
    os.kill(os.getppid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


@app.task
def hang() -> None:
    """Take an hour."""
    time.sleep(3600)
