"""Opening MLflow: which one, quietly, one process at a time, and its errors as ours."""

from __future__ import annotations

import fcntl
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import requests
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import OperationalError, SQLAlchemyError

from jetway.tasks.errors import TrackingError, TrackingUnreachableError
from jetway.tasks.store import jetway_home

HEALTH_TIMEOUT_S = 5.0
INTERNAL_ERROR = 500
# Too many requests; a gateway's and MLflow's own ways to say "later".
AWAY_STATUS = (429, 502, 503, 504)
_SQLITE = "sqlite:///"


def embedded_uri() -> str:
    """The sqlite file in ``JETWAY_HOME``."""
    return f"{_SQLITE}{jetway_home() / 'mlflow.db'}"


def tracking_uri() -> str:
    """``MLFLOW_TRACKING_URI`` where the user set it, else the embedded database."""
    return os.environ.get("MLFLOW_TRACKING_URI") or embedded_uri()


def artifact_location(uri: str) -> str | None:
    """Where new experiments keep files: beside a sqlite file, and with a server wherever it likes."""
    database = _database(uri)
    return (database.parent / "mlartifacts").as_uri() if database else None


def open_client(uri: str) -> MlflowClient:
    """A client whose database has its tables; a fresh one is made without a word on the terminal."""
    for name in ("mlflow", "mlflow.store.db.utils", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    with one_at_a_time(uri):
        return MlflowClient(uri)


@contextmanager
def one_at_a_time(uri: str) -> Iterator[None]:
    """Two processes that create the tables, or one experiment, at the same time trip over each other."""
    database = _database(uri)
    if database is None:
        yield
        return
    database.parent.mkdir(parents=True, exist_ok=True)
    with database.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def translated(uri: str, what: str) -> Iterator[None]:
    """The one place where MLflow's errors become TrackingError."""
    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError) as exc:
        reason = _reason(exc).replace(uri, without_password(uri))
        kind = TrackingUnreachableError if _is_away(uri, exc) else TrackingError
        raise kind(
            f"MLflow at {without_password(uri)} could not {what}: {reason}. Check that it is reachable "
            "and has room; unset MLFLOW_TRACKING_URI to use the embedded database."
        ) from exc


def answers(uri: str) -> bool:
    """Whether a server is there; a database that no server stands before counts as there."""
    if not uri.startswith("http"):
        return True
    try:
        requests.get(f"{uri.rstrip('/')}/health", timeout=HEALTH_TIMEOUT_S)
    except requests.RequestException:
        return False
    return True


def place_file(local: Path, final: Path) -> None:
    """Hard-links a file to its place, or copies it there where links cannot be made."""
    final.parent.mkdir(parents=True, exist_ok=True)
    part = final.with_name(f"{final.name}.{os.getpid()}.part")
    part.unlink(missing_ok=True)
    try:
        os.link(local, part)
    except OSError:
        shutil.copyfile(local, part)
    os.replace(part, final)
    part.unlink(missing_ok=True)


def without_password(uri: str) -> str:
    """The address without ``user:password@`` and without its query, where a password may stand as well."""
    scheme, found, rest = uri.partition("://")
    return f"{scheme}{found}{rest.rpartition('@')[2].partition('?')[0]}" if found else uri


def _is_away(uri: str, exc: BaseException) -> bool:
    """Whether a retry may help. MLflow wraps a lost connection in the error that it also has for bugs."""
    if uri.startswith(_SQLITE):
        return False
    if isinstance(exc, requests.RequestException):
        return exc.response is None or exc.response.status_code in AWAY_STATUS
    if isinstance(exc, MlflowException):
        status = int(exc.get_http_status_code())  # type: ignore[no-untyped-call]
        lost = isinstance(exc.__context__, requests.RequestException)
        return lost or status in AWAY_STATUS or (status == INTERNAL_ERROR and not answers(uri))
    return isinstance(exc, (OperationalError, ConnectionError))


def _reason(exc: Exception) -> str:
    """The first line of an error, its addresses without passwords."""
    line = str(exc).strip().partition("\n")[0] or type(exc).__name__
    line = re.sub(r"(?<=://)[^\s/'\"]*@", "", line)
    return re.sub(r"\?[^\s'\"?]*=[^\s'\"]*", "", line)


def _database(uri: str) -> Path | None:
    return Path(uri.removeprefix(_SQLITE)).absolute() if uri.startswith(_SQLITE) else None
