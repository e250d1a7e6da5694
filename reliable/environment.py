"""Read where RabbitMQ is from the environment and `.env`, check it, and turn it into Celery's settings."""

import os
import ssl
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit

from dotenv import load_dotenv
from dotenv.parser import parse_stream

from reliable.errors import exit_now


class Environment(NamedTuple):
    """Values for the Celery settings that have these names."""

    broker_url: str
    broker_use_ssl: dict[str, Any] | None
    broker_login_method: str | None
    result_backend: str


def read_environment(env_file: Path) -> Environment:
    """Return where RabbitMQ is, and where results go.

    The environment overrides the file, which may be missing. The program exits with two lines on stderr,
    what is wrong and how to fix it, if a value cannot be used. `.env.example` lists the variables.
    """
    load_env_file(env_file)
    authority, certificate, key = tls_files(env_file.parent)
    has_tls = bool(authority or certificate)
    url = os.environ.get("CELERY_BROKER_URL")
    if url:
        check_url("CELERY_BROKER_URL", url)
    else:
        url = url_from_parts(has_tls)
        check_url("RABBITMQ_HOST or RABBITMQ_PORT", url)
    schemes = {urlsplit(part).scheme for part in url.split(";")}
    if "amqps" in schemes or has_tls:
        if schemes != {"amqps"}:
            exit_now("CELERY_BROKER_URL has a node without TLS", "write amqps:// for each node")
        # Otherwise any certificate of a public authority passes for RabbitMQ's. With several nodes in the
        # URL, each certificate must bear the name of the first. https://www.rabbitmq.com/docs/ssl
        use_ssl = {
            "ca_certs": authority,
            "certfile": certificate,
            "keyfile": key,
            "cert_reqs": ssl.CERT_REQUIRED,
            "server_hostname": urlsplit(url.partition(";")[0]).hostname,
        }
    else:
        use_ssl = None
    # A certificate of our own is the login, instead of a user and a password.
    login = "EXTERNAL" if certificate else None
    return Environment(url, use_ssl, login, os.environ.get("CELERY_RESULT_BACKEND") or "rpc://")


def names_rabbitmq() -> bool:
    """Return whether the environment names a RabbitMQ. If so, a program must not run without it."""
    return any(os.environ.get(name) for name in ("CELERY_BROKER_URL", "RABBITMQ_HOST"))


def load_env_file(path: Path) -> None:
    """Copy the variables of a `.env` file into the environment, unless they are set there."""
    try:
        with path.open(encoding="utf-8") as file:
            broken = [str(binding.original.line) for binding in parse_stream(file) if binding.error]
    except FileNotFoundError:
        return
    except (OSError, UnicodeDecodeError) as error:
        exit_now(f"Cannot read {path}: {error}", "compare it with .env.example, or remove it")
    if broken:
        exit_now(f"{path}, line {', '.join(broken)}: expected NAME=value", "compare it with .env.example")
    load_dotenv(path, interpolate=False)  # A "$" is a "$", as in single quotes for Docker Compose


def url_from_parts(has_tls: bool) -> str:
    """Return the broker URL that the RABBITMQ_* variables describe."""
    scheme, port = ("amqps", "5671") if has_tls else ("amqp", "5672")
    user = quote(os.environ.get("RABBITMQ_USER") or "guest", safe="")
    password = quote(os.environ.get("RABBITMQ_PASSWORD") or "guest", safe="")
    host = os.environ.get("RABBITMQ_HOST") or "127.0.0.1"
    host = f"[{host}]" if ":" in host else host
    return f"{scheme}://{user}:{password}@{host}:{os.environ.get('RABBITMQ_PORT') or port}//"


def check_url(variable: str, url: str) -> None:
    """Exit if one of the URLs, separated by ";", cannot be used."""
    fix = f"correct {variable} as .env.example shows"
    if variable == "CELERY_BROKER_URL":
        fix += "; write a special character in a password as %XX"
    for part in url.split(";"):
        try:
            scheme, port = urlsplit(part).scheme, urlsplit(part).port
        except ValueError:  # Its text may quote a piece of the password
            port = 0
        if port == 0:
            exit_now(f"{variable}: the host or the port (1 to 65535) is wrong", fix)
        if scheme not in ("amqp", "amqps") and part != "memory://":
            exit_now(f"{variable}: the URL must start with amqp:// or amqps://", fix)


def tls_files(folder: Path) -> list[str | None]:
    """Return the paths of the PEM files for TLS: the authority, and our own certificate and its key."""
    variables = ("RABBITMQ_CA", "RABBITMQ_CERT", "RABBITMQ_KEY")
    names = [os.environ.get(variable) for variable in variables]
    files = [str(folder / name) if name else None for name in names]
    authority, certificate, key = files
    fix = f"name PEM files in {', '.join(variables)}, as .env.example shows"
    if bool(certificate) != bool(key):
        exit_now("RABBITMQ_CERT and RABBITMQ_KEY must be set together", fix)
    try:
        context = ssl.create_default_context(cafile=authority)
        if certificate:
            context.load_cert_chain(certificate, key)
    except OSError as error:
        exit_now(f"{', '.join(filter(None, names))}: {error}", fix)
    return files
