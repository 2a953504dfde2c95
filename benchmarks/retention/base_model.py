"""Train the model of a test bed from nothing, until it knows the first set of facts by heart and has the skills.

    python -m benchmarks.retention.base_model --data_dir BED --output_dir BED/1m --size 1m --seed 0

A Llama of about 1, 3 or 10 million parameters with one token for each word. It learns ``facts-0.train.jsonl`` and
``skills.train.jsonl``; how far it came is told by the rows that a run scores. The same seed gives the same model on the
same machine. On one core 1m takes about four minutes.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.recipes.make_small_model import small_llama, train
from benchmarks.retention.bed import FACTS, SKILL_ROWS, read_rows, run_script, test_file
from benchmarks.retention.facts import Row
from benchmarks.retention.skills import SKILLS
from lorica.evaluation.generate import greedy_answers

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
POSITIONS = 32
FACTS_PER_STEP, SKILLS_PER_STEP = 64, 32
WEIGHT_DECAY, LONGEST_ANSWER = 0.5, 6


class Size(NamedTuple):
    """Width, inner width, layers and heads of a Llama, and its highest learning rate."""

    width: int
    inner: int
    layers: int
    heads: int
    learning_rate: float


SIZES = {
    "tiny": Size(32, 64, 1, 2, 5e-3),
    "1m": Size(160, 448, 3, 5, 3e-3),
    "3m": Size(256, 640, 4, 8, 2e-3),
    "10m": Size(384, 896, 6, 8, 1e-3),
}


def make_tokenizer(rows: Sequence[Row]) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token for each word of the rows; it knows no other word."""
    words = sorted({word for row in rows for word in (row.prompt + row.completion).split()})
    tokenizer = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate([*SPECIAL, *words])}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=POSITIONS,
        model_input_names=["input_ids", "attention_mask"],
    )


def make_model(size: Size, vocabulary: int, seed: int) -> LlamaForCausalLM:
    """Return the untrained model."""
    torch.manual_seed(seed)
    return small_llama(
        vocabulary, width=size.width, inner=size.inner, layers=size.layers, heads=size.heads, positions=POSITIONS
    )


def batches(
    rows: Sequence[Row], size: int, tokenizer: PreTrainedTokenizerFast, seed: int
) -> Iterator[dict[str, Tensor]]:
    """Yield batches of whole rows, prompts and answers, without end; each pass in an order of its own."""
    texts = [row.prompt + row.completion + " </s>" for row in rows]
    encoded = tokenizer(texts, padding=True, return_tensors="pt")
    ids_RL, mask_RL = encoded["input_ids"], encoded["attention_mask"]
    labels_RL = ids_RL.masked_fill(mask_RL == 0, -100)
    generator = torch.Generator().manual_seed(seed)
    while True:
        for chosen in torch.randperm(len(rows), generator=generator).split(size):
            yield {"input_ids": ids_RL[chosen], "attention_mask": mask_RL[chosen], "labels": labels_RL[chosen]}


def pretrain(
    model: LlamaForCausalLM, parts: Sequence[Iterator[dict[str, Tensor]]], steps: int, learning_rate: float
) -> None:
    """Train all parameters; a step takes a batch of each part.

    The weight decay of the matrices is strong, as it is for the demo's model: weights that are not used fall away, and
    spectra come to look like those of large models.
    """
    matrices = [p for p in model.parameters() if p.dim() == 2]
    norms = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98))

    def losses() -> Iterator[Tensor]:
        for part in parts:
            yield model(**{name: tensor.to(model.device) for name, tensor in next(part).items()}).loss

    train(model, optimizer, steps, losses)


def share_right(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: Sequence[Row]) -> float:
    """Return how many percent of the rows the model answers as they say, greedily and to the end."""
    prompts = tokenizer([row.prompt for row in rows])["input_ids"]
    model.eval()
    written = greedy_answers(model, tokenizer, prompts, max_new_tokens=LONGEST_ANSWER, batch_size=400)
    right = sum(
        one.ended and one.text.split() == row.completion.split() for one, row in zip(written, rows, strict=True)
    )
    return 100 * right / len(rows)


def make(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)
    facts, skills = read_rows(arguments.data_dir / FACTS), read_rows(arguments.data_dir / SKILL_ROWS)
    size, tokenizer = SIZES[arguments.size], make_tokenizer([*facts, *skills])
    model = make_model(size, len(tokenizer), arguments.seed)
    model.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))  # type: ignore[arg-type]
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens, {len(facts)} facts", flush=True)
    parts = [
        batches(facts, FACTS_PER_STEP, tokenizer, arguments.seed),
        batches(skills, SKILLS_PER_STEP, tokenizer, arguments.seed),
    ]
    pretrain(model, parts, arguments.steps, size.learning_rate)
    for name in ("facts-0", *SKILLS):
        print(f"{name}: {share_right(model, tokenizer, read_rows(arguments.data_dir / test_file(name))):.1f} % right")
    model.save_pretrained(arguments.output_dir)
    tokenizer.save_pretrained(arguments.output_dir)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True, help="folder of a bed")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the model")
    parser.add_argument("--size", choices=list(SIZES), default="1m")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the order of the rows")
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--threads", type=int, default=1, help="the result depends on it in the last digits")
    run_script(parser, make)


if __name__ == "__main__":
    main()
