"""The transfer itself: progress on the caller's thread, a clean stop, and the hub's errors in plain words."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from offload.errors import ModelError
from offload.events import LoadProgress

_REPORT_SECONDS = 0.2
_STOP_SECONDS = 10.0
_WORKERS = 4
# The name that huggingface_hub gives to its bar of bytes written; its other bars count files or the same bytes again.
_BYTES_BAR = "huggingface_hub.snapshot_download"


class _Stopped(Exception):
    """Raised inside the download's threads to end them."""


class _Counter:
    """Bytes so far, added to by the download's threads and read by the caller's."""

    def __init__(self, done: int) -> None:
        self._lock = threading.Lock()
        self._done = done
        self.stopped = False

    def add(self, count: float | None) -> None:
        if self.stopped:
            raise _Stopped
        with self._lock:
            self._done += int(count or 0)

    @property
    def done(self) -> int:
        with self._lock:
            return self._done


def fetch(
    name: str,
    revision: str | None,
    files: Sequence[str],
    present: int,
    total: int,
    on_event: Callable[[LoadProgress], None],
) -> Path:
    """Download ``files`` of a hub model into the cache and return the snapshot's folder.

    ``present`` of ``total`` bytes are in the cache already. Progress is reported from the calling thread, a few times
    a second, also while nothing arrives (or nobody could give up a download that stalls), and not at all when there is
    nothing to fetch. Leaving early (Ctrl-C, or an exception in ``on_event``) stops the download; files that are
    complete are kept. Raises ModelError when it fails.
    """
    from huggingface_hub import snapshot_download

    counter = _Counter(present)
    outcome: list[str | BaseException] = []

    def work() -> None:
        try:
            outcome.append(
                snapshot_download(
                    name,
                    revision=revision,
                    allow_patterns=[_literal(file) for file in files],
                    max_workers=_WORKERS,
                    tqdm_class=_bar_class(counter),
                )
            )
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=work, name="hub-download", daemon=True)
    thread.start()
    try:
        reported = -1
        while thread.is_alive():
            thread.join(_REPORT_SECONDS)
            if total > present:
                reported = min(counter.done, total)
                on_event(LoadProgress("download", reported, total, "bytes"))
    except BaseException:
        counter.stopped = True
        _close_connections()
        thread.join(_STOP_SECONDS)
        raise
    result = outcome[0]
    if isinstance(result, Exception):
        raise explain(result, name, revision) from result
    if isinstance(result, BaseException):
        raise result
    if total > present and reported != total:
        on_event(LoadProgress("download", total, total, "bytes"))
    return Path(result)


def explain(error: Exception, name: str, revision: str | None) -> ModelError:
    """One line for whatever huggingface_hub raised about model ``name``; what is no such error is raised again."""
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    # Library errors about one file wrap the cause that the user can act on.
    network = _is_network_error(error) or (error.__cause__ is not None and _is_network_error(error.__cause__))
    if isinstance(error, errors.GatedRepoError):
        text = f"model '{name}' is gated: accept its terms on its page, then set HF_TOKEN to a token that may read it"
    elif isinstance(error, errors.RevisionNotFoundError):
        text = f"model '{name}' has no revision '{revision}'; check --revision"
    elif status == 401 and not isinstance(error, errors.RepositoryNotFoundError):
        text = f"the hub does not accept your token for model '{name}'; check HF_TOKEN"
    elif isinstance(error, errors.RepositoryNotFoundError):
        text = f"there is no model '{name}' on the hub; check the spelling, or set HF_TOKEN if it is private"
    elif status == 403:
        text = f"the hub refuses access to model '{name}'; check that HF_TOKEN may read it"
    elif status is not None:
        text = f"the hub answered with error {status} for model '{name}'; run again later to go on"
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        text = f"the disk filled up while downloading '{name}'; make room, or point HF_HOME at another disk"
    elif isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        text = f"cannot write the download of '{name}': {error.strerror}: {error.filename}; HF_HOME names another place"
    elif network:
        text = (
            f"the hub cannot be reached for model '{name}' ({_first_line(error)}); check the network and HF_ENDPOINT,"
            " then run again to go on"
        )
    elif isinstance(error, OSError | ValueError):
        text = f"the download of '{name}' failed ({_first_line(error)}); run again to go on"
    else:
        raise error
    return ModelError(text)


def _is_network_error(error: BaseException) -> bool:
    # By module, since the client library changed its name between versions of huggingface_hub.
    return any(kind.__module__.startswith("httpx") for kind in type(error).__mro__) or isinstance(
        error, ConnectionError | TimeoutError
    )


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _literal(file: str) -> str:
    """A pattern that matches exactly ``file``."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in file)


def _close_connections() -> None:
    """End reads that are under way; a slow one would hold the program for minutes."""
    from huggingface_hub import close_session

    close_session()


def _bar_class(counter: _Counter) -> type[Any]:
    """A progress bar that draws nothing and adds what is written to ``counter``."""
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._counts = kwargs.get("name") == _BYTES_BAR
            super().__init__(*args, **kwargs | {"disable": True})

        def update(self, n: float | None = 1) -> None:
            if self._counts:
                counter.add(n)

    return Bar
