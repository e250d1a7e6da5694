"""Settings of the Celery app, and its topology in RabbitMQ: exchanges, queues and bindings.

Celery takes every lower-case name below that it knows as a setting. Each one that is not Celery's
default says what goes wrong without it. Variables are read from the environment and, where it is
silent, from the file `.env` beside this one; `.env.example` lists them.

Settings: https://docs.celeryq.dev/en/stable/userguide/configuration.html
Queue arguments: https://www.rabbitmq.com/docs/queues#optional-arguments
"""

import os
import ssl
import sys
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import quote, urlsplit

from dotenv import load_dotenv
from dotenv.parser import parse_stream
from kombu import Exchange, Queue


def stop(cause: str, cure: str) -> NoReturn:
    """Print what is wrong around the program and its cure, two lines on stderr; exit status 2."""
    print(f"{cause}\nCure: {cure}", file=sys.stderr)
    raise SystemExit(2)


def read_env_file(path: Path) -> None:
    """Copy the variables of a `.env` file to the environment, which keeps what it has already."""
    try:
        with path.open(encoding="utf-8") as file:
            broken = [str(binding.original.line) for binding in parse_stream(file) if binding.error]
    except FileNotFoundError:
        return
    except (OSError, UnicodeDecodeError) as error:
        stop(f"{path} can't be read: {error}", "compare it with .env.example, or remove it")
    if broken:
        stop(f"{path}, line {', '.join(broken)}: not NAME=value", "compare it with .env.example")
    load_dotenv(path, interpolate=False)  # a "$" is a "$", as in single quotes for Docker Compose


def checked_url(variable: str, url: str) -> str:
    """Return the broker URL (several with ";" between them); stop at one that Celery can't use."""
    cure = f"correct {variable} as .env.example shows; a special sign in a password is written %XX"
    for part in url.split(";"):
        try:
            scheme, port = urlsplit(part).scheme, urlsplit(part).port
        except ValueError:  # its text may quote a piece of the password
            port = 0
        if port == 0:
            stop(f"{variable}: the port is no number from 1 to 65535", cure)
        if scheme not in ("amqp", "amqps") and part != "memory://":
            stop(f"{variable}: the URL does not start with amqp:// or amqps://", cure)
    return url


def checked_files(*variables: str) -> list[str | None]:
    """Return the PEM files that these variables name: CA, certificate, key; stop at what is none."""
    named = [os.environ.get(variable) for variable in variables]
    files = [str(Path(__file__).parent / name) if name else None for name in named]
    authority, certificate, key = files
    cure = f"name PEM files in {', '.join(variables)}: see .env.example"
    if bool(certificate) != bool(key):
        stop(f"{variables[1]} and {variables[2]} go together", cure)
    try:
        context = ssl.create_default_context(cafile=authority)
        if certificate:
            context.load_cert_chain(certificate, key)
    except OSError as error:
        stop(f"{', '.join(filter(None, named))}: {error}", cure)
    return files


read_env_file(Path(__file__).with_name(".env"))

# --- The broker and the result backend ----------------------------------------------------------
_user = quote(os.environ.get("RABBITMQ_USER") or "guest", safe="")
_password = quote(os.environ.get("RABBITMQ_PASSWORD") or "guest", safe="")
_host = os.environ.get("RABBITMQ_HOST") or "127.0.0.1"
_host = f"[{_host}]" if ":" in _host else _host
_ca, _certificate, _key = checked_files("RABBITMQ_CA", "RABBITMQ_CERT", "RABBITMQ_KEY")
_scheme, _usual_port = ("amqps", "5671") if _ca or _certificate else ("amqp", "5672")
_port = os.environ.get("RABBITMQ_PORT") or _usual_port
if os.environ.get("CELERY_BROKER_URL"):
    broker_url = checked_url("CELERY_BROKER_URL", os.environ["CELERY_BROKER_URL"])
else:
    broker_url = checked_url("RABBITMQ_PORT", f"{_scheme}://{_user}:{_password}@{_host}:{_port}//")
for _name in ("CELERY_BROKER_READ_URL", "CELERY_BROKER_WRITE_URL"):
    if os.environ.get(_name):  # Celery would use it, unchecked
        stop(f"{_name} is set", "set CELERY_BROKER_URL only")
_schemes = {urlsplit(part).scheme for part in broker_url.split(";")}
if "amqps" in _schemes or _ca:
    if _schemes != {"amqps"}:
        stop("CELERY_BROKER_URL is without TLS, in part", "amqps:// is with TLS: correct .env")
    # Without: any certificate of a public CA would do for RabbitMQ's. Its host name: `TLSTransport`.
    # https://www.rabbitmq.com/docs/ssl
    broker_use_ssl = {
        "ca_certs": _ca,  # none: those that this system trusts
        "cert_reqs": ssl.CERT_REQUIRED,
        "certfile": _certificate,
        "keyfile": _key,
    }
if _certificate:  # it says who we are, in the place of a user and a password
    broker_login_method = "EXTERNAL"

# Results come back as messages to the process that asked for them. There are no chords with rpc://.
# https://docs.celeryq.dev/en/stable/userguide/tasks.html#rpc-result-backend-rabbitmq-qpid
result_backend = os.environ.get("CELERY_RESULT_BACKEND") or "rpc://"
# A caller that dies leaves its results behind; without this for a day. Seconds.
result_expires = 3600

# --- Exchanges and queues -----------------------------------------------------------------------
# Without an alternate exchange RabbitMQ confirms, and drops, a message that no binding matches.
# https://www.rabbitmq.com/docs/ae
unrouted = Queue("unrouted", Exchange("unrouted", "fanout"), queue_arguments={"x-queue-type": "quorum"})
# Without a dead-letter exchange failed work vanishes. https://www.rabbitmq.com/docs/dlx
# Without the limit, from RabbitMQ 4.0 on, a dead letter that was looked at 20 times is gone.
dead_letters = Queue(
    "dead-letters",
    Exchange("dead-letters", "fanout"),
    queue_arguments={"x-queue-type": "quorum", "x-delivery-limit": 1_000_000},
)
# A topic exchange, since a countdown on a direct one would hold a slot of the worker all the while.
# https://docs.celeryq.dev/en/stable/getting-started/backends-and-brokers/rabbitmq.html#native-delayed-delivery
_tasks = Exchange("tasks", "topic", arguments={"alternate-exchange": unrouted.exchange.name})


# Of a task that kills its process, a worker tells the caller at this many deliveries (SafeTask) …
poison_limit = 3
# Quorum queues live on several nodes of a cluster: without, one dead node loses the queue.
# https://www.rabbitmq.com/docs/quorum-queues
_quorum = {
    "x-queue-type": "quorum",
    # … and RabbitMQ stops it some deliveries later even if no worker can. Without: an endless crash loop.
    "x-delivery-limit": poison_limit + 2,
    "x-dead-letter-strategy": "at-least-once",  # without: a dead letter on its way can be lost
}


def _queue(name: str, kind: dict[str, Any] = _quorum) -> Queue:
    """Describe a work queue. Without the check: `low` would also take the delayed tasks of `mail.low`."""
    if "." in name:
        stop(
            f"The queue {name!r} has a dot in its name", "take another sign in its place, in celeryconfig.py"
        )
    ours = {"x-dead-letter-exchange": dead_letters.exchange.name, "x-overflow": "reject-publish"}
    return Queue(name, _tasks, routing_key=name, queue_arguments={**kind, **ours})


task_queues = [
    _queue("default"),
    # Classic, since quorum queues know priorities from RabbitMQ 4.3 on only: urgent work would wait.
    # https://www.rabbitmq.com/docs/priority
    _queue("priority", {"x-queue-type": "classic", "x-max-priority": 9}),
]
task_default_queue = task_default_routing_key = "default"
task_default_exchange, task_default_exchange_type = _tasks.name, _tasks.type
# By queue name only: routed by routing key, a task with a countdown raises KeyError.
task_routes = {"tasks.serve_customer": {"queue": "priority"}}
# Without: a misspelt queue name makes a queue that nobody consumes.
task_create_missing_queues = False

# --- Publishing ---------------------------------------------------------------------------------
# Without: a web request hangs while RabbitMQ is down. Seconds.
task_publish_retry_policy = {"max_retries": 3, "interval_start": 0.2, "interval_step": 0.5, "interval_max": 1}
broker_transport_options = {
    **task_publish_retry_policy,  # without: a caller who waits for a result goes on for minutes
    "confirm_publish": True,  # without: messages under way are lost when a connection drops
    "read_timeout": 10,  # seconds; without: while RabbitMQ blocks publishers, they hang for ever
    "write_timeout": 10,
}
# Unpickling a message runs what its author wrote into it: JSON only (Celery's default, kept in sight).
accept_content = ["json"]

# --- Consuming ----------------------------------------------------------------------------------
# A task is acknowledged after it ran: without, a killed process takes its task along.
task_acks_late = task_reject_on_worker_lost = True
# A failed task becomes a dead letter. Without: it is gone.
task_acks_on_failure = False
# Without: RabbitMQ takes a task back that is not acknowledged in 30 minutes, and delivers it again, for
# ever. It may have to wait for one of the other queue. A longer limit needs a longer `consumer_timeout`.
# https://www.rabbitmq.com/docs/consumers#acknowledgement-timeout
task_time_limit = 14 * 60  # seconds
# Without: one worker hoards what another could run, and urgent work waits behind it.
worker_prefetch_multiplier = 1
# Without: after a lost connection a task runs twice at once.
worker_cancel_long_running_tasks_on_connection_loss = True
# Without: Celery's consumer acknowledges, and so loses, a message that is not JSON.
worker_consumer = "tasks:SafeConsumer"
# Without: a quick stop throws back work that was almost done. Seconds.
worker_soft_shutdown_timeout = 10
# Without: a worker that starts before RabbitMQ exits.
broker_connection_retry_on_startup = True
# Without: a worker exits when RabbitMQ closes a channel, as it does with a task of over 30 minutes.
broker_channel_error_retry = True
# Without: a worker notices a dead RabbitMQ after four minutes. Seconds.
broker_heartbeat = 30
# Without: a second worker of the same name, or a restart after a cut connection, exits with 405.
control_queue_exclusive, control_queue_durable = False, True

# --- Periodic tasks, published by `celery -A tasks beat` ----------------------------------------
# "expires": without, a worker that was away for a day runs them all; so they are dead letters. Seconds.
beat_schedule = {
    "report stock": {"task": "tasks.report_stock", "schedule": 10.0, "options": {"expires": 10.0}}
}
