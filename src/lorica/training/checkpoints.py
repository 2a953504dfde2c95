"""The Trainer's checkpoints: which one to go on from, whether it belongs to this run, and when it is not needed."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainingArguments

from lorica.constrain.checkpoint import open_weights
from lorica.errors import LoricaError
from lorica.training.manifest import damage

STATE = "training_state"
"""Folder of everything but the weights: at the top of a checkpoint loaders would take it for weights."""

IDENTITY_FILE = "update.json"
"""Written before training starts; removed with the checkpoints when it has ended."""

MAPPED_SHARE = 1 / 16
"""So much of a checkpoint is read before its file is opened anew."""

TRAJECTORY = (
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "weight_decay", "optim", "optim_args",
    "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "num_train_epochs", "max_steps",
    "per_device_train_batch_size", "gradient_accumulation_steps", "seed", "data_seed", "bf16", "fp16",
    "label_smoothing_factor", "neftune_noise_alpha", "dataloader_drop_last", "train_sampling_strategy",
)  # fmt: skip
"""Training arguments on which the weights depend: a resumed run must have the same."""


def checkpoint_to_resume(asked: str | bool | None, output_dir: str, say: Callable[[str], None] = print) -> str | None:
    """Return the checkpoint folder that ``resume_from_checkpoint`` means, or None for a fresh start.

    Args:
        asked: "true" or True for the newest complete one in ``output_dir``, "false", False or None for none, else one
            of the checkpoint folders in ``output_dir``.
        say: is told of each checkpoint that was passed over, and why.

    Raises:
        LoricaError: there is no such checkpoint, it lies elsewhere, or it is damaged.
    """
    text = str(asked).lower()
    if asked is None or text == "false":
        return None
    folder = Path(output_dir)
    if text == "true":
        return str(_newest_complete(folder, say))
    named = Path(str(asked))
    if not (named / "trainer_state.json").is_file():
        raise LoricaError(f"--resume_from_checkpoint {asked}: no checkpoint there (no trainer_state.json)")
    if named.resolve().parent != folder.resolve():
        raise LoricaError(
            f"--resume_from_checkpoint {asked} lies outside --output_dir {output_dir}; a run goes on where it began"
        )
    if wrong := unusable(named):
        raise LoricaError(f"--resume_from_checkpoint {asked}: {wrong}; 'true' takes the newest that is complete")
    return str(named)


def checkpoints_in(output_dir: Path) -> list[Path]:
    """Return the checkpoint folders of a run, oldest first."""
    named = (folder for folder in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", folder.name))
    return sorted((folder for folder in named if folder.is_dir()), key=lambda folder: int(folder.name.split("-")[1]))


def unusable(folder: Path) -> str | None:
    """Return why a checkpoint cannot be resumed from, None where it can."""
    if wrong := damage(folder):
        return wrong
    if not (folder / STATE).is_dir():
        return "it holds no optimizer state (--save_only_model): going on without would be another run"
    return None


def _newest_complete(output_dir: Path, say: Callable[[str], None]) -> Path:
    found = checkpoints_in(output_dir)
    if not found:
        raise LoricaError(f"--resume_from_checkpoint true: --output_dir {output_dir} holds no checkpoint")
    for folder in reversed(found):
        wrong = unusable(folder)
        if wrong is None:
            return folder
        say(f"notice: {folder} is passed over: {wrong}")
    raise LoricaError(
        f"--resume_from_checkpoint true: none of the {len(found)} checkpoints in {output_dir} is complete; the newest, "
        f"{found[-1].name}: {unusable(found[-1])}"
    )


def trajectory(arguments: TrainingArguments) -> dict[str, Any]:
    """Return the training arguments on which the weights depend, as plain data."""
    known = arguments.to_dict()
    return {name: known[name] for name in TRAJECTORY if name in known}


def write_identity(output_dir: Path, identity: dict[str, Any]) -> None:
    """Write down what a resumed run must agree with."""
    (output_dir / IDENTITY_FILE).write_text(json.dumps(identity, indent=1, default=str) + "\n", encoding="utf-8")


def check_identity(output_dir: Path, identity: dict[str, Any]) -> None:
    """Refuse to resume a run that was another one.

    Raises:
        LoricaError: the identity is missing or unreadable, or names the first field that differs.
    """
    file = output_dir / IDENTITY_FILE
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LoricaError(f"{file}: cannot tell what run the checkpoint belongs to: {error}") from error
    now = json.loads(json.dumps(identity, default=str))
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            raise LoricaError(
                f"--resume_from_checkpoint: {name} was {before.get(name)} and is now {now.get(name)}; give what the "
                "run began with, or start anew in another --output_dir"
            )


def load_weights(model: nn.Module, folder: Path) -> bool:
    """Fill a model with a checkpoint's weights, module by module, so that the whole file never lies beside the model.

    A protected layer's weight and core come together, whichever of a checkpoint's files they are in.

    Returns:
        Whether it was done: not where the folder holds adapters alone, or names tensors otherwise than the model does.

    Raises:
        LoricaError: a file cannot be read.
        RuntimeError: a tensor does not fit; see ``torch.nn.Module.load_state_dict``.
    """
    if not any(folder.glob("model*.safetensors")):
        return False
    keys, state = set(open_weights(folder).keys()), model.state_dict(keep_vars=True)
    filled = {id(state[key]) for key in keys & state.keys()}  # tied ones are stored once
    if keys - state.keys() or any(id(tensor) not in filled for tensor in state.values()):
        return False
    most = MAPPED_SHARE * sum(tensor.nbytes for tensor in state.values())
    read = math.inf
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        own = [leaf for leaf in (*module._parameters, *module._buffers) if prefix + leaf in keys]
        if read > most:  # what was read of a mapped file counts as resident until it is closed
            source, read = open_weights(folder), 0
        tensors = {leaf: source.tensor(prefix + leaf) for leaf in own}
        if tensors:
            module.load_state_dict(tensors, strict=False)
        read += sum(tensor.nbytes for tensor in tensors.values())
    return True


def remove_checkpoints(output_dir: Path) -> None:
    """Remove the checkpoints of an update that has ended; they served to resume it."""
    for folder in checkpoints_in(output_dir):
        shutil.rmtree(folder)
    (output_dir / IDENTITY_FILE).unlink(missing_ok=True)
