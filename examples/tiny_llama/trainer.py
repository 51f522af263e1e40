"""Training on a CPU: BF16 weights with FP32 masters, Muon for matrices and AdamW for the rest."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from random import Random

import torch
from sentencepiece import SentencePieceProcessor
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

BOS, EOS = 1, 2
IGNORED = -100  # label of a token that carries no loss
Batch = tuple[torch.Tensor, torch.Tensor]  # token ids and labels, both (batch, sequence)


def new_model(seed: int) -> LlamaForCausalLM:
    """An untrained model; every Linear's dimensions are multiples of 128, as group sizes need."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():  # not `.to()`: the rotary frequencies stay FP32
        parameter.data = parameter.data.to(torch.bfloat16)
    return model


def document_batches(
    texts: Iterator[str], model: SentencePieceProcessor, rows: int, length: int
) -> Iterator[Batch]:
    """Documents one after another, `<s> ... </s>`, cut into rows of `length` tokens."""
    stream: list[int] = []
    need = rows * length
    while True:
        while len(stream) < need:
            for ids in model.encode(list(islice(texts, 64))):
                stream += [BOS, *ids, EOS]
        tokens = torch.tensor(stream[:need]).view(rows, length)
        del stream[:need]
        yield tokens, tokens


def encode_chat(messages: list[dict[str, str]], model: SentencePieceProcessor) -> list[list[int]]:
    """Token ids and labels of one conversation; only assistant turns carry loss."""
    tokens, labels = [BOS], [IGNORED]
    for message in messages:
        head = model.encode(f"<|{message['role']}|>")
        body = model.encode(f"{message['content']}<|end|>")
        tokens += head + body
        spoken = message["role"] == "assistant"
        labels += [IGNORED] * len(head) + (body if spoken else [IGNORED] * len(body))
    return [tokens, labels]


def chat_batches(
    chats: Iterator[list[dict[str, str]]], model: SentencePieceProcessor, tokens: int, seed: int
) -> Iterator[Batch]:
    """Conversations of similar length together, about `tokens` tokens a batch, padded right."""
    rng = Random(seed)
    while True:
        pool = sorted((encode_chat(m, model) for m in islice(chats, 1024)), key=lambda c: len(c[0]))
        batches: list[list[list[list[int]]]] = [[]]
        for chat in pool:
            if (len(batches[-1]) + 1) * len(chat[0]) > tokens:
                batches.append([])
            batches[-1].append(chat)
        rng.shuffle(batches)
        for batch in batches:
            width = max(len(ids) for ids, _ in batch)
            ids = torch.tensor([ids + [EOS] * (width - len(ids)) for ids, _ in batch])
            labels = torch.tensor([tags + [IGNORED] * (width - len(tags)) for _, tags in batch])
            yield ids, labels


def interleave(first: Iterator[Batch], second: Iterator[Batch], every: int) -> Iterator[Batch]:
    """Batches of `first` with one of `second` after each `every - 1` of them."""
    while True:
        yield from islice(first, every - 1)
        yield next(second)


def orthogonalize(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """The nearest semi-orthogonal matrix, by Muon's quintic Newton-Schulz iteration."""
    x = matrix.bfloat16()
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.T if tall else x).float()


class MasterOptimizer:
    """Updates FP32 copies of BF16 parameters: a BF16 sum would lose small steps."""

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], muon: float, adam: float):
        self.slots = []
        self.steps = 0
        for name, parameter in parameters:
            inner = parameter.ndim == 2 and "embed" not in name and "lm_head" not in name
            master = parameter.detach().float().clone()
            moments = (torch.zeros_like(master), torch.zeros_like(master))
            rate = muon if inner and muon else adam
            self.slots.append((parameter, master, moments, bool(inner and muon), rate))

    @torch.no_grad()
    def step(self, scale: float) -> None:
        """One update; `scale` multiplies every learning rate. Clears the gradients."""
        self.steps += 1
        for parameter, master, (first, second), is_muon, rate in self.slots:
            if parameter.grad is None:
                continue
            gradient = parameter.grad.float()
            if is_muon:
                first.lerp_(gradient, 0.05)
                shape = max(1.0, master.shape[0] / master.shape[1]) ** 0.5
                update = orthogonalize(gradient.lerp(first, 0.95)) * shape
                master.mul_(1 - rate * scale * 0.02)  # weight decay
            else:
                first.lerp_(gradient, 0.1)
                second.lerp_(gradient.square(), 0.05)
                unbiased = second / (1 - 0.95**self.steps)
                update = first / (1 - 0.9**self.steps) / (unbiased.sqrt() + 1e-8)
            master.add_(update, alpha=-rate * scale)
            parameter.copy_(master)
            parameter.grad = None


def schedule(step: int, steps: int, warmup: int = 20, decay: float = 0.5) -> float:
    """Linear warm-up, a plateau, then a linear decay over the last part `decay` of the run."""
    return min(1.0, (step + 1) / warmup, (steps - step) / (steps * decay))


def train(
    model: LlamaForCausalLM,
    batches: Iterator[Batch],
    steps: int,
    muon: float,
    adam: float,
    label: str,
) -> dict[str, float]:
    """Train in place; returns the tokens seen, the seconds taken and the last mean loss (nats)."""
    trainable = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    optimizer = MasterOptimizer(trainable, muon, adam)
    model.train()
    started, seen_tokens, recent = time.monotonic(), 0, math.nan
    for step, (ids, labels) in enumerate(islice(batches, steps)):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        targets = labels[:, 1:]
        counted = targets != IGNORED  # only these need logits: (tokens, vocab)
        logits = model.lm_head(hidden[counted]).float()
        loss = nn.functional.cross_entropy(logits, targets[counted])
        loss.backward()
        optimizer.step(schedule(step, steps))
        seen_tokens += ids.numel()
        recent = loss.item() if math.isnan(recent) else 0.95 * recent + 0.05 * loss.item()
        if step % 50 == 0 or step == steps - 1:
            seconds = time.monotonic() - started
            print(f"{label} {step + 1}/{steps} loss {recent:.4f} {seconds:.0f} s", flush=True)
    seconds = round(time.monotonic() - started, 1)
    return {"tokens": seen_tokens, "seconds": seconds, "loss_nats": round(recent, 4)}
