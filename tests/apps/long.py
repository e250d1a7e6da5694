"""Tasks that take longer than RabbitMQ usually waits for an acknowledgement, with the times scaled down."""

import sys
import time
from pathlib import Path

from reliable import Celery
from reliable.environment import read_environment
from reliable.topology import work_queue

app = Celery("long")
app.conf.update(read_environment(Path(".env"))._asdict())
app.conf.task_queues = [work_queue("default"), work_queue("long", time_limit=20)]
app.conf.task_routes = {"apps.long.render": {"queue": "long"}}


@app.task(time_limit=5000)
def rehearse() -> None:
    """Take too long for the queue that it is sent to."""


@app.task(time_limit=20)
def render(seconds: float) -> str:
    """Render a film, simulated by sleeping."""
    print("started", file=sys.stderr)
    time.sleep(seconds)
    return "rendered"
