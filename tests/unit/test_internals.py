"""What the package uses of Celery, kombu and amqp beyond their documents: look here first at an upgrade.

Each row names the file that would have to change. What the behaviour is for, the tests of faults show.
"""

from typing import Any

import amqp
import celery
import pytest
from amqp.connection import Connection as AMQPConnection
from billiard.pool import ApplyResult
from celery.app.amqp import AMQP
from celery.app.control import Control
from celery.app.task import Context
from celery.backends.asynchronous import AsyncBackendMixin, Drainer
from celery.backends.rpc import ResultConsumer, RPCBackend
from celery.bootsteps import StartStopStep
from celery.concurrency.asynpool import AsynPool
from celery.concurrency.base import BasePool
from celery.concurrency.prefork import TaskPool
from celery.loaders.app import AppLoader
from celery.worker.consumer import Consumer
from celery.worker.request import Request
from kombu import Connection, pools
from kombu.asynchronous import Hub
from kombu.asynchronous.timer import Timer
from kombu.pidbox import Mailbox

NEEDED: list[tuple[str, Any, tuple[str, ...]]] = [
    ("acknowledging", Consumer, ("call_soon_ack", "register_with_event_loop")),
    ("acknowledging", BasePool, ("uses_semaphore",)),
    ("acknowledging", TaskPool, ("uses_semaphore",)),
    ("acknowledging", Hub(), ("on_close", "call_soon")),
    ("alive", StartStopStep, ("include_if", "requires")),
    (
        "app",
        celery.Celery(set_as_current=False),
        ("_after_fork", "_backend_cache", "_connection", "control", "thread_oid"),
    ),
    ("app", celery.Celery, ("on_init",)),
    ("app", AppLoader, ("override_backends",)),
    ("app", pools, ("connections", "producers")),
    ("bulk", AMQPConnection, ("blocking_read",)),
    ("bulk", amqp.Channel, ("confirm_select", "basic_publish")),
    ("chords", RPCBackend, ("apply_chord", "on_chord_part_return", "ensure_chords_allowed", "encode_result")),
    ("chords", RPCBackend, ("exception_to_python",)),
    ("failing", RPCBackend, ("mark_as_failure", "mark_as_retry", "mark_as_revoked")),
    ("failing", RPCBackend, ("_fail_chain", "_call_task_errbacks")),
    ("delivery", Request, ("_already_cancelled", "request_dict", "time_limits", "on_timeout", "reject")),
    ("delivery", Request, ("on_success", "acknowledge")),
    ("delivery", Context, ("_get_custom_headers",)),
    ("refusing", Consumer, ("on_decode_error", "on_invalid_task", "on_unknown_message", "on_unknown_task")),
    ("remote_control", Control, ("Mailbox",)),
    ("remote_control", Mailbox, ("get_queue", "get_reply_queue")),
    ("result_consumer", ResultConsumer, ("on_state_change", "drain_events_until", "stop")),
    ("results", RPCBackend, ("meta_from_decoded",)),
    ("result_consumer", Drainer, ("drain_events_until",)),
    ("results", RPCBackend, ("oid", "binding", "on_task_call", "get_task_meta", "retry_policy")),
    ("results", RPCBackend, ("_slurp_from_queue",)),
    ("results", AsyncBackendMixin, ("add_pending_result",)),
    ("results", Connection, ("declared_entities",)),
    ("topology", AMQP, ("queues",)),
    ("worker", Consumer.Blueprint, ("default_steps",)),
    ("worker", Consumer, ("restart_count", "max_prefetch_count", "add_task_queue", "update_strategies")),
    ("worker", Consumer, ("on_close",)),
    ("worker", Timer(), ("queue", "enter_at")),
    ("worker", BasePool, ("_pool",)),
    ("worker", AsynPool, ("maintain_pool", "flush")),
    ("worker", ApplyResult({}, None), ("_accepted", "_write_to")),
]


@pytest.mark.parametrize(
    ("owner", "name"),
    [(owner, name) for _, owner, names in NEEDED for name in names],
    ids=[f"reliable.{module}: {name}" for module, _, names in NEEDED for name in names],
)
def test_celery_has_what_the_package_builds_on(owner: Any, name: str) -> None:
    assert hasattr(owner, name)
