"""The app: its settings, and that it changes nothing for others in the process."""

import os
import pickle
from datetime import datetime
from types import SimpleNamespace
from zoneinfo import ZoneInfo

import pytest
from celery.app.defaults import DEFAULTS
from celery.contrib.django.task import DjangoTask
from programs import python

from reliable import Celery, Task, publishing, topology
from reliable.rabbitmq_node import free_port
from reliable.settings import SETTINGS
from reliable.topology import CONSUMER_TIMEOUT, consumer_timeout, work_queue


def test_each_setting_differs_from_celerys_default() -> None:
    same = {name for name, value in SETTINGS.items() if DEFAULTS.get(name) == value}
    assert not same


def test_no_task_outlasts_the_acknowledgement_time_out() -> None:
    assert consumer_timeout(SETTINGS["task_time_limit"]) <= CONSUMER_TIMEOUT


def test_the_settings_of_an_app_override_those_of_the_package() -> None:
    app = Celery("one", set_as_current=False)
    app.config_from_object({"task_time_limit": 7200})
    assert app.conf.task_time_limit == 7200
    assert app.conf.task_acks_late
    app.conf.task_acks_late = False
    assert not app.conf.task_acks_late


def test_an_app_without_a_broker_url_warns_of_nothing(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CELERY_BROKER_URL", raising=False)
    assert (
        Celery("one", set_as_current=False).connection_for_write().as_uri()
        == "amqp://guest:**@localhost:5672//"
    )
    assert not caplog.records


def test_an_app_that_sets_a_transport_option_keeps_the_others() -> None:
    app = Celery("one", set_as_current=False)
    app.conf.update(broker_transport_options={"global_keyprefix": "shop", "read_timeout": 60})
    options = app.connection_for_write().transport_options
    assert (
        options.items() >= {"confirm_publish": True, "read_timeout": 60, "global_keyprefix": "shop"}.items()
    )
    app.conf.broker_transport_options = {"confirm_publish": False}
    assert not app.connection_for_write().transport_options["confirm_publish"]


def test_a_queue_is_out_of_reach_if_no_node_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CELERY_BROKER_URL", raising=False)
    app = Celery("one", broker=f"amqp://127.0.0.1:{free_port()}//", set_as_current=False)
    assert not topology.declare_if_reachable(app, work_queue("default"))


def test_two_apps_have_settings_and_tasks_of_their_own() -> None:
    one, other = (Celery(name, set_as_current=False) for name in ("one", "other"))
    one.conf.task_time_limit = 60
    one.conf.broker_transport_options["confirm_publish"] = False
    one.conf.task_queues.append(work_queue("slow"))
    one.topology_is_declared = True
    assert other.conf.task_time_limit == SETTINGS["task_time_limit"]
    assert other.conf.broker_transport_options["confirm_publish"]
    assert list(other.amqp.queues) == ["default"]
    assert not other.topology_is_declared
    assert one.oid != other.oid


def test_an_app_can_be_pickled() -> None:
    app = Celery("one", set_as_current=False)
    app.conf.task_time_limit = 60
    copy = pickle.loads(pickle.dumps(app))  # noqa: S301  (it is our own)
    assert type(copy) is Celery
    assert (copy.conf.task_time_limit, copy.conf.task_acks_late) == (60, True)


def test_a_queue_name_with_a_dot_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        work_queue("mail.low")
    what, fix = capsys.readouterr().err.splitlines()
    assert "'mail.low'" in what
    assert fix.startswith("Fix: ")


def test_an_eta_across_a_change_of_clocks_is_not_an_hour_off() -> None:
    app = Celery("one", set_as_current=False)
    app.conf.timezone = "Europe/Berlin"
    # Given the evening before the clocks go back at three o'clock
    app.now = lambda: datetime(2026, 10, 24, 20, tzinfo=ZoneInfo("Europe/Berlin"))
    options = {"eta": datetime(2026, 10, 25, 8, tzinfo=ZoneInfo("Europe/Berlin"))}
    publishing.prepare(app, "task", options)
    assert options == {"countdown": 13 * 60 * 60}


def test_a_retry_policy_may_name_errors() -> None:
    app = Celery("one", broker="memory://", set_as_current=False)
    app.conf.task_publish_retry_policy = {"max_retries": 1, "retry_errors": (ValueError,)}
    app.declare_topology_once()
    assert app.topology_is_declared


def test_a_forked_process_has_connections_of_its_own() -> None:
    app = Celery("one", broker="memory://", set_as_current=False)

    def parts() -> list[object]:
        return [app.pool, app.producer_pool, app.control.mailbox, app.backend]

    before = parts()
    process = os.fork()
    if not process:
        os._exit(sum(after is part for after, part in zip(parts(), before, strict=True)))
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0


def test_tasks_run_eagerly_without_rabbitmq() -> None:
    app = Celery("one", broker="amqp://127.0.0.1:1//", set_as_current=False)
    app.conf.task_always_eager = True

    @app.task
    def add(x: int, y: int) -> int:
        return x + y

    assert add.delay(2, 2).get() == 4


def test_the_base_class_of_an_app_may_add_what_celery_has_for_django() -> None:
    class ShopTask(Task, DjangoTask):
        """A task that can be called when a transaction is stored."""

    app = Celery("shop", task_cls=ShopTask, set_as_current=False)
    assert {"on_replace", "delay_on_commit"} <= {*dir(app.Task)}
    assert app.Task.Request == Task.Request


def test_other_apps_in_the_process_are_as_they_were() -> None:
    code = (
        "import kombu.compression, kombu.transport, celery, json\n"
        "def seen():\n"
        "    app = celery.Celery('other', broker='memory://')\n"
        "    packed = kombu.compression.compress('x' * 2**25, 'zlib')\n"
        "    return [kombu.compression.decompress(*packed) == b'x' * 2**25,\n"
        "        sorted(kombu.compression.encoders()), dict(kombu.transport.TRANSPORT_ALIASES),\n"
        "        app.conf.task_acks_late, app.Task.Request, app.amqp.Consumer.__module__,\n"
        "        app.loader.override_backends]\n"
        "kombu.compression.register(bytes.lower, bytes.upper, 'application/zstd', ['zstd'])\n"
        "before = seen()\n"
        "import reliable, reliable.worker, reliable.results, reliable.dead_letters\n"
        "reliable.Celery('ours').conf.task_acks_late\n"
        "assert kombu.compression.decompress(b'x', 'application/zstd') == b'X'\n"
        "print(seen() == before)"
    )
    finished = python("-c", code)
    assert finished.stdout == "True\n", finished.stderr


def test_django_can_override_eager_mode_after_its_first_use() -> None:
    settings = SimpleNamespace(CELERY_TASK_ALWAYS_EAGER=False)
    app = Celery("django", set_as_current=False)
    app.config_from_object(settings, namespace="CELERY")
    assert not app.conf.task_always_eager
    settings.CELERY_TASK_ALWAYS_EAGER = True  # As override_settings does
    assert app.conf.task_always_eager


def test_a_setting_can_be_changed_after_its_first_use() -> None:
    app = Celery("changed")
    assert not app.conf.task_always_eager
    app.add_defaults({"task_always_eager": True})
    assert app.conf.task_always_eager
    app.conf.update(task_always_eager=False)
    assert not app.conf.task_always_eager
