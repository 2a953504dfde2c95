"""Make a small Llama, T5 or BERT from nothing, for the recipes: quick enough for every method on one CPU core.

    python benchmarks/recipes/make_small_model.py --data_dir DATA --output_dir MODELS/llama --kind llama --seed 0

Tokenizer and weights come from the sentences and prompts of the data folder's training rows alone
(``cl/*/train.json``, ``trace/*/train.json``); no label and no answer is seen. The objective is the next token for
Llama, corrupted spans for T5, masked tokens for BERT. The same seed gives the same model on the same machine. A million
parameters know next to nothing, so what is measured with such a model shows that everything runs, and is no
benchmark score.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    get_cosine_schedule_with_warmup,
)

WIDTH, INNER, LAYERS, HEADS, POSITIONS = 128, 384, 2, 4, 1024
VOCABULARY, BLOCK = 4096, 128
BATCH_SIZE, LEARNING_RATE, WEIGHT_DECAY = 16, 2e-3, 0.1
MASKED, SPANS, SPAN_LENGTH = 0.15, 6, 3
IGNORED = -100


def causal(block_BL: Tensor, tokenizer: PreTrainedTokenizerFast) -> dict[str, Tensor]:
    """Return a batch of next-token prediction."""
    return {"input_ids": block_BL, "labels": block_BL}


def masked(block_BL: Tensor, tokenizer: PreTrainedTokenizerFast) -> dict[str, Tensor]:
    """Return a batch of masked language modelling: 15 % of the tokens behind [CLS] are to be guessed."""
    first = torch.full_like(block_BL[:, :1], tokenizer.cls_token_id)
    ids = torch.cat([first, block_BL[:, :-1]], dim=1)
    hidden = torch.rand(ids.shape) < MASKED
    hidden[:, 0] = False
    return {
        "input_ids": ids.masked_fill(hidden, tokenizer.mask_token_id),
        "labels": ids.masked_fill(~hidden, IGNORED),
    }


def corrupted(block_BL: Tensor, tokenizer: PreTrainedTokenizerFast) -> dict[str, Tensor]:
    """Return a batch of span corruption: in each sixth of a row three tokens give way to a sentinel."""
    rows = [_corrupted_row(row.tolist(), tokenizer) for row in block_BL]
    sources, targets = zip(*rows, strict=True)
    return {"input_ids": torch.tensor(sources), "labels": torch.tensor(targets)}


def _corrupted_row(ids: list[int], tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
    source: list[int] = []
    target: list[int] = []
    size = len(ids) // SPANS
    for number, start in enumerate(range(0, size * SPANS, size)):
        part = ids[start : start + size]
        at = int(torch.randint(size - SPAN_LENGTH, ()))
        sentinel = int(tokenizer.convert_tokens_to_ids(f"<extra_id_{number}>"))
        source += [*part[:at], sentinel, *part[at + SPAN_LENGTH :]]
        target += [sentinel, *part[at : at + SPAN_LENGTH]]
    return [*source, tokenizer.eos_token_id], [*target, tokenizer.eos_token_id]


def small_llama(
    vocabulary: int, *, width: int, inner: int, layers: int, heads: int, positions: int, tied: bool = False
) -> LlamaForCausalLM:
    """Return an untrained Llama, whose first three tokens are padding, beginning and end; ``tied``: its head is its
    embedding."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=positions,
        tie_word_embeddings=tied,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def llama(vocabulary: int) -> LlamaForCausalLM:
    """Return an untrained Llama."""
    return small_llama(vocabulary, width=WIDTH, inner=INNER, layers=LAYERS, heads=HEADS, positions=POSITIONS)


def t5(vocabulary: int) -> T5ForConditionalGeneration:
    """Return an untrained T5."""
    config = T5Config(
        vocab_size=vocabulary,
        d_model=WIDTH,
        d_kv=WIDTH // HEADS,
        d_ff=INNER,
        num_layers=LAYERS,
        num_heads=HEADS,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config)


def bert(vocabulary: int) -> BertForMaskedLM:
    """Return an untrained BERT."""
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=POSITIONS,
        pad_token_id=0,
    )
    return BertForMaskedLM(config)


class Kind(NamedTuple):
    """What tells one kind of model from the others.

    Attributes:
        special: the tokenizer's special tokens in the order of their ids, from 0, by the name transformers gives them.
        frame: what the tokenizer puts around a text, which is ``$A``.
        model: makes it, given the size of the vocabulary.
        objective: makes a batch of blocks of text.
    """

    special: dict[str, str]
    frame: str
    model: Callable[[int], PreTrainedModel]
    objective: Callable[[Tensor, PreTrainedTokenizerFast], dict[str, Tensor]]


KINDS = {
    "llama": Kind({"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}, "<s> $A", llama, causal),
    "t5": Kind({"pad_token": "<pad>", "eos_token": "</s>"}, "$A </s>", t5, corrupted),
    "bert": Kind(
        {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"},
        "[CLS] $A [SEP]",
        bert,
        masked,
    ),
}


def training_texts(data_dir: Path) -> list[str]:
    """Return the sentences of the classification tasks and the prompts of the instruction tasks."""
    files = sorted([*data_dir.glob("cl/*/train.json"), *data_dir.glob("trace/*/train.json")])
    if not files:
        raise SystemExit(f"{data_dir}: no cl/*/train.json and no trace/*/train.json")
    rows = [row for file in files for row in json.loads(file.read_text(encoding="utf-8"))]
    return [row["sentence"] if "sentence" in row else row["prompt"] for row in rows]


def make_tokenizer(kind: Kind, texts: list[str], vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """Return a byte-level byte-pair tokenizer of so many pieces trained on the texts."""
    sentinels = [f"<extra_id_{number}>" for number in range(SPANS)] if kind.objective is corrupted else []
    special = [*kind.special.values(), *sentinels]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    numbers = [(token, special.index(token)) for token in kind.frame.split() if token in special]
    tokenizer.post_processor = processors.TemplateProcessing(single=kind.frame, special_tokens=numbers)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=POSITIONS,
        model_input_names=["input_ids", "attention_mask"],
        additional_special_tokens=sentinels,
        **kind.special,
    )


def blocks(texts: list[str], tokenizer: PreTrainedTokenizerFast, seed: int) -> Tensor:
    """Return all texts in a drawn order, end to end with an end mark between them, cut into rows of 128 tokens."""
    order = list(texts)
    random.Random(seed).shuffle(order)
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    ids = [
        number
        for one in tokenizer(order, add_special_tokens=False, verbose=False)["input_ids"]
        for number in (*one, end)
    ]
    return torch.tensor(ids[: len(ids) // BLOCK * BLOCK]).view(-1, BLOCK)


def batches(rows_RL: Tensor) -> Iterator[Tensor]:
    """Yield batches without end, each pass in an order of its own."""
    while True:
        for chosen in torch.randperm(len(rows_RL)).split(BATCH_SIZE)[:-1]:
            yield rows_RL[chosen]


def pretrain(
    model: PreTrainedModel, kind: Kind, tokenizer: PreTrainedTokenizerFast, rows_RL: Tensor, steps: int, *,
    half: bool = False,
) -> None:  # fmt: skip
    """Train all parameters; ``half``: with products in bfloat16."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, betas=(0.9, 0.98))
    drawn = batches(rows_RL)

    def losses() -> Iterator[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss: Tensor = model(**kind.objective(next(drawn), tokenizer)).loss
        yield loss

    model.train()
    train(model, optimizer, steps, losses)


def train(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, steps: int, losses: Callable[[], Iterator[Tensor]]
) -> None:
    """Take so many steps at a rate that rises for a twentieth of them and falls as a cosine, and tell how it goes.

    Args:
        losses: those of one step, whose gradients are added; each is asked for when the one before is done with.
    """
    scheduler = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=steps // 20, num_training_steps=steps)
    start = time.monotonic()
    for step in range(1, steps + 1):
        for loss in losses():
            loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"step {step:5d}  loss {loss.item():.3f}  {time.monotonic() - start:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True, help="folder with cl/ and trace/")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the model")
    parser.add_argument("--kind", choices=list(KINDS), default="llama")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=600)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    kind = KINDS[arguments.kind]
    texts = training_texts(arguments.data_dir)
    tokenizer = make_tokenizer(kind, texts)
    rows_RL = blocks(texts, tokenizer, arguments.seed)
    model = kind.model(len(tokenizer))
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens, {rows_RL.numel():,} tokens of text")
    pretrain(model, kind, tokenizer, rows_RL, arguments.steps)
    model.save_pretrained(arguments.output_dir)
    tokenizer.save_pretrained(arguments.output_dir)


if __name__ == "__main__":
    main()
