"""Hub models against a fake hub. Each look-up runs in a process of its own, so that the HF_* variables count."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from offload.checkpoint.hub import choose_files, choose_weights
from tests.checkpoint.fake_hub import TOKEN, FakeHub, Repository

ROOT = Path(__file__).resolve().parents[2]
# One JSON object a line: events as they come, then the result or the error.
DRIVER = """
import json, sys
from dataclasses import asdict
from offload.checkpoint.hub import resolve_model
from offload.errors import RunLocalError
def say(**fields): print(json.dumps(fields), flush=True)
options = json.loads(sys.argv[1])
try:
    found = resolve_model(**options, on_event=lambda event: say(event=type(event).__name__, **asdict(event)))
    say(name=found.name, folder=str(found.folder), revision=found.revision)
except RunLocalError as error:
    say(error=str(error), kind=type(error).__name__, code=error.exit_code)
"""
INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def model_files() -> dict[str, bytes]:
    """A repository as they come: what is needed, and much that is not."""
    index = {"weight_map": {"a": SHARDS[0], "b": SHARDS[1]}}
    needed = {
        "config.json": b'{"model_type": "mixtral"}',
        "generation_config.json": b'{"eos_token_id": 2}',
        "tokenizer.json": b'{"version": "1.0"}',
        "tokenizer_config.json": b'{"eos_token": "x"}',
        "chat_template.jinja": b"{{ messages }}",
        INDEX: json.dumps(index).encode(),
        SHARDS[0]: b"A" * 300_000,
        SHARDS[1]: b"B" * 200_000,
    }
    extra = {
        "README.md": b"# hello",
        "modeling_mixtral.py": b"raise SystemExit('code from the hub ran')",
        "pytorch_model.bin": b"\x80\x04 pickle",
        "pytorch_model.bin.index.json": b"{}",
        "consolidated.safetensors": b"C" * 500_000,
        "model.fp16.safetensors": b"D" * 500_000,
        "original/model.safetensors": b"E" * 500_000,
        "original/config.json": b"{}",
        "weights.gguf": b"GGUF",
        "optimizer.pt": b"pickle",
    }
    return needed | extra


NEEDED = sorted(["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
                 "chat_template.jinja", INDEX, *SHARDS])  # fmt: skip


class Client:
    """Runs the driver with an HF_HOME of its own against one hub."""

    def __init__(self, endpoint: str, home: Path) -> None:
        self.home = home
        self.environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")} | {
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def start(self, model: str, environment: dict[str, str] | None = None, **options: Any) -> subprocess.Popen[str]:
        arguments = {"model": model, "revision": None, "offline": False} | options
        return subprocess.Popen(
            [sys.executable, "-c", DRIVER, json.dumps(arguments)],
            cwd=ROOT,
            env=self.environment | (environment or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __call__(self, model: str, environment: dict[str, str] | None = None, **options: Any) -> Answer:
        process = self.start(model, environment, **options)
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        return Answer([json.loads(line) for line in output.splitlines()])


class Answer:
    def __init__(self, lines: list[dict[str, Any]]) -> None:
        self.end = lines[-1]
        self.progress = [line for line in lines if line.get("event") == "LoadProgress"]
        self.notices = [line["text"] for line in lines if line.get("event") == "Notice"]

    @property
    def folder(self) -> Path:
        assert "folder" in self.end, self.end
        return Path(self.end["folder"])

    @property
    def error(self) -> str:
        assert self.end.get("kind") == "ModelError" and self.end["code"] == 1, self.end
        assert "\n" not in self.end["error"]
        return self.end["error"]


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub({"org/model": Repository(model_files())}) as server:
        yield server


@pytest.fixture
def client(hub: FakeHub, tmp_path: Path) -> Client:
    return Client(hub.url, tmp_path / "home")


def test_fetches_only_what_is_needed_with_honest_progress(hub: FakeHub, client: Client) -> None:
    answer = client("org/model")
    assert answer.end["name"] == "org/model" and answer.end["revision"] == "a" * 40
    assert sorted(path.name for path in answer.folder.rglob("*")) == NEEDED
    assert sorted(hub.downloads()) == NEEDED  # no pickle, no code, nothing twice
    assert client.home in answer.folder.parents
    total = sum(len(model_files()[name]) for name in NEEDED)
    done = [line["done"] for line in answer.progress]
    assert {line["total"] for line in answer.progress} == {total}
    assert done == sorted(done) and done[-1] == total
    assert {(line["stage"], line["unit"]) for line in answer.progress} == {("download", "bytes")}


def test_second_run_fetches_nothing_and_is_silent(hub: FakeHub, client: Client) -> None:
    first = client("org/model")
    hub.requests.clear()
    second = client("org/model")
    assert second.folder == first.folder and hub.downloads() == []
    assert second.progress == [] and second.notices == []


def test_new_commit_with_the_same_weights_fetches_only_what_changed(hub: FakeHub, client: Client) -> None:
    client("org/model")
    hub.requests.clear()
    hub.repositories["org/model"].commit = "b" * 40
    hub.repositories["org/model"].files["config.json"] = b'{"model_type": "mixtral", "new": 1}'
    answer = client("org/model")
    assert answer.end["revision"] == "b" * 40 and hub.downloads() == ["config.json"]


def test_without_weights_only_the_small_files(hub: FakeHub, client: Client) -> None:
    answer = client("org/model", weights=False)
    assert not set(SHARDS) & set(hub.downloads()) and (answer.folder / INDEX).exists()


def test_goes_on_after_a_failed_run_with_the_missing_file_only(hub: FakeHub, client: Client) -> None:
    hub.repositories["org/model"].fail = {SHARDS[1]}
    assert "error 500" in client("org/model").error
    hub.repositories["org/model"].fail = set()
    hub.requests.clear()
    answer = client("org/model")
    assert hub.downloads() == [SHARDS[1]]
    assert answer.progress[0]["done"] >= 300_000
    assert (answer.folder / SHARDS[1]).read_bytes() == b"B" * 200_000


def test_goes_on_inside_a_file_when_the_connection_breaks(hub: FakeHub, client: Client) -> None:
    content = bytes(range(256)) * 98_304  # 24 MiB: the library keeps pieces of 10 MiB
    hub.repositories["org/model"].files[SHARDS[0]] = content
    hub.repositories["org/model"].break_once = {SHARDS[0]}
    answer = client("org/model")
    assert (answer.folder / SHARDS[0]).read_bytes() == content
    ranges = [header for _, path, header in hub.requests if path.endswith(SHARDS[0]) and header]
    assert ranges == [f"bytes={10 * 2**20}-"]
    assert answer.progress[-1]["done"] == answer.progress[-1]["total"]


def test_ctrl_c_ends_a_slow_download_at_once(hub: FakeHub, client: Client) -> None:
    hub.repositories["org/model"].trickle = set(SHARDS)
    process = client.start("org/model")
    try:
        deadline = time.monotonic() + 30
        while SHARDS[0] not in hub.downloads() or SHARDS[1] not in hub.downloads():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.3)
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
        assert time.monotonic() - started < 8
        assert process.returncode != 0
    finally:
        process.kill()
        process.wait()


def test_a_stalled_download_still_tells_of_itself(hub: FakeHub, client: Client) -> None:
    """Its progress is where a front end can give it up."""
    hub.repositories["org/model"].trickle = set(SHARDS)
    process = client.start("org/model")
    alarm = threading.Timer(30, process.kill)
    alarm.start()
    try:
        assert process.stdout is not None
        lines = map(json.loads, process.stdout)
        done = [line["done"] for line in islice((x for x in lines if x["event"] == "LoadProgress"), 12)]
        assert any(done.count(value) > 3 for value in done)
    finally:
        alarm.cancel()
        process.kill()
        process.communicate()


def test_offline_uses_the_cache_alone(hub: FakeHub, client: Client) -> None:
    folder = client("org/model").folder
    hub.requests.clear()
    assert client("org/model", offline=True).folder == folder
    assert client("org/model", {"HF_HUB_OFFLINE": "1"}).folder == folder
    assert client("org/model", offline=True, revision="a" * 40).folder == folder
    assert hub.requests == []


def test_offline_without_the_model(hub: FakeHub, client: Client) -> None:
    said = "model 'org/model' is not in the cache, and the hub is switched off (--offline or HF_HUB_OFFLINE)"
    assert client("org/model", offline=True).error.startswith(said)
    assert client("org/model", {"HF_HUB_OFFLINE": "1"}).error.startswith(said)
    assert hub.requests == []


def test_offline_with_part_of_the_model(hub: FakeHub, client: Client) -> None:
    client("org/model", weights=False)
    error = client("org/model", offline=True).error
    assert SHARDS[0] in error and "cannot be used without the hub" in error


def test_no_network(hub: FakeHub, client: Client) -> None:
    dead = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    error = client("org/model", dead).error
    assert "the hub cannot be reached" in error and "HF_ENDPOINT" in error
    folder = client("org/model").folder
    answer = client("org/model", dead)
    assert answer.folder == folder
    assert "Using the copy in the cache" in answer.notices[0]


def test_a_hub_that_is_down_is_named_and_the_cache_is_used(hub: FakeHub, client: Client) -> None:
    hub.status = 503
    assert "error 503" in client("org/model").error
    hub.status = None
    folder = client("org/model").folder
    hub.status = 503
    assert client("org/model").folder == folder


def test_unknown_model_and_unknown_revision(client: Client) -> None:
    assert client("org/modle").error.startswith("there is no model 'org/modle' on the hub; check the spelling")
    assert client("org/model", revision="v9").error == "model 'org/model' has no revision 'v9'; check --revision"


def test_revision(hub: FakeHub, client: Client) -> None:
    hub.repositories["org/model"].revisions.add("v1")
    assert client("org/model", revision="v1").end["revision"] == "a" * 40
    assert client("org/model", revision="v1", offline=True).end["revision"] == "a" * 40


def test_gated_model_needs_a_token(hub: FakeHub, client: Client) -> None:
    hub.repositories["org/model"].gated = True
    for environment in ({}, {"HF_TOKEN": "hf_wrong"}):
        error = client("org/model", environment).error
        assert "gated" in error and "HF_TOKEN" in error
    assert client("org/model", {"HF_TOKEN": TOKEN}).end["name"] == "org/model"


def test_full_disk_is_refused_before_the_download(hub: FakeHub, client: Client) -> None:
    hub.repositories["org/model"].claimed_sizes = {SHARDS[0]: 2**60}
    error = client("org/model").error
    assert "no room for 'org/model'" in error and "HF_HOME" in error
    assert not set(SHARDS) & set(hub.downloads())


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"pytorch_model.bin": b"x"}, "'org/other' has only pickled weights (.bin, .pt), which can run code"),
        ({"weights.gguf": b"x"}, "only GGUF weights"),
        ({}, "has no *.safetensors weights"),
        ({INDEX: b'{"weight_map": {"a": "../../evil.safetensors"}}'}, "'../../evil.safetensors' is not the name"),
        ({INDEX: b"{"}, "not valid JSON"),
        ({INDEX: json.dumps({"weight_map": {"a": SHARDS[0]}}).encode()}, f"its index names {SHARDS[0]}"),
    ],
)
def test_repository_that_cannot_be_run(hub: FakeHub, client: Client, files: dict[str, bytes], message: str) -> None:
    hub.repositories["org/other"] = Repository({"config.json": b"{}"} | files)
    assert message in client("org/other").error
    assert not [name for name in hub.downloads() if not name.endswith(".json")]


def test_mistrals_own_layout_alone(hub: FakeHub, client: Client) -> None:
    """With its index; a file of weights that the index does not name is not fetched."""
    shards = {f"consolidated-0000{number}-of-00002.safetensors": bytes([number]) * 64 for number in (1, 2)}
    index = json.dumps({"weight_map": dict(zip("ab", shards, strict=True))}).encode()
    files = {"params.json": b"{}", "tekken.json": b"[]", "consolidated.safetensors.index.json": index} | shards
    hub.repositories["org/other"] = Repository(files | {"consolidated-old.safetensors": b"x"})
    assert client("org/other").end["name"] == "org/other"
    assert set(hub.downloads()) == set(files)


def test_repository_without_a_config(hub: FakeHub, client: Client) -> None:
    hub.repositories["org/other"] = Repository({"model.safetensors": b"x"})
    assert "it has no config.json" in client("org/other").error


def test_choose_weights() -> None:
    assert choose_weights(["model.safetensors", "model.fp16.safetensors"]) == ("model.safetensors",)
    assert choose_weights(["consolidated-1.safetensors", "b.safetensors"]) == ("b.safetensors",)
    assert choose_weights(["consolidated.safetensors"]) == ("consolidated.safetensors",)
    assert choose_weights(["original/model.safetensors", "pytorch_model.bin"]) == ()


def test_choose_files() -> None:
    names = ["config.json", "tokenizer.model", "tekken.json", "a.py", "x/config.json", "model.bin", "vocab.json"]
    assert choose_files(names, None) == ("config.json", "tekken.json", "tokenizer.model", "vocab.json")
    assert choose_files(names, ["m.safetensors"])[1] == "m.safetensors"
