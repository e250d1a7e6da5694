"""A Flask page, for its development server."""

import flask
from apps.page import answer

app = flask.Flask(__name__)
VERSION = 1


@app.get("/<path>")
def page(path: str) -> str:
    """Answer a request."""
    return str(VERSION) if path == "version" else answer(path)
