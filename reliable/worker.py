"""The consumer of a worker: it connects, and declares what it needs.

https://docs.celeryq.dev/en/stable/userguide/extending.html#consumer
"""

import math
from typing import Any, NoReturn

import celery
from amqp import AccessRefused, NotAllowed, PreconditionFailed
from celery.exceptions import WorkerShutdown
from celery.utils.log import get_logger
from celery.worker.consumer import Consumer as CeleryConsumer
from kombu import Connection, Queue
from kombu.common import ignore_errors
from kombu.utils.imports import symbol_by_name

from reliable import topology
from reliable.acknowledging import AcknowledgesInGroups
from reliable.delivery import Message, Request
from reliable.errors import describe_error
from reliable.refusing import RefusesMessages

logger = get_logger(__name__)

#: How often a worker looks for queues that were out of reach, in seconds.
LOOK_AGAIN = 15
#: How often a worker replaces processes that have died, in seconds. Celery looks as soon as a process dies,
#: too early for about one in five, and then every five seconds.
REPLACE = 0.5
#: How often a worker forgets the time limits of tasks that ended, in seconds.
SWEEP = 10


class Consumer(AcknowledgesInGroups, RefusesMessages):
    """The consumer of a worker. It declares the topology, and loses no message."""

    class Blueprint(CeleryConsumer.Blueprint):
        """The steps in which a consumer starts.

        It leaves out DelayedDelivery, which waits for each node that is down (`topology.declare` does its
        work), and Gossip, which ends the worker when it receives an event that it does not understand. It
        adds Alive.
        """

        default_steps = [  # noqa: RUF012  (as Celery declares it)
            step
            for step in [*CeleryConsumer.Blueprint.default_steps, "reliable.alive:Alive"]
            if "DelayedDelivery" not in step and "Gossip" not in step
        ]

    def __init__(self, *args: Any, **options: Any) -> None:
        self.out_of_reach: list[Queue] = []
        super().__init__(*args, **options)
        self.timer.call_repeatedly(LOOK_AGAIN, self.look_again)
        pool = type(self.pool).__module__.rpartition(".")[2]  # Such as "prefork" or "thread"
        if pool == "solo":
            self.amqheartbeat = 0  # It cannot answer while a task runs; RabbitMQ would close the connection
        if pool not in ("prefork", "gevent") and self.controller.time_limit:
            logger.warning("The %s pool has no time limits: a task that hangs is never stopped", pool)
        self.warn_of_long_tasks()

    def warn_of_long_tasks(self) -> None:
        """Warn if RabbitMQ may deliver a task again while it still runs."""
        usual = self.app.conf.task_time_limit or self.controller.time_limit or math.inf
        queues = self.app.amqp.queues.consume_from
        longest: dict[str, tuple[float, str]] = dict.fromkeys(queues, (usual, ""))
        for task in self.app.tasks.values():
            if (task.time_limit or 0) > usual and (name := self.queue_name(task)) in queues:
                longest[name] = max(longest[name], (task.time_limit, f" of {task.name}"))
        for name, (limit, of_task) in longest.items():
            is_broadcast = queues[name].exchange.type == "fanout"
            arguments = queues[name].queue_arguments or {}
            timeout = arguments.get("x-consumer-timeout", topology.CONSUMER_TIMEOUT)
            which = (
                f"the time limit of {limit:g} s{of_task}"
                if limit < math.inf
                else "tasks without a time limit"
            )
            if not is_broadcast and timeout < topology.consumer_timeout(limit):
                logger.warning(
                    "RabbitMQ delivers a task of the queue %s again after %d s, which is too soon for %s. "
                    "See the argument time_limit of work_queue()",
                    name,
                    timeout / 1000,
                    which,
                )

    def queue_name(self, task: celery.Task) -> str:
        """Return the name of the queue that a task goes to by default, or "" if its route needs a call."""
        options = {"queue": task.queue} if getattr(task, "queue", None) else {}
        try:
            return str(self.app.amqp.router.route(options, task.name, (), {}, task)["queue"].name)
        except Exception:  # noqa: BLE001  (a route may be a function of the project)
            return ""

    @property
    def max_prefetch_count(self) -> int:
        """Return how many messages to prefetch after a reconnect: enough for `--autoscale` to grow again.

        Celery counts the processes that run at that moment. If there is only one, the worker never grows
        again.
        """
        autoscaler = self.controller.autoscaler
        processes = autoscaler.max_concurrency if autoscaler else self.pool.num_processes
        return processes * self.prefetch_multiplier

    def update_strategies(self) -> None:
        """Use the Request of this package for all tasks, and add it to that of a task that has its own."""
        for task in self.app.tasks.values():
            own = symbol_by_name(task.Request)
            if issubclass(Request, own):
                task.Request = Request
            elif not issubclass(own, Request):
                task.Request = type(own.__name__, (own, Request), {})
        super().update_strategies()

    def add_task_queue(self, queue: str, *args: Any, **options: Any) -> None:
        """Consume from one more queue. Forget one that RabbitMQ refuses: it would prevent a reconnect."""
        is_new = queue not in self.app.amqp.queues
        try:
            super().add_task_queue(queue, *args, **options)
        except self.channel_errors:
            if is_new:
                self.app.amqp.queues.deselect([queue])
                self.app.amqp.queues.pop(queue, None)
            raise

    def connect(self) -> Connection:
        """Connect, or reconnect after a lost connection, and declare the topology.

        Raises:
            celery.exceptions.WorkerShutdown: RabbitMQ refused something that only an operator can fix.
        """
        try:
            connection = super().connect()
            try:
                missing = topology.declare(self.app, connection)
            except Exception:  # Celery knows of the connection only when this method returns it
                ignore_errors(connection, connection.close)
                raise
        except PreconditionFailed as error:
            self.shut_down(error)
        except (AccessRefused, NotAllowed) as error:
            if self.restart_count:
                raise  # It was let in before, and may be again
            self.shut_down(error)  # Otherwise it would try again at once, forever
        self.app.topology_is_declared = True
        if connection.transport.driver_type == "amqp":
            connection.default_channel.Message = Message
        consumed = self.app.amqp.queues.consume_from  # Fewer than all, with the option -Q
        self.out_of_reach += [queue for queue in missing if queue.name in consumed]
        self.app.amqp.queues.deselect([queue.name for queue in self.out_of_reach])
        if self.hub:
            self.timer.call_repeatedly(SWEEP, self.sweep_timers)
            if hasattr(self.pool._pool, "maintain_pool"):  # Prefork
                self.timer.call_repeatedly(REPLACE, self.pool._pool.maintain_pool)
        return connection

    def on_close(self) -> None:
        """Keep the tasks that a process has, but has not yet reported as started.

        Celery forgets them when the worker stops or loses its connection. They run all the same, but are not
        acknowledged, so RabbitMQ delivers them again. And the worker takes half a minute to stop: its
        processes wait until it has read their results.
        """
        pool = self.pool._pool
        if hasattr(pool, "_active_writers"):  # Prefork
            for job in pool._cache.values():
                is_sent = job._write_to and job._writer() not in pool._active_writers
                if is_sent and job not in pool.outbound_buffer:  # Not to be sent again
                    job._accepted = True
        super().on_close()

    def shut_down(self, error: Exception) -> NoReturn:
        """End the worker, with the reason and a fix in its log."""
        logger.critical("%s\nFix: %s", *describe_error(error))
        raise WorkerShutdown(2) from None

    def look_again(self) -> None:
        """Consume from the queues whose RabbitMQ node is back."""
        for queue in self.out_of_reach.copy():
            if topology.declare_if_reachable(self.app, queue):
                self.add_task_queue(queue.name)
                self.out_of_reach.remove(queue)

    def sweep_timers(self) -> None:
        """Forget the time limits of tasks that ended. Otherwise each uses memory until its time has come."""
        timers = [timer for timer in self.timer.queue if not timer.entry.canceled]
        self.timer.clear()
        for timer in timers:
            self.timer.enter_at(timer.entry, timer.eta, timer.priority)

    def connection_for_write(self, url: str | None = None, heartbeat: float | None = None) -> Connection:
        """Connect to publish events, without confirms.

        Otherwise the queue of a dead monitor refuses an event, and the worker publishes it again, forever.
        """
        options = {"confirm_publish": False}
        connection = self.app.connection_for_write(url, heartbeat=heartbeat, transport_options=options)
        return self.ensure_connected(connection)
