"""The settings of the shop. Celery reads its settings from the lower-case names below.

`reliable/settings.py` sets the defaults that make tasks safe. A setting here overrides them.

https://docs.celeryq.dev/en/stable/userguide/configuration.html
"""

from pathlib import Path

from reliable.environment import read_environment
from reliable.topology import work_queue

# --- Where RabbitMQ is --------------------------------------------------------------------------
# From the environment, or from the file `.env` beside this one. `.env.example` lists the variables.
_environment = read_environment(Path(__file__).with_name(".env"))
broker_url = _environment.broker_url
broker_use_ssl = _environment.broker_use_ssl
broker_login_method = _environment.broker_login_method

# --- Where results go ---------------------------------------------------------------------------
# By default rpc://, which sends a result as a message to the program that called the task.
result_backend = _environment.result_backend
# A program that died cannot fetch its results. RabbitMQ deletes them after this many seconds.
result_expires = 3600

# --- Queues -------------------------------------------------------------------------------------
task_queues = [
    # A quorum queue: a cluster of RabbitMQ nodes keeps copies of it.
    # https://www.rabbitmq.com/docs/quorum-queues
    work_queue("default"),
    # A classic queue, which lives on one node. Quorum queues have strict priorities only since RabbitMQ 4.3.
    # https://www.rabbitmq.com/docs/priority
    work_queue("priority", {"x-queue-type": "classic", "x-max-priority": 9}),
]
# Tasks go to the queue `default`, except these. Route by the name of the queue only: a message with another
# routing key goes to the queue `unrouted`.
task_routes = {"tasks.serve_customer": {"queue": "priority"}}

# --- Workers ------------------------------------------------------------------------------------
# A worker prefetches only as many tasks from each queue as it has processes. All others wait in the queue,
# where another worker can take them, and urgent tasks overtake them.
worker_prefetch_multiplier = 1
# A task that takes longer than this many seconds is killed, and becomes a dead letter. Otherwise RabbitMQ
# would redeliver it half an hour after it delivered it first. In this time a worker may run two tasks, since
# the second one waits in the worker for the first.
# https://www.rabbitmq.com/docs/consumers#acknowledgement-timeout
task_time_limit = 14 * 60

# --- Periodic tasks, which `celery -A tasks beat` publishes -------------------------------------
beat_schedule = {
    "report stock": {
        "task": "tasks.report_stock",
        "schedule": 10.0,  # Seconds
        # A worker that was down for a day does not run all the reports of that day.
        "options": {"expires": 10.0},  # Seconds
    },
}
