"""Small models and independent measurements that several tests share.

Nothing here uses Lorica's own linear algebra: protected directions come from ``torch.linalg.svd`` in float64.
Shape suffixes: M output rows, N input columns, K protected directions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import lorica
from lorica.constrain.protect import bases_of
from lorica.methods.task import TaskData
from lorica.subspace.plan import Plan
from lorica.subspace.plan_entry import Constraint, PlanEntry

SHAPES = {"wide": (6, 20), "tall": (20, 6), "square": (16, 16), "odd": (17, 13), "one-row": (1, 9)}
CONSTRAINTS: tuple[Constraint, ...] = ("two-sided", "input", "output")
BLOCKS = 2
VOCABULARY = 61


def matrix(m: int, n: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a random matrix with entries of the size that trained weights have."""
    generator = torch.Generator().manual_seed(seed)
    return (0.3 * torch.randn(m, n, generator=generator, dtype=torch.float64)).to(dtype)


def top_directions(weight_MN: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the top k left and right singular vectors by the full float64 SVD."""
    u, _, vh = torch.linalg.svd(weight_MN.detach().double(), full_matrices=False)
    return u[:, :k], vh[:k].T


def leakage(before: Tensor, after: Tensor, k: int) -> tuple[float, float]:
    """Return ``|U^T D| / |D|`` and ``|D V| / |D|`` in float64, U and V from the weight before."""
    u, v = top_directions(before, k)
    d = after.detach().double() - before.detach().double()
    norm = d.norm()
    assert norm > 0, "the weight did not move"
    return float((u.T @ d).norm() / norm), float((d @ v).norm() / norm)


def free_part(before: Tensor, d: Tensor, k: int, constraint: str) -> Tensor:
    """Return the orthogonal projection of a change onto a constraint's feasible set, in float64."""
    u, v = top_directions(before, k)
    d = d.double()
    if constraint == "block":
        return d - u @ (u.T @ d @ v) @ v.T
    if constraint != "input":
        d = d - u @ (u.T @ d)
    if constraint != "output":
        d = d - (d @ v) @ v.T
    return d


class Stack(nn.Module):
    """Linear layers of the given (out, in) shapes, each with a task of its own: no shape limits another."""

    def __init__(
        self, shapes: Iterable[tuple[int, int]], *, bias: bool = True, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(n, m, bias=bias, dtype=dtype) for m, n in shapes)
        for seed, layer in enumerate(self.layers):
            layer.weight.data.copy_(matrix(*layer.weight.shape, seed=seed))
            if bias:
                layer.bias.data.copy_(matrix(1, len(layer.bias), seed=seed + 50)[0])

    def forward(self, xs: list[Tensor]) -> Tensor:
        return torch.stack([layer(x).float().square().mean() for layer, x in zip(self.layers, xs, strict=True)]).sum()

    def inputs(self, seed: int, rows: int = 12) -> list[Tensor]:
        """Return one random batch per layer."""
        return [matrix(rows, x.in_features, seed=97 * seed + i).to(x.weight.dtype) for i, x in enumerate(self.layers)]


def plan_for(model: nn.Module, k: Callable[[int, int], int] | int, constraint: Constraint = "two-sided") -> Plan:
    """Return a plan of every ``nn.Linear`` of a model with hand-set counts."""
    entries = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            m, n = module.weight.shape
            count = k if isinstance(k, int) else k(m, n)
            entries.append(PlanEntry(name=name, shape=(m, n), k=count, constraint=constraint))
    return Plan(entries=entries)


def half(m: int, n: int) -> int:
    """Return half of the directions of a weight; a single row is left to train."""
    return min(m, n) // 2


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of all weights and biases, by state-dict key, without the cores."""
    return {key: value.clone() for key, value in model.state_dict().items() if not key.endswith(".core")}


_TINY = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": BLOCKS}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
_MOE = _TINY | _HEADS | {"num_experts_per_tok": 2}
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_ff": 48,
    "d_kv": 8,
    "num_heads": 4,
    "num_layers": BLOCKS,
    "decoder_start_token_id": 0,
}
_BERT = _TINY | {"num_attention_heads": 4, "max_position_embeddings": 32}

ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", _TINY | _HEADS),
    "llama-tied": ("LlamaConfig", "LlamaForCausalLM", _TINY | _HEADS | {"tie_word_embeddings": True}),
    "mistral": ("MistralConfig", "MistralForCausalLM", _TINY | _HEADS),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", _TINY | _HEADS | {"head_dim": 8}),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", _TINY | _HEADS | {"head_dim": 8}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", _TINY | _HEADS | {"pad_token_id": 0}),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {"vocab_size": VOCABULARY, "n_embd": 32, "n_head": 4, "n_layer": BLOCKS, "n_positions": 32},
    ),
    "opt": (
        "OPTConfig",
        "OPTForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "ffn_dim": 48,
            "num_hidden_layers": BLOCKS,
            "num_attention_heads": 4,
            "max_position_embeddings": 32,
        },
    ),
    "t5": ("T5Config", "T5ForConditionalGeneration", _T5),
    "t5-gated": ("T5Config", "T5ForConditionalGeneration", _T5 | {"feed_forward_proj": "gated-gelu"}),
    "bert": ("BertConfig", "BertForMaskedLM", _BERT),
    "bert-classifier": ("BertConfig", "BertForSequenceClassification", _BERT | {"num_labels": 3}),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", _MOE | {"num_local_experts": 4}),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        _MOE | {"head_dim": 8, "num_experts": 4, "moe_intermediate_size": 16},
    ),
}
"""Configuration class, model class and sizes of one small model of each architecture."""

EXPERTS = ("mixtral", "qwen3-moe")
DENSE = tuple(name for name in ARCHITECTURES if name not in EXPERTS)


def tiny(name: str, dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> nn.Module:
    """Return a small, randomly initialised model of one architecture, in training mode."""
    config_name, model_name, sizes = ARCHITECTURES[name]
    torch.manual_seed(0)
    config = getattr(transformers, config_name)(**sizes)
    for field in ("attention_dropout", "dropout", "dropout_rate", "attn_pdrop", "embd_pdrop", "resid_pdrop"):
        if hasattr(config, field):
            setattr(config, field, dropout)
    for field in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        if hasattr(config, field):
            setattr(config, field, dropout)
    return getattr(transformers, model_name)(config).to(dtype).train()


def batch(model: nn.Module, seed: int = 0, rows: int = 3, length: int = 7) -> dict[str, Tensor]:
    """Return random token ids and the labels that fit the model's head."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    if type(model).__name__.endswith("SequenceClassification"):
        return {"input_ids": ids, "labels": torch.randint(model.config.num_labels, (rows,), generator=generator)}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def protected_tiny(name: str = "llama", unfreeze_rank_ratio: float = 0.5, **options: Any) -> nn.Module:
    """Return a small model that is already protected."""
    model = tiny(name)
    return lorica.protect(model, lorica.plan(model, unfreeze_rank_ratio, **options))


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, inputs: Callable[[int], dict[str, Tensor]]
) -> list[float]:
    """Run a plain hand-written loop and return the losses."""
    losses = []
    for step in range(steps):
        loss = model(**inputs(step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that train."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


class BatchRows(torch.utils.data.Dataset[dict[str, list[int]]]):
    """Random rows as a method sees them; collating all of them gives one batch of the model's."""

    def __init__(self, model: nn.Module, seed: int = 0, rows: int = 12, **size: int) -> None:
        self.whole = batch(model, seed, rows, **size)

    def __len__(self) -> int:
        return len(self.whole["input_ids"])

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return {key: value[index].tolist() for key, value in self.whole.items()}


def task_of(model: nn.Module, index: int = 0, count: int = 2, rows: int = 12) -> TaskData:
    """Return one task of a stream of random rows, different for each index."""

    def collate(rows: Any) -> dict[str, Tensor]:
        return {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}

    data = BatchRows(model, seed=1000 + index, rows=rows)
    return TaskData(name=f"task-{index}", index=index, count=count, rows=data, collate=collate)


def same_bases(one: nn.Module, other: nn.Module) -> bool:
    """Return whether two models are protected by the same bases, bit for bit."""
    mine, theirs = bases_of(one), bases_of(other)
    return mine.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())
