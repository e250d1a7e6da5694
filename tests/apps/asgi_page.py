"""An ASGI page for uvicorn, which answers in threads, as FastAPI and Starlette do for a plain function."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from apps.page import answer


async def page(
    scope: dict[str, Any],
    receive: Callable[[], Awaitable[Any]],
    send: Callable[[dict[str, Any]], Awaitable[None]],
) -> None:
    """Answer a request."""
    body = await asyncio.to_thread(answer, scope["path"].strip("/"))
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": body.encode()})
