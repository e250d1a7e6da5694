"""What the package uses of Celery, kombu and amqp beyond their documents: look here first at an upgrade.

Each row names the module that would have to change, and the behaviour that it relies on. What that is for,
the tests of faults show.
"""

import inspect
from typing import Any

import amqp
import celery
import pytest
from amqp.connection import Connection as AMQPConnection
from billiard.pool import ApplyResult, Pool
from celery.app.amqp import AMQP
from celery.app.control import Control
from celery.app.task import Context
from celery.app.utils import Settings
from celery.backends.asynchronous import AsyncBackendMixin, BaseResultConsumer, Drainer
from celery.backends.rpc import ResultConsumer, RPCBackend
from celery.bootsteps import StartStopStep
from celery.concurrency.asynpool import AsynPool
from celery.concurrency.base import BasePool
from celery.concurrency.prefork import TaskPool
from celery.loaders.app import AppLoader
from celery.utils.collections import BufferMap
from celery.worker.consumer import Consumer
from celery.worker.consumer.tasks import Tasks
from celery.worker.request import Request
from kombu import Connection, pools
from kombu.asynchronous import Hub
from kombu.asynchronous.timer import Timer
from kombu.common import QoS
from kombu.pidbox import Mailbox
from kombu.transport.pyamqp import Channel

#: Module, class, names, and what Celery does with them.
NEEDED: list[tuple[str, Any, str, str]] = [
    ("acknowledging", Consumer, "call_soon_ack", "acknowledges each message through it"),
    ("acknowledging", Consumer, "register_with_event_loop", "calls it for each new connection"),
    ("acknowledging", Tasks, "qos", "keeps the prefetch count in it"),
    ("acknowledging", QoS, "value", "is the prefetch count"),
    ("acknowledging", BasePool, "uses_semaphore", "is false where the event loop runs the tasks itself"),
    ("acknowledging", TaskPool, "uses_semaphore", "is true for prefork"),
    (
        "acknowledging",
        Hub,
        "on_close call_soon",
        "runs the callbacks when the loop ends, or in its next round",
    ),
    ("alive", StartStopStep, "include_if requires", "starts a step after those that it requires"),
    ("app", celery.Celery, "on_init", "is called when an app is created"),
    ("app", celery.Celery, "user_options", "holds further options of the command `celery worker`"),
    ("app", celery.Celery, "_after_fork", "drops the connections of the app"),
    ("app", celery.Celery, "_backend_cache control oid", "are created at their first use"),
    ("app", celery.Celery, "_connection", "makes each connection of the app"),
    ("app", celery.Celery, "thread_oid", "names the reply queue"),
    ("app", AppLoader, "override_backends", "maps names of result backends to classes"),
    ("app", Settings, "maps", "is searched from its first mapping to its last"),
    ("app", pools, "connections producers", "are shared by all apps of a process"),
    ("bulk", amqp.Channel, "basic_publish confirm_select", "does not wait for confirms if the option is off"),
    ("bulk", amqp.Channel, "events", "lists what is called for basic_ack and basic_nack"),
    ("bulk", AMQPConnection, "sock", "is the socket, once it is connected"),
    ("bulk", Connection, "declared_entities", "holds the hashes of what was declared, until it is closed"),
    ("chords", RPCBackend, "apply_chord", "is called before the tasks of a chord are published"),
    ("chords", RPCBackend, "on_chord_part_return", "is called when a task of a chord has ended"),
    ("chords", RPCBackend, "ensure_chords_allowed", "refuses chords"),
    (
        "chords",
        RPCBackend,
        "encode_result exception_to_python",
        "make JSON of an error, and an error of JSON",
    ),
    ("delivery", Request, "_already_cancelled", "keeps a cancelled task from being reported as revoked"),
    ("delivery", Request, "_already_revoked", "tells that the worker itself has killed the process"),
    ("delivery", Request, "request_dict time_limits", "are what the message contains"),
    ("delivery", Request, "_argsrepr _kwargsrepr", "are what events show of the arguments"),
    ("delivery", Request, "on_success on_timeout", "are called with the outcome of a task"),
    ("delivery", Request, "acknowledge reject", "are called after a task, even before it is reported"),
    ("delivery", Context, "_get_custom_headers", "is hidden by a header of the same name"),
    ("failing", RPCBackend, "mark_as_failure mark_as_retry mark_as_revoked", "report the end of a task"),
    ("failing", RPCBackend, "_fail_chain", "fails the later tasks of a chain, but no group at its end"),
    ("failing", RPCBackend, "_call_task_errbacks", "calls the tasks of a link_error"),
    ("refusing", Consumer, "create_task_handler", "returns the function that receives messages"),
    ("refusing", Consumer, "on_decode_error on_invalid_task", "are called with a malformed message"),
    ("refusing", Consumer, "on_unknown_message on_unknown_task", "are called with a message of another kind"),
    ("refusing", Channel, "no_ack_consumers", "holds the tags of consumers that do not acknowledge"),
    ("remote_control", Control, "Mailbox", "is the class of the mailbox"),
    ("remote_control", Mailbox, "get_queue get_reply_queue", "describe its queues"),
    ("result_consumer", ResultConsumer, "on_state_change stop", "take a result, and close the connection"),
    ("result_consumer", ResultConsumer, "_connection _consumer", "are None until it consumes"),
    ("result_consumer", BaseResultConsumer, "_pending_messages", "keeps results that nobody waits for yet"),
    ("result_consumer", BaseResultConsumer, "drain_events_until", "is called by each thread that waits"),
    ("result_consumer", Drainer, "drain_events_until", "receives in the thread that calls it"),
    ("results", RPCBackend, "oid binding", "are the name of the reply queue, and its description"),
    ("results", RPCBackend, "on_task_call", "is called before a task is published"),
    ("results", RPCBackend, "get_task_meta", "is called for the state of a task"),
    ("results", RPCBackend, "meta_from_decoded", "makes a result of what a message contains"),
    ("results", RPCBackend, "_slurp_from_queue", "reads the reply queue without consuming from it"),
    ("results", RPCBackend, "retry_policy", "is used to publish a result"),
    ("results", AsyncBackendMixin, "add_pending_result", "is called before a program waits for a result"),
    ("results", BaseResultConsumer, "_pending_messages", "keeps 8,192 results"),
    ("results", BufferMap, "maxsize", "is not a limit if it is None"),
    ("topology", AMQP, "queues", "holds the queues of task_queues"),
    ("worker", Consumer.Blueprint, "default_steps", "are the steps in which a consumer starts"),
    ("worker", Consumer, "restart_count", "counts the lost connections"),
    ("worker", Consumer, "amqheartbeat", "is the heartbeat of its connection"),
    ("worker", Consumer, "max_prefetch_count", "is the prefetch count after a reconnect"),
    ("worker", Consumer, "add_task_queue update_strategies", "are called at the start and by remote control"),
    ("worker", Consumer, "on_close", "forgets the tasks that no process has started"),
    ("worker", Timer, "queue enter_at", "hold the timers, also cancelled ones"),
    ("worker", BasePool, "_pool", "is the pool of billiard"),
    ("worker", AsynPool, "maintain_pool", "replaces processes that have died"),
    ("worker", Pool, "_cache", "holds the tasks that it runs or is about to"),
    ("worker", AsynPool, "_active_writers outbound_buffer", "tell which tasks no process has got yet"),
    ("worker", ApplyResult, "_accepted _write_to", "tell whether a process has reported a task, and which"),
]


@pytest.mark.parametrize(
    ("module", "owner", "name", "behaviour"),
    [(module, owner, name, does) for module, owner, names, does in NEEDED for name in names.split()],
    ids=[f"reliable.{module}: {name}" for module, _, names, _ in NEEDED for name in names.split()],
)
def test_celery_has_what_the_package_builds_on(module: str, owner: Any, name: str, behaviour: str) -> None:
    is_there = hasattr(owner, name) or f".{name} = " in inspect.getsource(inspect.getmodule(owner) or owner)
    assert is_there, f"reliable.{module} needs {name}: {behaviour}"
