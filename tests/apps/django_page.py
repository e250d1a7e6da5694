"""A Django page with its settings, for `django runserver`."""

from apps.page import answer
from django.http import HttpRequest, HttpResponse
from django.urls import path

DEBUG = True
SECRET_KEY = "for tests"  # noqa: S105
ROOT_URLCONF = __name__
USE_TZ = True
VERSION = 1


def page(request: HttpRequest, path: str) -> HttpResponse:
    """Answer a request."""
    return HttpResponse(str(VERSION) if path == "version" else answer(path))


urlpatterns = [path("<path:path>", page)]
