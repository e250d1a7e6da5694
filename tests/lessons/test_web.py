"""The checkout page: over HTTP, and as a visitor sees it in a browser."""

import json
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from urllib.error import HTTPError

import pytest
from playwright.sync_api import Page, expect
from programs import PATHS, WebServer, python, what_is_wrong

from reliable.rabbitmq_node import free_port
from reliable.testing import Worker, until

FLASK = "-m flask --app web run --port PORT"
GUNICORN = "-m gunicorn --workers 3 --bind 127.0.0.1:PORT web:app"


class Shop(WebServer):
    """The web server of the shop, with a database of its own."""

    def __init__(self, folder: Path, arguments: str = FLASK, **variables: str) -> None:
        self.variables = {"CELERY_RESULT_BACKEND": f"db+sqlite:///{folder}/results", **variables}
        super().__init__(folder, arguments, **self.variables)

    def check_out(self, order: uuid.UUID) -> str:
        """Click the second button."""
        return self.get(f"orders/{order}/celery", b"")

    def states(self, order: uuid.UUID) -> set[str]:
        """Return the states of the tasks of an order."""
        return set(json.loads(self.get(f"orders/{order}"))["states"].values())


def test_a_visitor_waits_for_slow_work_unless_celery_does_it(
    page: Page, tmp_path: Path, picture: Callable[[str], Path]
) -> None:
    page.set_viewport_size({"width": 620, "height": 560})
    with Shop(tmp_path, CELERY_BROKER_URL="memory://") as server:
        page.goto(f"http://127.0.0.1:{server.port}/")
        page.get_by_text("one after another").click()
        expect(page.locator("#answer")).to_contain_text("eight e-mails sent", timeout=20_000)
        page.screenshot(path=picture("page-slow.png"))
        page.reload()
        page.get_by_text("with Celery").click()
        # The page answers while the tasks run, and then shows how each one ends
        expect(page.locator("#answer")).to_contain_text("Thank you. The page answered after")
        expect(page.locator("#states")).to_contain_text("parcel: PROGRESS")
        page.screenshot(path=picture("page-celery.png"))
        expect(page.locator("#states li")).to_contain_text([": SUCCESS"] * 10, timeout=20_000)
        expect(page.locator("#parcel")).to_have_js_property("value", 10)


def test_a_parcel_that_is_retried_is_shown(tmp_path: Path) -> None:
    # Given a task whose process was killed, so that its state has an error and no progress
    code = (
        "import tasks, uuid, web\n"
        "order = uuid.uuid4()\n"
        "tasks.app.backend.store_result(f'{order} parcel', ConnectionError('killed'), 'RETRY')\n"
        "print(web.app.test_client().get(f'/orders/{order}').json['states']['parcel'])"
    )
    variables = {
        "CELERY_RESULT_BACKEND": f"db+sqlite:///{tmp_path}/results",
        "CELERY_BROKER_URL": "memory://",
    }
    assert python("-c", code, **variables).stdout == "RETRY\n"


def test_a_double_click_charges_once(fresh: str, tmp_path: Path) -> None:
    order = uuid.uuid4()
    with Shop(tmp_path, CELERY_BROKER_URL=fresh) as server:
        assert [server.check_out(order), server.check_out(order)] == ["Thank you.", "Thank you."]
        with Worker("tasks", fresh, tmp_path, "-c1", **PATHS, **server.variables) as worker:
            until(lambda: worker.log.read_text().count("tasks.charge_card[") == 4)  # Two received, two ended
            assert f"'{order} was paid before'" in worker.log.read_text()
            until(lambda: server.states(order) == {"SUCCESS"}, 60)


def test_every_process_of_the_web_server_shows_the_same(fresh: str, tmp_path: Path) -> None:
    order = uuid.uuid4()
    with Shop(tmp_path, GUNICORN, CELERY_BROKER_URL=fresh) as server:
        server.check_out(order)
        with Worker("tasks", fresh, tmp_path, "-c4", **PATHS, **server.variables):
            until(lambda: server.states(order) == {"SUCCESS"})
            assert [server.states(order) for _ in range(20)] == [{"SUCCESS"}] * 20


def test_an_order_that_rabbitmq_does_not_take_is_refused(tmp_path: Path) -> None:
    url = f"amqp://guest:guest@127.0.0.1:{free_port()}//"
    with Shop(tmp_path, CELERY_BROKER_URL=url) as server:
        started = time.monotonic()
        with pytest.raises(HTTPError, match="503") as refused:
            server.check_out(uuid.uuid4())
        assert refused.value.read().decode() == "Your order was not accepted. Please try again."
        assert time.monotonic() - started < 5


def test_the_page_says_that_it_needs_a_database() -> None:
    assert "needs a database" in what_is_wrong(python("-c", "import web"))
