"""What a browser shows of a run: Flower's tasks, and the management UI of a cluster."""

import importlib.resources
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Locator, Page, expect
from programs import PATHS, PROJECT, WebServer, celery, drive

from reliable.rabbitmq_node import Node, run_cluster
from reliable.testing import Worker, until

LESSONS = ("hello", "parallel", "retries", "crash")


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Node]]:
    """Run a cluster of three nodes with the management UI."""
    with run_cluster(tmp_path_factory.mktemp("cluster"), plugins="[rabbitmq_management].") as nodes:
        yield nodes


@pytest.fixture(scope="module")
def flower(nodes: list[Node], tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebServer]:
    """Run a worker, Flower and some lessons; one more task fails and becomes a dead letter."""
    url, folder = nodes[0].url, tmp_path_factory.mktemp("flower")
    command = "-m celery -A tasks flower --address=127.0.0.1 --port=PORT"
    with (
        Worker("tasks", url, folder, "-c8", **PATHS),
        WebServer(folder, command, "healthcheck", CELERY_BROKER_URL=url) as flower,
    ):
        assert (
            "1 node online" in celery(url, "control", "enable_events").stdout + celery(url, "status").stdout
        )
        assert drive(*LESSONS, CELERY_BROKER_URL=url).returncode == 0
        celery(url, "call", "tasks.ship", "--args", '["sofa", 99999999999]')
        yield flower


def test_flower_shows_the_workers_and_their_tasks(
    flower: WebServer, page: Page, picture: Callable[[str], Path]
) -> None:
    page.set_viewport_size({"width": 1320, "height": 560})  # Wide enough for the whole table
    page.goto(f"http://127.0.0.1:{flower.port}/workers")
    expect(page.get_by_text("test@localhost")).to_be_visible()
    page.goto(f"http://127.0.0.1:{flower.port}/tasks")
    for task, state in {"send_email": "SUCCESS", "ship": "FAILURE", "charge_card": "SUCCESS"}.items():
        row = page.get_by_role("row").filter(has_text=f"tasks.{task}").filter(has_text=state)
        expect(row.first).to_be_visible()
    assert "4111" not in page.content()  # the number of the card
    page.screenshot(path=picture("flower.png"))
    assert picture("flower.png").stat().st_size < 200_000  # bytes
    page.set_viewport_size({"width": 1100, "height": 900})


def photograph(table: Locator, path: Path) -> None:
    """Photograph the part of the page where a table is; every few seconds the page replaces the table."""
    box = until(table.bounding_box)  # None at the moment of the replacement
    table.page.screenshot(path=path, clip=box, full_page=True)


def test_the_management_ui_shows_queues_dead_letters_and_nodes(
    flower: WebServer, nodes: list[Node], page: Page, picture: Callable[[str], Path]
) -> None:
    ui = f"http://127.0.0.1:{nodes[1].ui_port}/"
    page.goto(ui)
    page.fill("input[name=username]", "guest")
    page.fill("input[name=password]", "guest")
    page.click("input[type=submit]")
    expect(page.get_by_role("heading", name="Nodes")).to_be_visible()
    # The queues, without those of Celery and of callers
    ready = page.get_by_role("row").filter(has=page.get_by_role("link", name="dead-letters", exact=True))

    def queues_are_counted() -> bool:
        page.goto(f"{ui}#/queues")
        page.reload()
        expect(ready).to_contain_text("+2")  # copies
        return ready.locator("td.r").first.inner_text() == "1"  # the first number: those that are ready

    def names_are_filtered() -> bool:
        page.fill("#queues-name", "^[a-z-]+$")
        page.keyboard.press("Enter")
        return page.get_by_text("celery_delayed_0").count() == 0

    until(queues_are_counted)
    page.check("#queues-filter-regex-mode")
    until(names_are_filtered)
    photograph(page.locator("table.list").filter(has_text="dead-letters").first, picture("queues.png"))
    # A dead letter
    page.goto(f"{ui}#/queues/%2F/dead-letters")
    page.get_by_role("heading", name="Get messages").click()
    page.get_by_role("button", name="Get Message(s)").click()
    letter = page.locator("#msg-wrapper")
    for text in "rejected", "tasks.ship", "sofa":
        expect(letter.get_by_text(text).first).to_be_visible()
    # Of its many headers a picture shows the ones that matter
    letter.evaluate(
        "letter => letter.querySelectorAll('th').forEach(th => "
        "/^(Properties|headers|task|argsrepr|x-death|queue|reason|Payload)/.test(th.innerText)"
        " || th.parentElement.remove())"
    )
    letter.screenshot(path=picture("dead-letter.png"))
    # The three nodes, one of which is killed
    nodes[0].kill()
    page.goto(ui)
    page.reload()
    table = page.locator("table.list").filter(has_text="rabbit1@localhost").first
    for node, text in zip(nodes, ["not running", "MiB", "MiB"], strict=True):
        row = page.get_by_role("row").filter(has_text=node.name).first
        expect(row).to_contain_text(text, timeout=30_000)
    photograph(table, picture("nodes.png"))
    for name in "nodes.png", "queues.png", "dead-letter.png":
        assert picture(name).stat().st_size < 200_000  # bytes


def test_the_diagrams_can_be_drawn(page: Page) -> None:
    text = "".join(path.read_text() for path in [PROJECT / "README.md", *(PROJECT / "docs").glob("*.md")])
    diagrams = re.findall(r"```mermaid\n(.*?)```", text, re.DOTALL)
    assert len(diagrams) >= 5
    page.goto("about:blank")
    page.add_script_tag(path=str(importlib.resources.files("mermaidx") / "assets" / "mermaid.js"))
    for number, diagram in enumerate(diagrams):
        drawn = page.evaluate(
            "async ([id, text]) => (await mermaid.render(id, text)).svg", [f"d{number}", diagram]
        )
        assert drawn.startswith("<svg")
