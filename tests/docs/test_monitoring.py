"""Prometheus: its configuration, its alert rules, and an alert that fires when a worker is gone."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from urllib.request import urlopen

import pytest
from programs import PATHS, PROJECT, WebServer

from reliable.rabbitmq_node import Node, Program, free_port
from reliable.testing import Worker, until

MONITORING = PROJECT / "monitoring"


def program(name: str) -> str:
    """Return the path of a program of Prometheus."""
    found = shutil.which(name)
    if not found and os.environ.get("CI") != "true":
        pytest.skip(f"{name} is not on PATH: tests/run installs it")
    assert found, f"{name} is not on PATH"
    return found


class Prometheus(Program):
    """Prometheus with the files of the project, on a RabbitMQ of the test, and in a hurry."""

    def __init__(self, node: Node, folder: Path, flower_port: int = 0) -> None:
        self.port = free_port()
        configuration = (MONITORING / "prometheus.yml").read_text().replace("15s", "1s")
        configuration = configuration.replace("rabbitmq:15692", f"127.0.0.1:{node.metrics_port}")
        configuration = configuration.replace("flower:5555", f"127.0.0.1:{flower_port}")
        rules = re.sub(r"for: \d+m", "for: 1s", (MONITORING / "alerts.yml").read_text())
        (folder / "prometheus.yml").write_text(configuration)
        (folder / "alerts.yml").write_text(rules)
        command = [
            program("prometheus"),
            f"--config.file={folder}/prometheus.yml",
            f"--storage.tsdb.path={folder}/data",
            f"--web.listen-address=127.0.0.1:{self.port}",
        ]
        super().__init__(command, folder / "prometheus.log", timeout=60)  # Seconds

    def firing(self) -> set[tuple[str, str]]:
        """Return the names of the alerts that fire, each with its queue."""
        with urlopen(f"http://127.0.0.1:{self.port}/api/v1/alerts") as answer:
            alerts = json.load(answer)["data"]["alerts"]
        return {
            (alert["labels"]["alertname"], alert["labels"].get("queue", ""))
            for alert in alerts
            if alert["state"] == "firing"
        }

    def after_start_check(self) -> bool:
        """Return whether it is ready."""
        try:
            with urlopen(f"http://127.0.0.1:{self.port}/-/ready") as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


def test_the_rules_fire_when_they_should() -> None:
    for arguments in (["check", "config", "prometheus.yml"], ["test", "rules", "alerts_test.yml"]):
        finished = subprocess.run(
            [program("promtool"), *arguments], cwd=MONITORING, check=False, capture_output=True, text=True
        )
        assert finished.returncode == 0, finished.stdout + finished.stderr


def test_every_rule_is_tested() -> None:
    names = re.findall(r"alert: (\w+)", (MONITORING / "alerts.yml").read_text())
    tested = re.findall(r"alertname: (\w+)", (MONITORING / "alerts_test.yml").read_text())
    assert sorted(tested) == sorted(2 * names)  # Once silent, once firing


def test_an_alert_fires_when_the_worker_is_gone(tmp_path: Path) -> None:
    # Given a worker, and no alert about its queues
    with Node(tmp_path, "[rabbitmq_prometheus].") as node:
        worker = Worker("tasks", node.url, tmp_path, "-c1", **PATHS).start()
        with Prometheus(node, tmp_path) as prometheus:
            until(lambda: ("NoWorker", "") in prometheus.firing())  # There is no Flower
            assert not {queue for _, queue in prometheus.firing() if queue}
            # When the worker is stopped
            worker.stop()
            # Then Prometheus says that nobody consumes, and when the worker is back it no longer does
            both = {("QueueWithoutConsumers", "default"), ("QueueWithoutConsumers", "priority")}
            until(lambda: both <= prometheus.firing())
            with worker:
                until(lambda: not both & prometheus.firing())


def test_an_alert_fires_when_the_only_worker_was_killed(tmp_path: Path) -> None:
    # Given Flower as Docker Compose starts it, which has seen a worker
    compose = (PROJECT / "docker-compose.yml").read_text()
    (options,) = re.findall(r"command: celery -A tasks flower --address=0.0.0.0 (.*) #", compose)
    command = f"-m celery -A tasks flower --address=127.0.0.1 --port=PORT {options}"
    with (
        Node(tmp_path, "[rabbitmq_prometheus].") as node,
        WebServer(tmp_path, command, "healthcheck", CELERY_BROKER_URL=node.url) as flower,
        Prometheus(node, tmp_path, flower.port) as prometheus,
    ):
        until(lambda: ("NoWorker", "") in prometheus.firing())
        worker = Worker("tasks", node.url, tmp_path, "-c1", **PATHS).start()
        until(lambda: "flower_worker_online{" in flower.get("metrics"))
        until(lambda: ("NoWorker", "") not in prometheus.firing())
        # When the worker dies, and cannot say so
        worker.kill()
        # Then Flower forgets it
        until(lambda: ("NoWorker", "") in prometheus.firing(), 90)
