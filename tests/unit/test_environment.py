"""Where RabbitMQ is: the environment and `.env`, and what is wrong in them."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from programs import PROJECT

from reliable.rabbitmq_node import clean_environment
from reliable.testing import Worker


def python_in(folder: Path, code: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    """Run Python beside a copy of the shop, so that a `.env` there is read."""
    for module in ("celeryconfig.py", "tasks.py", "run_tasks.py"):
        shutil.copy(PROJECT / module, folder)
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=clean_environment(PYTHON_DOTENV_DISABLED="0", **variables),
        check=False,
        capture_output=True,
        text=True,
        timeout=30,
    )


READ_SETTINGS = "import tasks; tasks.app.conf.task_acks_late"
PRINT_URL = "import celeryconfig; print(celeryconfig.broker_url)"


def test_a_worker_of_a_test_has_none_of_the_variables_of_the_project(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CELERY_BROKER", "amqp://elsewhere//")  # Celery takes it for the option --broker
    variables = Worker("tasks", "amqp://here//", tmp_path).envvars
    assert variables["CELERY_BROKER_URL"] == "amqp://here//"
    assert "CELERY_BROKER" not in variables
    assert "PATH" in variables


def test_by_default_rabbitmq_is_on_this_machine(tmp_path: Path) -> None:
    assert python_in(tmp_path, PRINT_URL).stdout == "amqp://guest:guest@127.0.0.1:5672//\n"


def test_a_host_may_be_an_ipv6_address(tmp_path: Path) -> None:
    assert "@[::1]:5672" in python_in(tmp_path, PRINT_URL, RABBITMQ_HOST="::1").stdout


def test_the_environment_overrides_the_env_file(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("RABBITMQ_USER=ada\nRABBITMQ_PASSWORD='p@s$/{word}'\nRABBITMQ_PORT=1\n")
    printed = python_in(tmp_path, PRINT_URL, RABBITMQ_PORT="5673").stdout
    assert printed == "amqp://ada:p%40s%24%2F%7Bword%7D@127.0.0.1:5673//\n"


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("RABBITMQ_PORT", "secret"),
        ("RABBITMQ_PORT", "70000"),
        ("RABBITMQ_PORT", "0"),
        ("RABBITMQ_HOST", "secret:5672"),
        ("CELERY_BROKER_URL", "memory://secret"),
        ("CELERY_BROKER_URL", "http://ada:secret@127.0.0.1"),
        ("CELERY_BROKER_URL", "secret"),
        ("CELERY_BROKER_URL", "amqp://ada:se/secret@127.0.0.1"),
        ("CELERY_BROKER_URL", "amqp://ada:secret@127.0.0.1:5672//;amqp://ada:secret@127.0.0.1:x//"),
    ],
)
@pytest.mark.parametrize("program", ["import run_tasks; run_tasks.main()", READ_SETTINGS])
def test_a_wrong_value_is_named_with_its_variable(
    tmp_path: Path, program: str, variable: str, value: str
) -> None:
    stopped = python_in(tmp_path, program, **{variable: value})
    assert stopped.returncode == 2
    what, fix = stopped.stderr.splitlines()
    assert variable in what.partition(":")[0]
    assert fix.startswith("Fix: ")
    assert "secret" not in stopped.stderr


@pytest.mark.parametrize("content", [b"RABBITMQ_USER=ada\nno assignment = here\n", b"\xff\xfe=1\n"])
def test_a_broken_env_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / ".env").write_bytes(content)
    stopped = python_in(tmp_path, READ_SETTINGS)
    assert (stopped.returncode, len(stopped.stderr.splitlines())) == (2, 2)
    assert str(tmp_path / ".env") in stopped.stderr


def test_the_example_names_every_variable() -> None:
    example = (PROJECT / ".env.example").read_text()
    read = (PROJECT / "reliable" / "environment.py").read_text() + (
        PROJECT / "docker-compose.yml"
    ).read_text()
    for name in ("USER", "PASSWORD", "HOST", "PORT", "UI_PORT", "BIND", "CA", "CERT", "KEY"):
        assert f"\n#RABBITMQ_{name}=" in example
        assert f"RABBITMQ_{name}" in read
    for name in ("BROKER_URL", "RESULT_BACKEND"):
        assert f"\n#CELERY_{name}=" in example
