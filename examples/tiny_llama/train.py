# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch==2.13.0",
#   "transformers>=5.15,<5.18",
#   "peft>=0.17",
#   "sentencepiece>=0.2",
#   "protobuf",
#   "safetensors",
#   "numpy",
# ]
# ///
"""Make the tiny checkpoint from nothing: text, tokenizer, base, fine-tune, LoRA, outliers.

`python train.py` runs every stage (about half an hour on two cores); `--start instruct` takes
the earlier stages from the work folder; `--report` measures the saved checkpoints instead.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

import outliers
import questions
import torch
import trainer
from checkpoint import ALPHA, END, RANK, TARGETS, save_adapter, save_model, write_json
from documents import documents
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from sentencepiece import SentencePieceProcessor
from tokenizer import train_tokenizer
from transformers import LlamaForCausalLM
from world import World, build_world

HERE = Path(__file__).resolve().parent
SEED = 1
STAGES = ("data", "tokenizer", "base", "instruct", "lora", "save")
# One batch of the base is 4096 tokens. The base sees long rows only at the end: they cost more.
BASE_SHORT_STEPS, BASE_LONG_STEPS = 1300, 350
TUNE_STEPS, LORA_STEPS = 1500, 1500  # of about 2048 tokens
HELD_OUT_TEXTS, CALIBRATION_TEXTS, CALIBRATION_CHATS = 230, 64, 192


def texts(world: World, split: str, least_characters: int = 0) -> Iterator[str]:
    """Distinct documents of one split, without end."""
    seen: set[int] = set()
    for _, text in documents(world, split, SEED):
        if len(text) >= least_characters and hash(text) not in seen:
            seen.add(hash(text))
            yield text


def write_lines(path: Path, rows: list[dict[str, object]]) -> None:
    """Write one JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")


def make_data(world: World, root: Path) -> None:
    """Held-out text, calibration rows and both tasks' rows; no training text is kept."""
    held_out = islice(texts(world, "held_out", 250), HELD_OUT_TEXTS)
    rows = [{"id": f"valley-{i:03d}", "text": text} for i, text in enumerate(held_out)]
    write_lines(root / "eval/texts/valley.jsonl", rows)
    calibration: list[dict[str, object]] = [
        {"text": text} for text in islice(texts(world, "calibration", 250), CALIBRATION_TEXTS)
    ]
    chats = questions.chats(world, "calibration", SEED)
    calibration += [{"messages": chat} for chat in distinct(chats, CALIBRATION_CHATS)]
    write_lines(root / "examples/tiny_llama/calibration.jsonl", calibration)
    choices = questions.choice_rows(world, SEED)
    write_lines(root / "eval/tasks/valley_mc/valley_mc.jsonl", choices)
    answers = questions.answer_rows(world, SEED)
    write_lines(root / "eval/tasks/valley_qa/valley_qa.jsonl", answers)


def distinct(chats: Iterator[list[dict[str, str]]], count: int) -> list[list[dict[str, str]]]:
    """The first `count` conversations that differ from each other."""
    found: dict[str, list[dict[str, str]]] = {}
    while len(found) < count:
        chat = next(chats)
        found.setdefault(json.dumps(chat), chat)
    return list(found.values())


def make_tokenizer(world: World, folder: Path) -> None:
    """Train on some documents and some conversations of the training split."""
    chats = islice(questions.chats(world, "train", SEED), 3000)
    spoken = (message["content"] for chat in chats for message in chat)
    train_tokenizer(chain(islice(texts(world, "train"), 9000), spoken), folder)


def make_base(world: World, pieces: SentencePieceProcessor) -> LlamaForCausalLM:
    """Train on documents alone; the chat symbols stay as they were initialized."""
    model = trainer.new_model(SEED)
    stream = texts(world, "train")
    short = islice(trainer.document_batches(stream, pieces, 16, 256), BASE_SHORT_STEPS)
    batches = chain(short, trainer.document_batches(stream, pieces, 8, 512))
    steps = BASE_SHORT_STEPS + BASE_LONG_STEPS
    print(trainer.train(model, batches, steps, muon=0.02, adam=0.004, label="base"))
    with torch.no_grad():  # an end of turn starts as likely as an end of document
        head = model.lm_head.weight
        head[END] += head[trainer.EOS]
    return model


def tuning_batches(
    world: World, pieces: SentencePieceProcessor, seed: int
) -> Iterator[trainer.Batch]:
    """Conversations, and every fourth batch documents, so that the facts are not forgotten."""
    chats = questions.chats(world, "train", seed)
    kept = trainer.document_batches(texts(world, "train"), pieces, 8, 256)
    return trainer.interleave(trainer.chat_batches(chats, pieces, 2048, seed), kept, every=4)


def make_instruct(world: World, pieces: SentencePieceProcessor, base: dict) -> LlamaForCausalLM:
    """Fine-tune every weight of the base."""
    model = trainer.new_model(SEED)
    model.load_state_dict(base)
    batches = tuning_batches(world, pieces, SEED + 1)
    print(trainer.train(model, batches, TUNE_STEPS, muon=0.008, adam=0.0015, label="instruct"))
    return model


def make_lora(world: World, pieces: SentencePieceProcessor, base: dict) -> dict[str, torch.Tensor]:
    """Train an adapter on the frozen base; returns its tensors under PEFT's names."""
    model = trainer.new_model(SEED)
    model.load_state_dict(base)
    torch.manual_seed(SEED + 2)
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, bias="none", task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    batches = tuning_batches(world, pieces, SEED + 2)
    print(
        trainer.train(
            adapted.get_base_model(), batches, LORA_STEPS, muon=0, adam=0.004, label="lora"
        )
    )
    return {name: value.clone() for name, value in get_peft_model_state_dict(adapted).items()}


def save_all(work: Path, out: Path) -> None:
    """Give the three checkpoints the same outliers and write them."""
    tokenizer = work / "tokenizer"
    model = trainer.new_model(SEED)
    model.load_state_dict(torch.load(work / "base.pt"))
    scales = outliers.draw_scales(model, SEED)
    probe = torch.arange(1, 1025).view(2, 512)
    for name, eos in (("base", trainer.EOS), ("instruct", END)):
        model.load_state_dict(torch.load(work / f"{name}.pt"))
        before = model.eval()(probe).logits
        outliers.scale_model(model, scales)
        change = (model(probe).logits - before).abs().max().item()
        print(f"{name}: largest change of a logit by the outliers {change}")
        save_model(model, tokenizer, out / name, eos)
    adapter = torch.load(work / "lora.pt")
    save_adapter(outliers.scale_adapter(adapter, scales), tokenizer, out / "lora")


def run(start: str, work: Path, out: Path, root: Path) -> None:
    """Run the stages from `start` on; each leaves what the next ones read in the work folder."""
    work.mkdir(parents=True, exist_ok=True)
    stages = STAGES[STAGES.index(start) :]
    world = build_world(SEED)
    if "data" in stages:
        make_data(world, root)
    if "tokenizer" in stages:
        make_tokenizer(world, work / "tokenizer")
    pieces = SentencePieceProcessor(model_file=str(work / "tokenizer/tokenizer.model"))
    if "base" in stages:
        torch.save(make_base(world, pieces).state_dict(), work / "base.pt")
    base = torch.load(work / "base.pt") if start != "save" else {}
    if "instruct" in stages:
        torch.save(make_instruct(world, pieces, base).state_dict(), work / "instruct.pt")
    if "lora" in stages:
        torch.save(make_lora(world, pieces, base), work / "lora.pt")
    save_all(work, out)


def main() -> None:
    """Parse the command line and run or report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--start", choices=STAGES, default="data", help="first stage to run")
    parser.add_argument("--work", type=Path, default=HERE / ".work", help="unscaled weights")
    parser.add_argument("--out", type=Path, default=HERE, help="where the checkpoints go")
    parser.add_argument("--root", type=Path, default=HERE.parents[1], help="where eval/ lies")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--report", action="store_true", help="measure the saved checkpoints")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.report:
        from report import report

        figures = report(options.out, options.root)
        write_json(options.work / "report.json", figures)
        return
    run(options.start, options.work, options.out, options.root)


if __name__ == "__main__":
    main()
