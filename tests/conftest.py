"""What all tests share: the RabbitMQ of the session, a worker of the shop, and the order of the tests."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Before the shop is imported: the .env beside it is the user's own, and so are the books of the gateway
os.environ["PYTHON_DOTENV_DISABLED"] = "1"
if "PYTEST_XDIST_WORKER" not in os.environ:  # Its parent has done it
    _scratch = tempfile.TemporaryDirectory(prefix="shop-")
    os.environ["TMPDIR"] = _scratch.name

from playwright.sync_api import Page, sync_playwright
from programs import PATHS, PROJECT
from xdist.scheduler import LoadScopeScheduling

from reliable.testing import Worker

#: Files whose tests share a fixture, or build on one another: one process runs all tests of such a file.
TOGETHER = ("test_browser.py", "test_callers.py", "test_messages.py", "test_security.py")
#: The tests that take longest start first, so that several processes end at about the same time.
LONGEST = ("docs/", "faults/test_faults", "faults/", "lessons/test_dead_letters")


class Scheduler(LoadScopeScheduling):  # https://pytest-xdist.readthedocs.io/en/stable/distribution.html
    """Hands the tests to the processes, one by one or a file at a time."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        # The blocks of a page have ids such as "README.md line 10"
        return file if file.endswith(TOGETHER) else nodeid.partition(" line ")[0]


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Scheduler:
    """Use this scheduler, with the option -n."""
    return Scheduler(config, log)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option of docs/test_browser.py."""
    parser.addoption("--pictures", action="store_true", help="take the pictures of the README (docs/)")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the longest tests first."""

    def rank(item: pytest.Item) -> int:
        return next((n for n, words in enumerate(LONGEST) if words in item.nodeid), len(LONGEST))

    items.sort(key=rank)


@pytest.fixture(scope="session")
def rabbitmq(request: pytest.FixtureRequest) -> str:
    """Give the URL of RabbitMQ: the one in CELERY_BROKER_URL, or that of a node for this session."""
    return os.environ.get("CELERY_BROKER_URL") or str(request.getfixturevalue("session_node").url)


@pytest.fixture(scope="session")
def worker(rabbitmq: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """Run one worker of four processes for all tests that do not break it."""
    with Worker("tasks", rabbitmq, tmp_path_factory.mktemp("worker"), "-c4", **PATHS) as worker:
        yield worker


@pytest.fixture(scope="session")
def shop(rabbitmq: str) -> Iterator[Any]:
    """Give the module `tasks`, as a program that publishes to the RabbitMQ of this session."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CELERY_BROKER_URL", rabbitmq)
        import tasks  # noqa: PLC0415  (it reads the variable when it is imported)

        yield tasks
        if tasks.app.backend.result_consumer.is_consuming:
            tasks.app.backend.result_consumer.stop()
        tasks.app.close()


@pytest.fixture
def picture(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], Path]:
    """Give the path of a picture: in docs/ if pictures are asked for."""
    folder = PROJECT / "docs" if request.config.getoption("--pictures") else tmp_path
    return lambda name: folder / name


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    """Open a page in a real browser."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if not program and os.environ.get("CI") != "true":
        pytest.skip("chromium is not on PATH: tests/run installs it")
    with sync_playwright() as playwright:
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # root has none
        browser = playwright.chromium.launch(executable_path=program, args=sandbox)
        yield browser.new_page(viewport={"width": 1100, "height": 560})
        browser.close()
