"""Loading and saving of plain Hugging Face models, with one clear message for each thing that can be wrong."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lorica.config import UpdateConfig
from lorica.errors import LoricaError

_NOT_GENERATIVE = ("ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")


def load_tokenizer(config: UpdateConfig) -> Any:
    """Return the model's tokenizer, with the template of ``chat_template_path`` if one is given.

    Raises:
        LoricaError: the model or the template cannot be found.
    """
    tokenizer = _loaded(AutoTokenizer, config, "tokenizer")
    if config.chat_template_path is not None:
        try:
            tokenizer.chat_template = Path(config.chat_template_path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise LoricaError(f"--chat_template_path {config.chat_template_path}: cannot read it: {error}") from error
    return tokenizer


def load_model_config(config: UpdateConfig) -> Any:
    """Return the model's configuration.

    Raises:
        LoricaError: it cannot be found, or belongs to a model that does not generate text.
    """
    found = _loaded(AutoConfig, config, "configuration")
    architecture = (getattr(found, "architectures", None) or [""])[0]
    known = found.is_encoder_decoder or found.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if architecture.endswith(_NOT_GENERATIVE) or not known:
        raise LoricaError(
            f"{config.model_name_or_path} is a {architecture or found.model_type}, which writes no text; lorica train "
            "takes causal and encoder-decoder models. Use lorica.plan and lorica.protect in your own loop"
        )
    return found


def load_model(config: UpdateConfig, model_config: Any) -> Any:
    """Return the model in the dtype that the configuration names, or that it is saved in.

    Raises:
        LoricaError: no weights, weights that only pickle could load, or an unknown dtype.
    """
    kind = AutoModelForSeq2SeqLM if model_config.is_encoder_decoder else AutoModelForCausalLM
    options: dict[str, Any] = {"dtype": config.dtype, "use_safetensors": True}
    if config.attn_implementation is not None:
        options["attn_implementation"] = config.attn_implementation
    return _loaded(kind, config, "weights", **options)


def _loaded(kind: Any, config: UpdateConfig, what: str, **options: Any) -> Any:
    name = config.model_name_or_path
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_local and not Path(name).expanduser().is_dir():
        raise LoricaError(f"--model_name_or_path {name}: no such folder")
    try:
        return kind.from_pretrained(
            str(Path(name).expanduser()) if looks_local else name,
            revision=config.model_revision or "main",
            trust_remote_code=config.trust_remote_code,
            **options,
        )
    except (OSError, ValueError, ImportError, AttributeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise LoricaError(f"--model_name_or_path {name}: cannot load the {what}: {reason}") from error


def check_output_dir(output_dir: str, *, resuming: bool) -> None:
    """Refuse an output folder that holds something, unless this is a resumption. Nothing is made yet."""
    path = Path(output_dir)
    if path.exists() and not path.is_dir():
        raise LoricaError(f"--output_dir {output_dir} is a file; name a folder")
    if path.is_dir() and any(path.iterdir()) and not resuming:
        interrupted = any(path.glob("checkpoint-*")) and not (path / "lorica.json").exists()
        hint = "add --resume_from_checkpoint true to go on, or " if interrupted else ""
        raise LoricaError(f"--output_dir {output_dir} is not empty; {hint}name another folder")


def make_output_dir(output_dir: str) -> Path:
    """Make the output folder if it is missing."""
    path = Path(output_dir)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LoricaError(f"--output_dir {output_dir}: cannot make it: {error.strerror}") from error
    return path


def save_model(model: Any, tokenizer: Any, output_dir: Path) -> None:
    """Write a plain model folder: everything into a folder aside first, then moved, so none is half-written."""
    aside = output_dir / ".saving"
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    for file in sorted(aside.iterdir()):
        file.replace(output_dir / file.name)
    aside.rmdir()
