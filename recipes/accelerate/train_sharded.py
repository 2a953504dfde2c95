"""Update a model that FSDP2 shards when it is loaded; on GPUs, or on the CPU where there are none.

    torchrun --nproc_per_node 8 train_sharded.py --model my-model --train_file new.jsonl --output_dir updated

What else is given goes to transformers' ``TrainingArguments``: ``--learning_rate 2e-5 --num_train_epochs 2`` ...
"""

from __future__ import annotations

import argparse
import os

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, Trainer, TrainingArguments
from transformers.distributed import DistributedConfig

import lorica
from lorica.data import Collator, load


def main() -> None:
    options, arguments = parsed()
    sharded = DistributedConfig(
        fsdp_size=int(os.environ.get("WORLD_SIZE", 1)) // options.copies,
        dp_replicate_size=options.copies,
    )
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=options.dtype, distributed_config=sharded)
    plan = lorica.plan(model, unfreeze_rank_ratio=options.unfreeze_rank_ratio)
    lorica.protect(model, plan)

    data = load(options.train_file, tokenizer)
    Trainer(model, arguments, data_collator=Collator(tokenizer), train_dataset=data).train()

    lorica.release(model)
    model.save_pretrained(options.output_dir)  # by all processes: the first one writes what the others send
    if arguments.process_index == 0:
        tokenizer.save_pretrained(options.output_dir)
        plan.save(f"{options.output_dir}/plan.json")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def parsed() -> tuple[argparse.Namespace, TrainingArguments]:
    parser = argparse.ArgumentParser(description="Update a model that FSDP2 shards when it is loaded.")
    parser.add_argument("--model", required=True)
    parser.add_argument("--train_file", required=True)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--unfreeze_rank_ratio", type=float, default=0.25)
    parser.add_argument("--dtype", default="auto", help="of the weights; auto: as they are saved")
    parser.add_argument("--copies", type=int, default=1, help="of the sharded model, such as one a node (hybrid shard)")
    options, rest = parser.parse_known_args()
    own = {"save_strategy": "no", "use_cpu": not torch.accelerator.is_available(), "report_to": "none"}
    (arguments,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(
        [f"--output_dir={options.output_dir}", *(f"--{k}={v}" for k, v in own.items()), *rest]
    )
    return options, arguments


if __name__ == "__main__":
    main()
