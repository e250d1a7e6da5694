"""The README and the pages of docs/: their commands run in their order, and print what is shown."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

import pytest
from programs import PROJECT, declare_queues
from sybil.document import Document
from sybil.example import Example
from sybil.parsers.markdown import CodeBlockParser, SkipParser

from reliable.rabbitmq_node import Node, rabbitmq_program
from reliable.testing import until

# What differs from run to run: ids, the names of nodes and their machine, ports, times …
VARIABLE = [
    (r"\b[0-9a-f]{8}((-[0-9a-f]{4}){3}-[0-9a-f]{12})?\b", "ID"),
    (r"\b(celery|own[0-9a-f]+)@[\w.-]+", "NODE"),
    (r":\d+//", ":PORT//"),
    (r"\d+(:\d\d)+|\d+\.\d+ ?s\b|\bin \d+ s\b", "TIME"),
    (r"-{2,}|\s+", " "),
]
NUMBER = (r"\d[\d,]*(\.\d+)*", "NUMBER")  # … and all numbers, of lessons and logs
# Programs that go on until Ctrl-C, each in a shell of its own
GO_ON = (
    "celery -A tasks worker",
    "celery -A tasks beat",
    "celery -A tasks flower",
    "celery -A first worker",
    "celery -A work worker",
)
END = "=== end of a command:"


def pattern(line: str, command: str) -> str:
    """Return a line that a command prints without what is variable."""
    has_figures = ("run_tasks.py" in command and "--path" not in command) or command.startswith(GO_ON)
    for variable, name in [*VARIABLE, NUMBER] if has_figures else VARIABLE:
        line = re.sub(variable, name, line)
    return line.strip()


class Shell:
    """The reader's shells, in a clean copy of the project."""

    def __init__(self, folder: Path, node: Node) -> None:
        self.folder = folder
        made = (".git", ".venv", ".env", ".*_cache", ".hypothesis", "__pycache__", "*.egg-info", "build")
        shutil.copytree(PROJECT, folder, ignore=shutil.ignore_patterns(*made))
        (folder.parent / "bin").mkdir()
        sudo = folder.parent / "bin" / "sudo"  # root's commands are for the node of the test
        sudo.write_text(
            f'#!/bin/sh\nprogram=$(dirname {rabbitmq_program("rabbitmqctl")})/$1; shift; exec $program "$@"\n'
        )
        sudo.chmod(0o755)
        self.environment = {
            **node.environment,
            "RABBITMQ_PORT": str(node.port),
            "CELERY_BROKER_URL": node.url,
        }
        self.environment["PATH"] = f"{sudo.parent}:{os.environ['PATH']}"
        self.first = subprocess.Popen(
            ["/bin/bash"],
            cwd=folder,
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.others: dict[str, subprocess.Popen[bytes]] = {}

    def type(self, command: str) -> tuple[list[str], int]:
        """Run a command to its end in the first shell; return the lines that it prints, and its status."""
        assert self.first.stdin
        assert self.first.stdout
        told = f"printf '\\n{END} %s\\n' $?"
        print(f"{{ {command}\n}} </dev/null\n{told}", file=self.first.stdin, flush=True)
        lines = []
        while not (line := self.first.stdout.readline()).startswith(END):
            assert line, f"{command}: the shell has ended"
            lines.append(line.rstrip("\n"))
        return lines[: -1 if not lines[-1] else None], int(line.removeprefix(END))

    def leave_running(self, program: str, command: str, shown: list[str]) -> None:
        """Start what goes on, instead of what runs; wait until it prints what is shown."""
        workers = [other for other in self.others if "worker" in program and "worker" in other]
        self.stop(*self.others if "-A tasks" not in command else {program, *workers})
        log = self.folder.parent / f"{time.monotonic_ns()}.log"
        with log.open("w") as output:
            self.others[program] = subprocess.Popen(
                ["/bin/bash", "-c", f". .venv/bin/activate; {command}"],
                cwd=self.type("pwd")[0][-1],
                env=self.environment,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        expected = [pattern(line, program) for line in shown] or ["ready."] * ("worker" in program)
        until(lambda: all(line in pattern(log.read_text(), program) for line in expected))

    def stop(self, *programs: str) -> None:
        """Stop such programs, if they run."""
        for running in [self.others.pop(program) for program in programs if program in self.others]:
            os.killpg(running.pid, signal.SIGTERM)  # SIGINT may be ignored, under nohup
            running.wait(timeout=60)


def is_as_shown(command: str, printed: list[str], shown: list[str]) -> bool:
    """Tell whether a command printed the shown lines in a row: of a line with an ellipsis, its beginning."""
    lines, wanted = ([pattern(line, command) for line in part] for part in (printed, shown))
    return any(
        all(
            line.startswith(part.removesuffix("…")) if part.endswith("…") else line == part
            for line, part in zip(lines[start:], wanted, strict=False)
        )
        for start in range(len(lines) - len(wanted) + 1)
    )


def run_block(example: Example) -> None:
    """Type the commands of a block: each prints what is shown below it, or, with nothing there, succeeds."""
    shell: Shell = example.namespace["shell"]()
    for typed in re.split(r"^\$ ", str(example.parsed), flags=re.MULTILINE)[1:]:
        command, *shown = typed.rstrip("\n").split("\n")
        while shown and shown[0].startswith(">"):  # a command of several lines
            command += "\n" + shown.pop(0)[2:]
        if program := next((program for program in GO_ON if program in command), None):
            shell.leave_running(program, command, shown)
            continue
        deadline = time.monotonic() + 20  # seconds: RabbitMQ counts quorum queues every five
        while True:
            printed, status = shell.type(command)
            passed = is_as_shown(command, printed, shown) if shown else status == 0
            if passed or "rabbitmqctl" not in command or time.monotonic() > deadline:
                break
            time.sleep(0.5)
        assert passed, "\n".join([command, *printed])


def run_python(example: Example) -> None:
    """Run a block of Python, or save it under the name that the page gives it."""
    shell: Shell = example.namespace["shell"]()
    if name := re.search(r"<!-- file: (\S+) -->\s*$", example.document.text[: example.start]):
        (shell.folder / name[1]).write_text(str(example.parsed))
        return
    script = shell.folder.parent / "block.py"
    script.write_text(str(example.parsed))
    lines, status = shell.type(f"PYTHONPATH=. python {script}")
    assert status == 0, lines


def run_prompt(example: Example) -> None:
    """Type the lines of a Python prompt: each prints what is shown below it."""
    shell: Shell = example.namespace["shell"]()
    lines = str(example.parsed).splitlines()
    typed = "\n".join(line.removeprefix(">>> ") for line in lines if line.startswith(">>> "))
    printed, _ = shell.type(f"python -i -q 2>/dev/null <<'END'\n{typed}\nEND")
    assert printed == [line for line in lines if not line.startswith(">>> ")]


PAGES = [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]
PARSERS = (
    CodeBlockParser("console", run_block),
    CodeBlockParser("python", run_python),
    CodeBlockParser("pycon", run_prompt),
    SkipParser(),
)
EXAMPLES = [(page.name, example) for page in PAGES for example in Document.parse(str(page), *PARSERS)]


@contextlib.contextmanager
def open_shell(folder: Path) -> Iterator[Shell]:
    """Open the first shell of a page's reader, beside a RabbitMQ of its own."""
    (folder / "node").mkdir()
    with Node(folder / "node") as node:
        shell = Shell(folder / "a clean copy", node)
        if not folder.name.startswith("README"):  # Whose commands make it
            (shell.folder / ".venv").symlink_to(sys.prefix)
            declare_queues(node.url)
        yield shell
        shell.stop(*shell.others)
        shell.first.kill()
        shell.first.communicate()


@pytest.fixture(scope="module")
def shells(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Shell]]:
    """Give the shell of each page."""
    with contextlib.ExitStack() as stack:
        yield cache(lambda page: stack.enter_context(open_shell(tmp_path_factory.mktemp(page))))


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("page", "example"), EXAMPLES, ids=[f"{page} line {example.line}" for page, example in EXAMPLES]
)
def test_each_block_does_what_it_shows(page: str, example: Example, shells: Callable[[str], Shell]) -> None:
    example.namespace["shell"] = partial(shells, page)  # Not opened for what is skipped
    example.evaluate()


# --- What the pages quote, and where they lead ------------------------------------------------------
TEXTS = {page: page.read_text() for page in [*PAGES, PROJECT / "CONTRIBUTING.md"]}
QUOTES = [
    (page.name, file, code)
    for page, text in TEXTS.items()
    for file, code in re.findall(r"<!-- from: (\S+) -->\n```py\n(.*?)```", text, re.DOTALL)
]


@pytest.mark.parametrize(("page", "file", "code"), QUOTES)
def test_code_is_quoted_as_it_is(page: str, file: str, code: str) -> None:
    assert code in (PROJECT / file).read_text()


def anchors(text: str) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.name)
def test_each_link_leads_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\((?!http)([^)]*)\)", TEXTS[page]):
        file, _, anchor = link.partition("#")
        target = (page.parent / file) if file else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(TEXTS[target.resolve()]), link


def test_each_page_is_listed_in_the_readme() -> None:
    for page in TEXTS:
        assert page.name == "README.md" or f"{page.relative_to(PROJECT)})" in TEXTS[PROJECT / "README.md"]
