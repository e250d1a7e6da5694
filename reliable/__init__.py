"""Celery on RabbitMQ, with defaults that keep tasks from being lost.

    from reliable import Celery

    app = Celery("work")

The path of a task, and the module to read at each step:

    settings         Celery's settings, with safe defaults
    environment      where RabbitMQ is: the environment and `.env`
    publishing       a program calls a task; RabbitMQ confirms the message, or the caller gets an error
    bulk             the same for many tasks at a time
    topology         the exchanges and queues that the message goes through
    worker           a worker connects, and receives the message
    refusing         it refuses messages that it cannot process
    acknowledging    it acknowledges messages in groups
    alive            it touches a file, for a health check
    delivery         a process runs the task; every kind of failure is handled in one place
    results          the result goes back to the caller
    chords           the results of a chord wait for its body
    failing          when a task fails, the tasks that should follow it fail as well
    result_consumer  the caller receives the result
    aio              a coroutine waits for it
    dead_letters     a task that failed is kept
    commands         `celery dead-letters` lists these tasks, and runs them again

`app` puts these together, with `remote_control`. `errors` describes in two lines what is wrong. `local` finds
RabbitMQ and workers, or starts what is missing; `own_worker` runs a worker that ends with its program.
`testing` and `rabbitmq_node` start workers and RabbitMQ for tests.
"""

from reliable.app import Celery
from reliable.publishing import Task

__all__ = ["Celery", "Task"]
