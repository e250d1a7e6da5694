"""Settings that keep Celery from losing tasks: the defaults of `reliable.Celery`.

The settings of an app override them, and so does an option of `celery worker` such as `task_acks_late=no`.

https://docs.celeryq.dev/en/stable/userguide/configuration.html
"""

from typing import Any

from reliable import topology

_publish_retries = {"max_retries": 3, "interval_start": 0.2, "interval_step": 0.5, "interval_max": 1}

#: Settings that Celery looks up anew at each call. `task_always_eager` is not among them: tests change it in
#: the settings of Django.
LOOKED_UP = (
    "broker_pool_acquire_timeout",
    "task_default_queue",
    "task_repr_maxlevels",
    "task_send_sent_event",
)
SETTINGS: dict[str, Any] = {
    # Where RabbitMQ is by default. Otherwise kombu warns again and again that it assumes this.
    "broker_url": "amqp://guest:guest@localhost:5672//",
    # --- Publishing ---
    # Otherwise a web request hangs while RabbitMQ is down. The intervals are in seconds.
    "task_publish_retry_policy": _publish_retries,
    "broker_transport_options": {
        # Otherwise a caller that waits for a result tries to reconnect for minutes.
        **_publish_retries,
        # Otherwise messages in flight are lost when a connection drops.
        "confirm_publish": True,
        # Otherwise a publisher hangs forever while RabbitMQ is short of memory or disk space.
        "read_timeout": 10,  # Seconds
        "write_timeout": 10,  # Seconds
    },
    # --- Queues ---
    "task_queues": [topology.work_queue("default")],
    "task_default_queue": "default",
    "task_default_routing_key": "default",
    "task_default_exchange": topology.TASKS.name,
    "task_default_exchange_type": topology.TASKS.type,
    # Otherwise a misspelt queue name creates a queue that nobody consumes from.
    "task_create_missing_queues": False,
    # --- Running a task ---
    # A task is acknowledged after it has run. Otherwise a killed process takes its task with it.
    "task_acks_late": True,
    # A task whose process was killed is published again, at most `max_retries` times, and then fails.
    "task_retry_on_worker_lost": True,
    # If that retry cannot be published, RabbitMQ delivers the task again. Otherwise it would be lost.
    "task_reject_on_worker_lost": True,
    # A failed task becomes a dead letter, and so does one over its hard time limit. Otherwise RabbitMQ
    # deletes it.
    "task_acks_on_failure": False,
    "task_acks_on_timeout": False,
    # RabbitMQ redelivers a task that is not acknowledged within 30 minutes, again and again. A task may wait
    # for one other task of the same worker process first.
    # https://www.rabbitmq.com/docs/consumers#acknowledgement-timeout
    "task_time_limit": 14 * 60,  # Seconds
    # --- Workers ---
    # Otherwise one worker hoards tasks that another could run, and urgent tasks wait behind them.
    "worker_prefetch_multiplier": 1,
    # Otherwise each running task runs twice at the same time after its worker has lost the connection.
    "worker_cancel_long_running_tasks_on_connection_loss": True,
    # Otherwise a message that is not JSON is acknowledged, and so lost.
    "worker_consumer": "reliable.worker:Consumer",
    # Otherwise SIGQUIT requeues tasks that are almost done.
    "worker_soft_shutdown_timeout": 10,  # Seconds
    # Otherwise a worker exits if it starts before RabbitMQ.
    "broker_connection_retry_on_startup": True,
    # Otherwise a worker exits after 45 minutes without RabbitMQ.
    "broker_connection_max_retries": None,
    # Otherwise a worker exits when RabbitMQ closes a channel.
    "broker_channel_error_retry": True,
    # Otherwise a worker takes four minutes to notice a dead RabbitMQ.
    "broker_heartbeat": 30,  # Seconds
    # Otherwise a second worker of the same name exits, and so does a worker that reconnects.
    "control_queue_exclusive": False,
    "control_queue_durable": True,
    # --- Results ---
    # Otherwise the results for a caller that died stay for a day.
    "result_expires": 3600,  # Seconds
    # Otherwise results are lost when RabbitMQ restarts.
    "result_persistent": True,
    # Otherwise a result is lost, and its task acknowledged, after three attempts to reach its database.
    "result_backend_always_retry": True,
    "result_backend_max_retries": 1_000_000,
    # All threads of a program share one reply queue. Otherwise the results for a thread that has ended are
    # lost.
    "result_backend_thread_safe": True,
}
