# pyright: basic, reportMissingImports=false
"""Train the embedded model from scratch: ``python -m ec_agents.embedded.train --steps 6000 --out weights.npz``.

Needs PyTorch (extra ``train``); nothing else in the package does. The network is the one of ``transformer.py``:
RMSNorm, rotary positions, causal attention, SwiGLU, tied embeddings. Muon trains the hidden matrices, AdamW the rest;
the loss is on the response tokens only. Examples are drawn afresh from a seeded generator, so none is seen twice on
purpose.
"""

import argparse
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ec_agents.embedded import vocabulary
from ec_agents.embedded.tasks import NARROW, WIDE, Difficulty
from ec_agents.embedded.traces import Example, make_example
from ec_agents.embedded.transformer import Shape

POOL = 2048
"""Examples generated at a time, sorted by length and cut into batches."""
BATCH_TOKENS = 4096
"""Tokens per batch, including padding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Tasks and learning rates of one stage of training."""

    difficulty: Difficulty
    """The tasks."""
    rate: float
    """Learning rate of the hidden matrices; the rest learn at 0.3 times this rate."""
    weight_decay: float
    """Of the hidden matrices; it keeps attention logits from growing until the heads are stuck."""
    decay: float
    """Last share of the schedule, over which the rates fall to 0."""


STAGES = {
    "wide": Stage(difficulty=WIDE, rate=0.01, weight_decay=0.3, decay=0.4),
    "narrow": Stage(difficulty=NARROW, rate=0.007, weight_decay=0.05, decay=1.0),
}


class Layer(nn.Module):
    """One block: attention, then a gated feed-forward network, each on a normalised copy."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.attn_norm = nn.Parameter(torch.ones(shape.width))
        self.qkv = nn.Linear(shape.width, 3 * shape.width, bias=False)
        self.out = nn.Linear(shape.width, shape.width, bias=False)
        self.mlp_norm = nn.Parameter(torch.ones(shape.width))
        self.gate_up = nn.Linear(shape.width, 2 * shape.hidden, bias=False)
        self.down = nn.Linear(shape.hidden, shape.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """One block over ``(batch, time, width)``."""
        batch, length, width = x.shape
        qkv = self.qkv(F.rms_norm(x, (width,), self.attn_norm, 1e-5))
        q, k, v = qkv.view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        gate, up = self.gate_up(F.rms_norm(x, (width,), self.mlp_norm, 1e-5)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class Decoder(nn.Module):
    """The language model."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed = nn.Parameter(torch.randn(shape.vocabulary, shape.width) * 0.02)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = nn.Parameter(torch.ones(shape.width))
        for layer in self.layers:
            nn.init.zeros_(layer.out.weight)
            nn.init.zeros_(layer.down.weight)

    def forward(self, ids: Tensor) -> Tensor:
        """Final hidden states, ``(batch, time, width)``."""
        angle = torch.arange(ids.shape[1])[:, None] * torch.tensor(self.shape.frequencies())
        x = self.embed[ids]
        for layer in self.layers:
            x = layer(x, angle.cos(), angle.sin())
        return F.rms_norm(x, (self.shape.width,), self.norm, 1e-5)


class Muon(torch.optim.Optimizer):
    """Momentum whose matrix is replaced by its nearest orthogonal one (Newton-Schulz iterations).

    Works like ``torch.optim.Muon``, which iterates in bfloat16; float32 is some ten times as fast on a CPU.
    """

    def __init__(self, matrices: list[nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every matrix."""
        for group in self.param_groups:
            for p in group["params"]:
                velocity = self.state[p].setdefault("velocity", torch.zeros_like(p))
                velocity.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonal(p.grad.lerp(velocity, group["momentum"]))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(update, alpha=group["lr"] * max(1.0, p.shape[0] / p.shape[1]) ** 0.5)


def orthogonal(x: Tensor) -> Tensor:
    """Nearly the closest orthogonal matrix, by five quintic Newton-Schulz iterations."""
    tall = x.shape[0] > x.shape[1]
    x = (x.T if tall else x) / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if tall else x


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: the two halves of each head are the coordinates that turn together."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)


def batches(seed: int, difficulty: Difficulty) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless ``(ids, is_response)`` batches, each ``(batch, time)``."""
    rng = random.Random(seed)
    while True:
        pool = sorted(
            (make_example(rng, difficulty) for _ in range(POOL)), key=lambda e: len(e.prompt) + len(e.response)
        )
        groups: list[list[Example]] = [[]]
        for example in pool:
            if (len(groups[-1]) + 1) * (len(example.prompt) + len(example.response)) > BATCH_TOKENS:
                groups.append([])
            groups[-1].append(example)
        rng.shuffle(groups)
        yield from map(collate, groups)


def collate(examples: list[Example]) -> tuple[Tensor, Tensor]:
    """Pad examples on the right."""
    length = max(len(e.prompt) + len(e.response) for e in examples)
    ids = torch.zeros(len(examples), length, dtype=torch.long)
    learn = torch.zeros(len(examples), length, dtype=torch.bool)
    for row, example in enumerate(examples):
        end = len(example.prompt) + len(example.response)
        ids[row, :end] = torch.tensor(example.prompt + example.response)
        learn[row, len(example.prompt) : end] = True
    return ids, learn


def loss_of(model: Decoder, ids: Tensor, learn: Tensor) -> Tensor:
    """Mean cross-entropy of the response tokens, nats."""
    learned = learn[:, 1:]
    hidden = model(ids[:, :-1])[learned]
    return F.cross_entropy(hidden @ model.embed.T, ids[:, 1:][learned])


def save(model: Decoder, path: Path) -> None:
    """Write the weights as float16 arrays; the names are those that ``transformer.py`` reads."""
    arrays = {
        name.removesuffix(".weight"): p.detach().numpy().astype(np.float16) for name, p in model.named_parameters()
    }
    np.savez(path, **arrays)


def restore(model: Decoder, path: Path) -> None:
    """Read weights that ``save`` wrote."""
    with np.load(path, allow_pickle=False) as arrays, torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.from_numpy(arrays[name.removesuffix(".weight")].astype(np.float32)))


def train(
    stage: Stage, steps: int, out: Path, *, start: Path | None = None, until: int | None = None, seed: int = 0
) -> None:
    """Train one stage and write the weights to ``out``, every 500 steps and at the end.

    Args:
        stage: What to train on, and how fast.
        steps: Batches of the whole schedule.
        out: The file of weights to write.
        start: Weights to go on from; None begins with random ones.
        until: Stop after so many batches; None runs the whole schedule.
        seed: Of the weights and the examples.
    """
    torch.manual_seed(seed)
    model = Decoder(Shape(vocabulary=vocabulary.SIZE))
    if start is not None:
        restore(model, start)
    matrices = [p for p in model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is m for m in matrices)]
    optimizers = [
        Muon(matrices, lr=stage.rate, weight_decay=stage.weight_decay),
        torch.optim.AdamW(others, lr=0.3 * stage.rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    schedule = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda i: min((i + 1) / 50, 1.0, (steps - i) / (stage.decay * steps)))
        for o in optimizers
    ]
    began, tokens, recent = time.perf_counter(), 0, 0.0
    last = until or steps
    for step, (ids, learn) in zip(range(1, last + 1), batches(seed, stage.difficulty), strict=False):
        loss = loss_of(model, ids, learn)
        loss.backward()
        for part in (*optimizers, *schedule):
            part.step()
        model.zero_grad()
        tokens += ids.numel()
        recent = loss.item() if step == 1 else 0.98 * recent + 0.02 * loss.item()
        if step % 50 == 0:
            seconds = time.perf_counter() - began
            print(f"step {step} loss {recent:.4f} tokens {tokens} seconds {seconds:.0f}", flush=True)
        if step % 500 == 0 or step == last:
            save(model, out)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train the embedded model.")
    parser.add_argument("--stage", choices=STAGES, default="wide")
    parser.add_argument("--steps", type=int, required=True, help="batches of 4,096 tokens")
    parser.add_argument("--until", type=int, help="stop after so many batches of the schedule")
    parser.add_argument("--start", type=Path, help="weights to go on from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    train(
        STAGES[options.stage],
        options.steps,
        options.out,
        start=options.start,
        until=options.until,
        seed=options.seed,
    )


if __name__ == "__main__":
    main()
