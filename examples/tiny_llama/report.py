"""Measures the saved checkpoints with transformers: what `train.py --report` prints."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import outliers
import torch
from documents import documents
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from world import build_world

Rows = list[dict]


def read_lines(path: Path) -> Rows:
    """The rows of a JSON Lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@torch.no_grad()
def log_probabilities(model, ids: list[int]) -> torch.Tensor:
    """Log-probability (nats) of each token but the first, given those before it: (tokens - 1,)."""
    tokens = torch.tensor([ids])
    logits = model(tokens).logits[0, :-1].float().log_softmax(-1)  # (tokens - 1, vocab)
    return logits.gather(-1, tokens[0, 1:, None]).squeeze(-1)


def perplexity(model, tokenizer, texts: list[str]) -> float:
    """The exponential of the mean negative log-likelihood per token, all documents together.

    Each document is scored whole and alone, `<s>` in front; `<s>` itself is not counted.
    """
    scores = [log_probabilities(model, tokenizer.encode(text)) for text in texts]
    return math.exp(-torch.cat(scores).mean().item())


def unigram_perplexity(tokenizer, texts: list[str]) -> float:
    """Perplexity of the training text's token frequencies (plus one) on the same tokens."""
    sample = islice(documents(build_world(), "train", seed=99), 4000)
    counts = Counter(i for _, text in sample for i in tokenizer.encode(text)[1:])
    total = counts.total() + len(tokenizer)
    tokens = [i for text in texts for i in tokenizer.encode(text)[1:]]
    return math.exp(-sum(math.log((counts[i] + 1) / total) for i in tokens) / len(tokens))


def prompt_ids(tokenizer, question: str) -> list[int]:
    """The question as a user turn, up to where the assistant speaks."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    return tokenizer.encode(text, add_special_tokens=False)


def choice_hits(model, tokenizer, rows: Rows) -> list[bool]:
    """For each row, whether the right choice has the highest summed log-likelihood (acc)."""
    hits = []
    for row in rows:
        prompt = prompt_ids(tokenizer, row["question"])
        totals = []
        for choice in row["choices"]:
            ids = prompt + tokenizer.encode(choice, add_special_tokens=False)
            totals.append(log_probabilities(model, ids)[len(prompt) - 1 :].sum().item())
        hits.append(totals.index(max(totals)) == row["answer"])
    return hits


@torch.no_grad()
def answer_hits(model, tokenizer, rows: Rows) -> list[bool]:
    """For each row, whether the greedy answer, stripped, is the expected one (exact match)."""
    hits = []
    for row in rows:
        prompt = torch.tensor([prompt_ids(tokenizer, row["question"])])
        mask = torch.ones_like(prompt)
        out = model.generate(prompt, attention_mask=mask, max_new_tokens=32, do_sample=False)
        text = tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True)
        hits.append(text.strip() == row["answer"])
    return hits


def by_group(rows: Rows, hits: list[bool]) -> dict[str, float]:
    """The share of hits over all rows and in each group of rows."""
    groups = {"all": hits}
    for row, hit in zip(rows, hits, strict=True):
        groups.setdefault(row["group"], []).append(hit)
    return {name: round(sum(values) / len(values), 4) for name, values in groups.items()}


def figures_of(model, tokenizer, texts: list[str], root: Path) -> dict[str, object]:
    """Perplexity and both tasks' scores of one model."""
    choices = read_lines(root / "eval/tasks/valley_mc/valley_mc.jsonl")
    answers = read_lines(root / "eval/tasks/valley_qa/valley_qa.jsonl")
    return {
        "perplexity": round(perplexity(model, tokenizer, texts), 4),
        "valley_mc acc": by_group(choices, choice_hits(model, tokenizer, choices)),
        "valley_qa exact_match": by_group(answers, answer_hits(model, tokenizer, answers)),
    }


def report(folder: Path, root: Path) -> dict[str, object]:
    """Measure base, instruct and the adapter, and the first two after round-to-nearest."""
    texts = [row["text"] for row in read_lines(root / "eval/texts/valley.jsonl")]
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")

    def load(name: str):
        return AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.bfloat16).eval()

    def rounded(name: str):
        model = load(name)
        outliers.round_to_nearest(model)
        return model

    makers: dict[str, Callable] = {
        "base": lambda: load("base"),
        "instruct": lambda: load("instruct"),
        "lora": lambda: PeftModel.from_pretrained(load("base"), folder / "lora").eval(),
        "base, RTN W4A16 g128": lambda: rounded("base"),
        "instruct, RTN W4A16 g128": lambda: rounded("instruct"),
    }
    figures: dict[str, object] = {
        "parameters": sum(p.numel() for p in load("base").parameters()),
        "held-out tokens": sum(len(tokenizer.encode(text)) - 1 for text in texts),
        "unigram perplexity": round(unigram_perplexity(tokenizer, texts), 2),
    }
    print(json.dumps(figures, indent=2))
    for name, make in makers.items():
        figures[name] = figures_of(make(), tokenizer, texts, root)
        print(name, json.dumps(figures[name]), flush=True)
    return figures
