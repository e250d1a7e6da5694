"""The pictures of the README that are drawn from a run: the timeline at its top, and the crash."""

import io
import json
import re
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from programs import PATHS, drive, python
from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from reliable.testing import Worker

#: Send eight e-mails one after another, and then at once; print when each of the first began and ended, how
#: long each way kept the page, and when the second began.
PROGRAM = """
import json, time
from tasks import send_email

send_email.delay("warm-up", 0).get()
emails = [f"customer{number}@example.com" for number in range(8)]
began = time.time()
times = [time.time()]
for email in emails:
    send_email(email)
    times.append(time.time())
alone = [time - began for time in times]
began = time.time()
results = [send_email.delay(email) for email in emails]
answered = time.time() - began
for result in results:
    result.get()
print(json.dumps([list(zip(alone, alone[1:])), began, answered, [result.id for result in results]]))
"""
SECOND, TOP, ROW = 205, 34, 15  # Pixels
STYLE = """
text { font: 14px sans-serif; fill: #1f2328 } .axis { font-size: 12px; fill: #808080 }
.alone { fill: #d1604d } .together { fill: #2f8f5b } line { stroke: #808080 }
@media (prefers-color-scheme: dark) { text { fill: #d1d7e0 } }
"""


def group(top: int, kind: str, title: str, bars: list[tuple[float, float]], answered: float) -> str:
    """Draw a title, a bar for each task (begin and end in seconds), and when the page answers."""
    drawn = [f'<text x="20" y="{top - 12}">{title}</text>']
    drawn += [
        f'<rect class="{kind}" x="{20 + begin * SECOND:.1f}" y="{top + ROW * number}" rx="3" '
        f'width="{(end - begin) * SECOND:.1f}" height="{ROW - 4}"/>'
        for number, (begin, end) in enumerate(bars)
    ]
    x = 20 + answered * SECOND
    drawn += [f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top - 4}" y2="{top + 8 * ROW}" stroke-width="2"/>']
    return "\n".join(drawn)


def test_a_timeline_shows_when_the_page_answers(
    fresh: str, tmp_path: Path, picture: Callable[[str], Path]
) -> None:
    # Given a worker of eight processes
    with Worker("tasks", fresh, tmp_path, "-c8", **PATHS) as worker:
        finished = python("-c", PROGRAM, CELERY_BROKER_URL=fresh)
    alone, began, answered, ids = json.loads(finished.stdout)
    # When its log says when each task ended, and how long it took
    ends = re.findall(r"\[([\d: ,-]+): INFO.*\[(.{36})\] succeeded in ([\d.]+)s", worker.log.read_text())
    took = {task: (datetime.fromisoformat(end.replace(",", ".")), float(took)) for end, task, took in ends}
    together = [
        (took[task][0].timestamp() - began - took[task][1], took[task][0].timestamp() - began) for task in ids
    ]
    slow, sent = alone[-1][1], max(end for _, end in together)
    # Then the page answers first, and the e-mails overlap
    assert answered < sent
    assert max(begin for begin, _ in together) < min(end for _, end in together)
    second = TOP + 8 * ROW + 50
    axis = second + 8 * ROW + 20
    drawn = [
        group(TOP, "alone", f"One after another: the page answers after {slow:.1f} s", alone, slow),
        group(
            second,
            "together",
            f"With Celery: the page answers after {answered:.2f} s, the e-mails are sent after {sent:.1f} s",
            together,
            answered,
        ),
        *(
            f'<text class="axis" x="{20 + number * SECOND}" y="{axis}" text-anchor="middle">{number} s</text>'
            for number in range(5)
        ),
    ]
    size = f'viewBox="0 0 880 {axis + 10}" width="880" height="{axis + 10}"'
    picture("timeline.svg").write_text(
        "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" {size}>',
                f"<style>{STYLE}</style>",
                *drawn,
                "</svg>\n",
            ]
        )
    )


def test_two_terminals_show_a_crash(fresh: str, tmp_path: Path, picture: Callable[[str], Path]) -> None:
    # Given a worker, one process of which is killed
    with Worker("tasks", fresh, tmp_path, "-c8", **PATHS) as worker:
        drive("hello", CELERY_BROKER_URL=fresh)
        before = len(worker.log.read_text())
        printed = drive("crash", CELERY_BROKER_URL=fresh).stdout
        log = worker.log.read_text()[before:]
    # Then its log shows the death, and how the task ran again
    log = re.sub(r"\[\S+ (\S+),\d+: \w+/(\w+)(-\d+)?\]", r"\1", log)
    log = re.sub(
        r"(\[.{8}).{28}\]|(?<=in )([\d.]{4})\d+(?=s)",
        lambda found: f"{found[1]}]" if found[1] else found[2],
        log,
    )
    assert re.findall(r"received|exited with|lost|retry|succeeded", log) == [
        "received",
        "exited with",
        "lost",
        "retry",
        "received",
        "succeeded",
    ]
    console = Console(record=True, width=140, file=io.StringIO())
    terminals = Table.grid(expand=True)
    terminals.add_row(
        Panel(
            Text(log.strip().replace("test@localhost", "celery@shop")),
            title="celery -A tasks worker --concurrency 8 --loglevel info",
            width=80,
        ),
        Panel(
            Text(printed.split("\n\n")[1].replace("test@localhost", "celery@shop")),
            title="python run_tasks.py crash",
        ),
    )
    console.print(terminals)
    plain = re.sub(r"@font-face.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)  # no font from elsewhere
    console.save_svg(str(picture("crash.svg")), title="A process of the worker is killed", code_format=plain)
