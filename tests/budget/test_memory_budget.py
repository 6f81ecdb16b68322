"""``--ram`` is a hard limit: runs end well in a memory cgroup of exactly that size, and the plan's figure is true."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.budget.memory_group import run_in_group

pytestmark = pytest.mark.cgroup
MIB = 2**20
ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, str(ROOT / "run_local.py")]
SHARED_MAKER = ROOT.parent / "shared" / "bench" / "make_checkpoint.py"
# fills most of a context of 512 tokens, so that the KV cache and the activations of the plan are really used
PROMPT = "Tell me about the sea and the ships that sail on it. " * 33


def check(model: Path | str, ram: int, env: dict[str, str], prompt: str, new_tokens: int) -> None:
    """Pack (unhindered), answer ``prompt`` in a group of ``ram`` bytes, and compare the peak with the plan."""
    run_command("pack", "--model", str(model), env=env)
    shared = ["--model", str(model), "--ram", f"{ram // MIB}MiB", "--ctx", "512"]
    run = run_in_group(
        [*COMMAND, "chat", prompt, *shared, "--temperature", "0", "--max-new-tokens", str(new_tokens)], ram, env
    )
    assert (run.code, run.killed) == (0, 0), run.stderr[-2000:]
    assert run.stdout.strip()
    plan = json.loads(run_command("plan", "--json", *shared, env=env))
    assert 0 < plan["residency"] < 1, "the budget must be tight for this to mean something"
    planned = plan["anonymous_bytes"]
    assert run.peak_anonymous == pytest.approx(planned, rel=0.10), (
        f"planned {planned / MIB:.0f} MiB, measured {run.peak_anonymous / MIB:.0f} MiB"
    )


def run_command(*arguments: str, env: dict[str, str]) -> str:
    done = subprocess.run([*COMMAND, *arguments], env=os.environ | env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def make_checkpoint(folder: Path, layers: int, context: int = 2048) -> None:
    """A random OLMoE of ``layers`` layers with 64 experts of 1.5 MiB (hidden size 512), 96 MiB a layer."""
    import torch
    from transformers import AutoModelForCausalLM, OlmoeConfig

    from tests.tiny_models import VOCAB_SIZE, save_tiny_tokenizer

    config = OlmoeConfig(
        hidden_size=512, intermediate_size=512, num_hidden_layers=layers, num_attention_heads=8, num_key_value_heads=8,
        num_experts=64, num_experts_per_tok=8, vocab_size=VOCAB_SIZE, max_position_embeddings=context, dtype="bfloat16",
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    save_tiny_tokenizer(folder)


def test_a_model_larger_than_its_budget(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "model", layers=6)
    env = {"RUN_LOCAL_CACHE": str(tmp_path / "cache")}
    # the tiny tokenizer makes a token of almost every letter
    check(tmp_path / "model", 640 * MIB, env, prompt=PROMPT[:420], new_tokens=20)


def test_a_packed_kv_cache(tmp_path: Path) -> None:
    """With a long context, and with four rows at once: both fill most of their KV cache."""
    make_checkpoint(tmp_path / "model", layers=4, context=4096)
    env = {"RUN_LOCAL_CACHE": str(tmp_path / "cache")}
    shared = ["--model", str(tmp_path / "model"), "--ram", "600MiB", "--ctx", "4096", "--kv-cache", "fp8"]
    run_command("pack", "--model", str(tmp_path / "model"), env=env)
    plan = json.loads(run_command("plan", "--json", *shared, env=env))
    assert 0 < plan["residency"] < 1
    for rows in (1, 4):
        (tmp_path / "in.jsonl").write_text(
            "".join(json.dumps({"id": n, "prompt": f"{n}" + "z9" * (1900 // rows)}) + "\n" for n in range(rows))
        )
        files = [str(tmp_path / "in.jsonl"), "-o", "-", "--batch-size", str(rows)]
        batch = ["batch", *files, *shared, "--temperature", "0", "--max-new-tokens", "4"]
        run = run_in_group([*COMMAND, *batch], 600 * MIB, env)
        assert (run.code, run.killed) == (0, 0), run.stderr[-2000:]
        done = [json.loads(line) for line in run.stdout.splitlines()]
        assert [row["error"] for row in done] == [None] * rows
        assert rows > 1 or run.peak_anonymous <= plan["anonymous_bytes"] + 48 * MIB


def test_packing_stays_small(tmp_path: Path) -> None:
    """A pack of 576 MiB is written in a group that could not hold it."""
    make_checkpoint(tmp_path / "model", layers=6)
    env = {"RUN_LOCAL_CACHE": str(tmp_path / "cache")}
    run = run_in_group([*COMMAND, "pack", "--model", str(tmp_path / "model")], 450 * MIB, env)
    assert (run.code, run.killed) == (0, 0), run.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("chunk", ["512", "auto"])
def test_a_prompt_of_sixteen_thousand_tokens(tmp_path: Path, chunk: str) -> None:
    """It needs the budget of a short one and its KV cache, nothing more."""
    make_checkpoint(tmp_path / "model", layers=2, context=16384)
    env = {"RUN_LOCAL_CACHE": str(tmp_path / "cache")}
    model = ["--model", str(tmp_path / "model")]
    run_command("pack", *model, env=env)
    ram = ["--ram", "640MiB", "--ctx", "16384", "--prefill-chunk", chunk]
    (tmp_path / "in.jsonl").write_text(json.dumps({"id": 1, "prompt": "z9" * 7900}) + "\n")
    batch = [
        "batch",
        str(tmp_path / "in.jsonl"),
        "-o",
        "-",
        *model,
        *ram,
        "--max-new-tokens",
        "8",
        "--temperature",
        "0",
    ]
    run = run_in_group([*COMMAND, *batch], 640 * MIB, env)
    assert (run.code, run.killed) == (0, 0), run.stderr[-2000:]
    row = json.loads(run.stdout)
    assert row["error"] is None and row["prompt_tokens"] > 15_000
    plan = json.loads(run_command("plan", "--json", *model, *ram, env=env))
    assert 0 < plan["residency"] < 1
    assert run.peak_anonymous <= plan["anonymous_bytes"] + 48 * MIB


@pytest.mark.demo
def test_the_demo_in_a_tight_budget(demo_model_dir: Path) -> None:
    # torch imports Triton where it is installed, and its library is large
    ram = 760 if importlib.util.find_spec("triton") else 690
    check("demo", ram * MIB, {}, PROMPT, new_tokens=20)


@pytest.mark.slow
@pytest.mark.skipif(not SHARED_MAKER.exists(), reason="needs the maker of big checkpoints, which is not shipped")
def test_a_checkpoint_of_four_gigabytes(tmp_path: Path, demo_model_dir: Path) -> None:
    folder = tmp_path / "olmoe"
    maker = [sys.executable, str(SHARED_MAKER), str(folder), "--layers", "5", "--tokenizer", str(demo_model_dir)]
    subprocess.run(maker, check=True, capture_output=True)
    check(folder, 1500 * MIB, {"RUN_LOCAL_CACHE": str(tmp_path / "cache")}, PROMPT, new_tokens=40)
