"""Make the model, the tokenizer and the rows of ``lorica demo``, all from one seed.

    python scripts/make_demo_model.py

writes ``src/lorica/assets/demo_model`` and ``src/lorica/benchmarks/demo/*.jsonl``: a Llama of about a million
parameters, trained from nothing on an invented atlas and on everyday sentences, and the weeks it has not seen.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from random import Random

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, get_cosine_schedule_with_warmup

from lorica.benchmarks.demo.language import VOCABULARY, name, sentence, word_list
from lorica.benchmarks.demo.tasks import Row, World, make_world

SOURCE = Path(__file__).resolve().parents[1] / "src" / "lorica"
PER_STEP = {"atlas": 24, "sentences": 12, "lists": 10}
LEARNING_RATE, WEIGHT_DECAY, SEED = 3e-3, 0.5, 0


def make_tokenizer(world: World, vocab_size: int = 640) -> PreTrainedTokenizerFast:
    """Return a byte-pair tokenizer that knows the demo's words and cuts names into syllables."""
    random = Random(SEED)
    names = [" ".join(name(random) for _ in range(5)) for _ in range(3000)]
    sentences = [sentence(random) for _ in range(10000)]
    dictionary = [*VOCABULARY, " " + " ".join(VOCABULARY)] * 300
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=[chr(code) for code in range(33, 127)],
        show_progress=False,
    )
    tokenizer.train_from_iterator([*names, *sentences, *dictionary, *map("".join, world.atlas)], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=64
    )


def make_model(vocab_size: int) -> LlamaForCausalLM:
    """Return the untrained model."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=160,
        intermediate_size=448,
        num_hidden_layers=3,
        num_attention_heads=5,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def batches(world: World, tokenizer: PreTrainedTokenizerFast) -> Iterator[dict[str, Tensor]]:
    """Yield batches of atlas, sentences and dictionary without end."""
    random = Random(SEED)
    atlas = ["".join(row) for row in world.atlas]
    while True:
        texts = random.sample(atlas, PER_STEP["atlas"])
        texts += [sentence(random) for _ in range(PER_STEP["sentences"])]
        texts += [word_list(random) for _ in range(PER_STEP["lists"])]
        batch = tokenizer([text + "</s>" for text in texts], padding=True, return_tensors="pt")
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        yield dict(batch)


def pretrain(model: LlamaForCausalLM, data: Iterable[dict[str, Tensor]], steps: int) -> None:
    """Train all parameters.

    The weight decay of the matrices is strong: it drives what the model does not use out of its weights, so
    that they end with the falling spectra of large models, which a million parameters do not get otherwise.
    """
    matrices = [p for p in model.parameters() if p.dim() == 2]
    norms = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98))
    scheduler = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=steps // 20, num_training_steps=steps)
    start = time.monotonic()
    for step, batch in zip(range(1, steps + 1), data, strict=False):
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % 250 == 0:
            print(f"step {step:5d}  loss {loss.item():.3f}  {time.monotonic() - start:.0f} s", flush=True)


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write one JSON object a line."""
    path.write_text("".join(json.dumps(row._asdict()) + "\n" for row in rows), encoding="utf-8")


def write_stream(world: World, folder: Path) -> None:
    """Write the rows of the weeks and of the atlas, each fact of the atlas in one of its two wordings."""
    for week, split in world.weeks.items():
        for part, rows in split._asdict().items():
            write_rows(folder / f"{week}.{part}.jsonl", rows)
    write_rows(folder / "atlas.jsonl", world.atlas[::2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=SOURCE / "assets" / "demo_model", help="folder of the model")
    parser.add_argument("--stream", type=Path, default=SOURCE / "benchmarks" / "demo", help="folder of the rows")
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--threads", type=int, default=1, help="the result depends on it in the last digits")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    world = make_world(SEED)
    write_stream(world, arguments.stream)
    tokenizer = make_tokenizer(world)
    model = make_model(len(tokenizer))
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens")
    pretrain(model, batches(world, tokenizer), arguments.steps)
    model.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
