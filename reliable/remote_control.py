"""The queues of remote control, which commands such as `celery inspect` use. They come and go.

https://docs.celeryq.dev/en/stable/userguide/workers.html#remote-control
"""

import contextlib
from typing import Any

import celery
from celery.app.control import Control as CeleryControl
from kombu import Queue
from kombu.pidbox import Mailbox as KombuMailbox

from reliable import topology


class Mailbox(KombuMailbox):
    """The mailbox of remote control. In a cluster its queues survive a dead node."""

    queue_arguments: dict[str, Any]

    def get_queue(self, hostname: str) -> Queue:
        """Describe the queue in which a worker node receives commands."""
        queue = super().get_queue(hostname)
        queue.queue_arguments = self.queue_arguments
        return queue

    def get_reply_queue(self) -> Queue:
        """Describe the queue in which a program receives the replies."""
        queue = super().get_reply_queue()
        queue.queue_arguments = self.queue_arguments
        return queue


class Control(CeleryControl):
    """Remote control that survives a dead node of a cluster, and a lost connection."""

    Mailbox = Mailbox

    def __init__(self, app: celery.Celery) -> None:
        super().__init__(app)
        self.mailbox.queue_arguments = topology.temporary(app)

    def broadcast(
        self,
        command: str,
        arguments: Any = None,
        destination: Any = None,
        connection: Any = None,
        reply: bool = False,
        *args: Any,
        **options: Any,
    ) -> Any:
        """Send a command to worker nodes, and receive their replies over a new connection.

        Celery takes one of a pool. After RabbitMQ has closed it, the first command fails.
        """
        is_given = connection or not reply
        with contextlib.nullcontext(connection) if is_given else self.app.connection_for_write() as used:
            return super().broadcast(command, arguments, destination, used, reply, *args, **options)
