"""Pre-train a Llama of three million parameters on text, for what is learned and forgotten of real text.

    python -m benchmarks.retention.text_model --data_dir DATA --output_dir MODELS/text-llama

The texts, the tokenizer and the training are those of ``benchmarks/recipes/make_small_model.py``: no label and no
answer is seen. Three times its size and seven times its steps take about twenty minutes on one core. One text in fifty
is kept out of the training, and the perplexity on these is told at the end, of the weights as they are saved (bfloat16,
6 MB). The model is made where it is needed and not kept in the repository: the terms of several of the texts are not
open ones.
"""

from __future__ import annotations

import argparse
import math
import random
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from benchmarks.recipes.make_small_model import (
    BATCH_SIZE,
    KINDS,
    blocks,
    make_tokenizer,
    pretrain,
    small_llama,
    training_texts,
)

WIDTH, INNER, LAYERS, HEADS, POSITIONS = 192, 512, 4, 6, 1024
VOCABULARY = 6144
HELD_OUT = 50


def text_llama(vocabulary: int) -> LlamaForCausalLM:
    """Return an untrained Llama whose head is its embedding."""
    return small_llama(vocabulary, width=WIDTH, inner=INNER, layers=LAYERS, heads=HEADS, positions=POSITIONS, tied=True)


def two_parts(texts: list[str], seed: int) -> tuple[list[str], list[str]]:
    """Return the texts to train on, and each fiftieth of a drawn order; no text is in both."""
    distinct = sorted(set(texts))
    random.Random(seed).shuffle(distinct)
    return [text for number, text in enumerate(distinct) if number % HELD_OUT], distinct[::HELD_OUT]


@torch.no_grad()
def mean_loss(model: LlamaForCausalLM, rows_RL: Tensor) -> float:
    """Return the mean loss of a token in nats, over rows of equal length."""
    model.eval()
    parts = rows_RL.split(BATCH_SIZE)
    return sum(model(input_ids=part, labels=part).loss.item() * len(part) for part in parts) / len(rows_RL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True, help="folder with cl/ and trace/")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=4000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    kind = KINDS["llama"]
    seen, unseen = two_parts(training_texts(arguments.data_dir), arguments.seed)
    tokenizer = make_tokenizer(kind, seen, VOCABULARY)
    rows_RL = blocks(seen, tokenizer, arguments.seed)
    model = text_llama(len(tokenizer))
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens, {rows_RL.numel():,} tokens of text")
    pretrain(model, kind, tokenizer, rows_RL, arguments.steps, half=True)
    model.to(torch.bfloat16)
    loss = mean_loss(model, blocks(unseen, tokenizer, arguments.seed))
    print(f"perplexity {math.exp(loss):.1f} on {len(unseen)} texts kept out of the training")
    model.save_pretrained(arguments.output_dir)
    tokenizer.save_pretrained(arguments.output_dir)


if __name__ == "__main__":
    main()
