"""A file that a worker touches while it consumes, so that a health check needs no RabbitMQ."""

from pathlib import Path
from typing import Any

from celery import bootsteps
from celery.utils.log import get_logger
from celery.worker.consumer.tasks import Tasks

logger = get_logger(__name__)

#: How often the file is touched, in seconds.
INTERVAL = 5


class Alive(bootsteps.StartStopStep):
    """Touches a file while the worker consumes from a queue.

    The option `--alive-file` or the setting `worker_alive_file` names the file. The event loop touches it. So
    it also grows old when the loop hangs, and, with the pool `solo`, while a task runs.
    """

    requires = (Tasks,)

    def __init__(self, c: Any, alive_file: str | None = None, **options: Any) -> None:
        self.file = alive_file or c.app.conf.get("worker_alive_file")
        self.timer: Any = None
        super().__init__(c, **options)

    def include_if(self, c: Any) -> bool:
        """Return whether there is a file to touch."""
        return bool(self.file)

    def start(self, c: Any) -> None:
        """Touch the file now, and every INTERVAL seconds. Called for each new connection."""
        c.call_soon(self.touch, c)
        self.timer = c.timer.call_repeatedly(INTERVAL, c.call_soon, (self.touch, c))

    def stop(self, c: Any) -> None:
        """Leave the file alone when the connection is lost, or the worker ends."""
        if self.timer:
            self.timer.cancel()

    def touch(self, c: Any) -> None:
        """Touch the file, unless there is no queue to consume from."""
        try:
            if c.task_consumer.queues:
                Path(self.file).touch()
        except OSError as error:  # Celery would take it for a lost connection
            logger.error("The worker cannot touch its alive file: %s", error)
