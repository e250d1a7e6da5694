"""A WSGI page for gunicorn, of which the first process has called a task before it forks."""

from collections.abc import Callable, Iterable
from typing import Any

from apps.page import answer

FIRST = answer("1")


def page(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """Answer a request."""
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [answer(environ["PATH_INFO"].strip("/")).encode()]
