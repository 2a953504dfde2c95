"""Loading and saving of plain Hugging Face models, with one clear message for each thing that can be wrong."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lorica.config import UpdateConfig
from lorica.data.positions import position_limit as position_limit
from lorica.errors import LoricaError
from lorica.hub import check_pinned, check_pinned_data, commit_of, is_local
from lorica.redaction import redacted
from lorica.training.sharding import Sharding, rest_on_host
from lorica.training.trust import refuse_hub_kernels, refuse_kernels_of, refuse_pickled_weights

_NOT_GENERATIVE = ("ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")


_SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.spm")
_WRITERS = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM")
_DATA = ("train_file", "dataset_name", "eval_file", "retention_file", "calibration_file", "prompts_file", "task_file")


def pinned(options: Any) -> Any:
    """Return a command's options with the commit that its model's revision stands for now in place of the revision.

    So tokenizer, configuration and weights are of one state, and records and resumed runs know which.

    Args:
        options: with ``model_name_or_path``, ``model_revision`` and ``require_pinned``.

    Raises:
        LoricaError: ``require_pinned`` is set, and the model or a data set is one of the hub without a whole commit.
    """
    name, revision = options.model_name_or_path, options.model_revision
    if options.require_pinned:
        check_pinned(name, revision, "--model_revision")
        check_pinned_data(*(str(value) for field in _DATA for value in _listed(getattr(options, field, None))))
    changes = {"model_revision": commit_of(name, revision) or revision}
    return options.model_copy(update=changes) if isinstance(options, BaseModel) else replace(options, **changes)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def load_tokenizer(config: UpdateConfig) -> Any:
    """Return the tokenizer of an update; see ``read_tokenizer``."""
    return read_tokenizer(
        config.model_name_or_path,
        revision=config.model_revision,
        trust_remote_code=config.trust_remote_code,
        chat_template_path=config.chat_template_path,
    )


def load_model_config(config: UpdateConfig) -> Any:
    """Return the configuration of the model of an update; see ``read_model_config``."""
    return read_model_config(
        config.model_name_or_path, revision=config.model_revision, trust_remote_code=config.trust_remote_code
    )


def load_model(
    config: UpdateConfig, model_config: Any, device: torch.device | str = "cpu", sharding: Sharding | None = None
) -> Any:
    """Return the model of an update; see ``read_model``."""
    return read_model(
        config.model_name_or_path,
        model_config,
        revision=config.model_revision,
        trust_remote_code=config.trust_remote_code,
        allow_pickle=config.allow_pickle,
        dtype=config.dtype,
        attn_implementation=config.attn_implementation,
        device=device,
        sharding=sharding,
    )


def read_tokenizer(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False, chat_template_path: str | None = None
) -> Any:
    """Return a model's tokenizer, with the template of ``chat_template_path`` if one is given.

    Args:
        name: a folder, or a name on the hub.
        revision: branch, tag or commit on the hub; the main branch by default.
        trust_remote_code: run Python code that comes with the model.

    Raises:
        LoricaError: the model or the template cannot be found or read.
    """
    if trust_remote_code:
        print(f"notice: Python code that comes with {redacted(name)} is run (trust_remote_code)", file=sys.stderr)
    tokenizer = from_pretrained(AutoTokenizer, name, "tokenizer", revision, trust_remote_code)
    if chat_template_path is not None:
        try:
            tokenizer.chat_template = Path(chat_template_path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise LoricaError(f"--chat_template_path {chat_template_path}: cannot read it: {reason}") from error
    return tokenizer


def read_model_config(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """Return a model's configuration. Arguments as in ``read_tokenizer``.

    Raises:
        LoricaError: it cannot be found or read, or belongs to a model that does not generate text.
    """
    found = read_configuration(name, revision=revision, trust_remote_code=trust_remote_code)
    if not writes_text(found, trust_remote_code=trust_remote_code):
        raise LoricaError(
            f"{name} is a {_architecture(found) or found.model_type}, which writes no text; lorica train takes causal "
            "and encoder-decoder models. Use lorica.plan and lorica.protect in your own loop"
        )
    return found


def writes_text(model_config: Any, *, trust_remote_code: bool = False) -> bool:
    """Tell whether a configuration is that of a model that generates text."""
    own = getattr(model_config, "auto_map", None) or {}
    brought = trust_remote_code and any(kind in own for kind in _WRITERS)
    known = model_config.is_encoder_decoder or model_config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return not _architecture(model_config).endswith(_NOT_GENERATIVE) and (brought or known)


def _architecture(model_config: Any) -> str:
    return (getattr(model_config, "architectures", None) or [""])[0]


def model_width(model_config: Any) -> int | None:
    """Return the model's hidden size, or None if its configuration does not tell."""
    text = model_config.get_text_config() if hasattr(model_config, "get_text_config") else model_config
    sizes = (getattr(text, name, None) for name in ("hidden_size", "d_model", "n_embd"))
    return next((int(size) for size in sizes if size), None)


def read_model(
    name: str,
    model_config: Any,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    dtype: str = "auto",
    attn_implementation: str | None = None,
    allow_pickle: bool = False,
    device: torch.device | str = "cpu",
    sharding: Sharding | None = None,
) -> Any:
    """Return a model with its weights on a device. Other arguments as in ``read_tokenizer``.

    Args:
        model_config: of ``read_model_config``.
        dtype: of the weights; "auto": as they are saved.
        attn_implementation: sdpa, eager, ...; transformers' choice by default.
        allow_pickle: take a folder whose weights are pickles as well; they are read as tensors alone, running no code.
        sharding: each process reads its own parts of the weights alone, onto the device that is its own, and from
            there to the host where it offloads.

    Raises:
        LoricaError: no weights, some missing, damaged ones, weights that only pickle could load, an unknown dtype, or
            an attention that would be fetched from the hub.
    """
    kind = AutoModelForSeq2SeqLM if model_config.is_encoder_decoder else AutoModelForCausalLM
    model, loading = read_weights(
        kind, name, revision, trust_remote_code, dtype=dtype, attn_implementation=attn_implementation,
        allow_pickle=allow_pickle, **({} if sharding is None else {"distributed_config": sharding.config()}),
    )  # fmt: skip
    if missing := sorted(loading["missing_keys"]):
        raise LoricaError(
            f"model {name}: {len(missing)} of its weights are missing, such as {missing[0]}; transformers would fill "
            "them with random numbers. Give the folder of the whole model"
        )
    if sharding is None:
        return model.to(device)
    if sharding.moves:
        rest_on_host(model)
    return model


def read_weights(
    kind: Any,
    name: str,
    revision: str | None,
    trust_remote_code: bool,
    *,
    dtype: str,
    attn_implementation: str | None,
    allow_pickle: bool,
    **options: Any,
) -> tuple[Any, dict[str, Any]]:
    """Return a model of one of transformers' Auto classes, and what is to be said of the loading.

    Raises:
        LoricaError: see ``read_model``.
    """
    refuse_hub_kernels(attn_implementation, "--attn_implementation")
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        names = "auto, float32, bfloat16 or float16"
        raise LoricaError(f"model {name}: cannot load the weights: --dtype {dtype} is no dtype; give {names}")
    if not allow_pickle:
        refuse_pickled_weights(str(Path(name).expanduser()) if is_local(name) else name, revision)
    options |= {"dtype": dtype, "output_loading_info": True, "weights_only": True}
    options |= {"use_safetensors": None if allow_pickle and is_local(name) else True}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    loaded: tuple[Any, dict[str, Any]] = from_pretrained(kind, name, "weights", revision, trust_remote_code, **options)
    return loaded


def read_configuration(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """Return a model's configuration, whatever the model does. Arguments as in ``read_tokenizer``.

    Raises:
        LoricaError: it cannot be found or read, or asks for code of the hub to compute attention with.
    """
    found = from_pretrained(AutoConfig, name, "configuration", revision, trust_remote_code)
    refuse_kernels_of(found, name)
    return found


def from_pretrained(
    kind: Any, name: str, what: str, revision: str | None, trust_remote_code: bool, **options: Any
) -> Any:
    """Return ``kind.from_pretrained(...)``; whatever it raises becomes one error that names the model.

    Args:
        kind: one of transformers' Auto classes.
        what: what is loaded, for the message.
    """
    local = is_local(name)
    if local:
        _check_model_folder(name)
    try:
        return kind.from_pretrained(
            str(Path(name).expanduser()) if local else name,
            revision=revision or "main",
            trust_remote_code=trust_remote_code,
            **options,
        )
    except Exception as error:  # readers of five file formats, and code of the model's own, raise errors of any kind
        reason = " ".join(str(error).split()) or type(error).__name__
        if "use_safetensors=True" in reason:
            reason = "they are not saved as safetensors; `hf download` them, and give the folder with --allow_pickle"
        if not local:
            reason = f"there is no folder of that name, and on the hub: {reason}"
        elif what == "tokenizer" and not any(any(Path(name).expanduser().glob(one)) for one in _TOKENIZER_FILES):
            reason = (
                "the folder holds none; copy tokenizer.json and its like from the model that this one was made from"
            )
        raise LoricaError(f"model {name}: cannot load the {what}: {reason}") from error


def _check_model_folder(name: str) -> None:
    folder = Path(name).expanduser()
    if folder.is_file():
        raise LoricaError(f"model {name} is a file; name the model's folder")
    if not folder.is_dir():
        raise LoricaError(f"model {name}: no such folder")
    if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
        raise LoricaError(f"model {name} is an adapter, not a model; merge it into its base model and save that")
    if not (folder / "config.json").exists():
        raise LoricaError(f"model {name}: the folder holds no config.json; name one that save_pretrained has written")


@contextmanager
def stock_configuration(model: Any) -> Iterator[None]:
    """Train a model in here and have its configuration and generation configuration as they came afterwards.

    The Trainer turns ``use_cache`` off and copies the tokenizer's special tokens into both, and all of it would be
    saved with the model. Its checkpoints moreover refuse a generation configuration that holds, once changed, any
    setting without effect, as published ones do; while training the model has one of its special tokens alone.
    """
    own = getattr(model, "generation_config", None)
    before = [(part, dict(vars(part))) for part in (model.config, model.config.get_text_config())]
    if own is not None:
        model.generation_config = GenerationConfig(**{name: getattr(own, name, None) for name in _SPECIAL_TOKENS})
    try:
        yield
    finally:
        if own is not None:
            model.generation_config = own
        for part, values in before:
            vars(part).clear()
            vars(part).update(values)
