"""Tasks of lm-evaluation-harness on small models: the figures by hand, and the model as it was."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

import lorica
from lorica import processes
from lorica.errors import LoricaError
from lorica.evaluation.harness import _loaded, check_names, lm_eval_record, lm_eval_scores
from lorica.evaluation.task_code import code_in_task
from tests.distributed.ranks import on_ranks
from tests.training.conftest import byte_tokenizer

pytest.importorskip("lm_eval")

TOKENIZER = byte_tokenizer()
ROWS = [
    {"question": f"What is {i}?", "options": [f"o{chr(97 + i)}", f"{chr(110 + i)}e", f"{i}"], "label": i % 3}
    for i in range(11)
]


@pytest.fixture(scope="module")
def llama() -> Any:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**shape, vocab_size=len(TOKENIZER), bos_token_id=0, eos_token_id=1, pad_token_id=2)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # decided answers: no ties between float roundings
    return model


@pytest.fixture(scope="module")
def t5() -> Any:
    torch.manual_seed(0)
    config = T5Config(
        d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=len(TOKENIZER),
        pad_token_id=2, eos_token_id=1, decoder_start_token_id=2, initializer_factor=4.0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Write a multiple-choice task with its rows and return the path of its YAML file."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")

    def write(name: str = "mine", **fields: Any) -> str:
        data = tmp_path / "rows.jsonl"
        data.write_text("\n".join(map(json.dumps, ROWS)))
        config = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "{{options}}",
            "doc_to_target": "label",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
            "metadata": {"version": 3.0},
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(json.dumps(config | fields))  # JSON is YAML
        return str(path)

    return write


@torch.no_grad()
def by_hand(model: Any) -> float:
    """Return the share of rows whose right option is the likeliest continuation, one sequence at a time."""
    model.eval()
    right = 0
    for row in ROWS:
        totals = []
        for option in row["options"]:  # type: ignore[union-attr]
            context = TOKENIZER(row["question"], add_special_tokens=False).input_ids
            answer = TOKENIZER(f" {option}", add_special_tokens=False).input_ids
            if model.config.is_encoder_decoder:
                labels = torch.tensor([answer])
                logits = model(input_ids=torch.tensor([context]), labels=labels).logits[0]
            else:
                logits = model(torch.tensor([context + answer])).logits[0, len(context) - 1 : -1]
            totals.append(-F.cross_entropy(logits, torch.tensor(answer), reduction="sum").item())
        right += int(np.argmax(totals)) == row["label"]
    return right / len(ROWS)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_accuracy_is_that_of_a_hand_computation(
    kind: str, task: Callable[..., str], request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(kind)
    expected = by_hand(model)
    assert 0 < expected < 1
    found = lm_eval_record(model, TOKENIZER, [task()], batch_size=4)
    error = (expected * (1 - expected) / (len(ROWS) - 1)) ** 0.5
    assert found["scores"] == {"mine": {"acc": pytest.approx(expected), "acc_stderr": pytest.approx(error)}}
    assert found["task_versions"] == {"mine": 3.0}
    assert found["num_fewshot"] == {"mine": 0}
    assert found["rows"] == {"mine": len(ROWS)}
    assert found["lm_eval_version"][0].isdigit()


@pytest.mark.reliability("R34")
def test_model_tokenizer_and_random_state_are_as_before(llama: Any, task: Callable[..., str]) -> None:
    llama.train()
    llama.model.layers[0].eval()  # such as a part that is frozen
    modes = [module.training for module in llama.modules()]
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    kept = (tokenizer.padding_side, tokenizer.pad_token)
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    expected = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    before = {name: value.clone() for name, value in llama.state_dict().items()}
    lm_eval_scores(llama, tokenizer, [task()], limit=3)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected
    assert [module.training for module in llama.modules()] == modes
    assert (tokenizer.padding_side, tokenizer.pad_token) == kept
    assert all(torch.equal(value, before[name]) for name, value in llama.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in llama.parameters())


@pytest.mark.reliability("R34")
def test_training_of_a_protected_model_goes_on_as_if_nothing_had_been(task: Callable[..., str]) -> None:
    def trained(between: Callable[[Any], Any]) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=len(TOKENIZER), attention_dropout=0.3)).train()
        lorica.protect(model, lorica.plan(model, 0.5))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
        for _ in range(3):
            ids = torch.randint(3, len(TOKENIZER), (2, 6))
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            between(model)  # the weights are not refolded yet
        return model.state_dict()

    path = task()
    undisturbed = trained(lambda model: None)
    disturbed = trained(lambda model: lm_eval_scores(model, TOKENIZER, [path], limit=2))
    assert all(torch.equal(value, disturbed[name]) for name, value in undisturbed.items())


def test_the_mode_comes_back_when_a_task_fails(llama: Any, task: Callable[..., str]) -> None:
    llama.train()
    with pytest.raises(LoricaError, match=r"lm-eval task .*mine.yaml: cannot load it: .*absent"):
        lm_eval_scores(llama, TOKENIZER, [task(dataset_kwargs={"data_files": {"test": "absent.jsonl"}})])
    assert llama.training


def test_rows_and_examples_can_be_limited(llama: Any, task: Callable[..., str]) -> None:
    found = lm_eval_record(llama, TOKENIZER, [task(), task("other")], num_fewshot=2, limit=4)
    assert found["rows"] == {"mine": 4, "other": 4}
    assert found["num_fewshot"] == {"mine": 2, "other": 2}
    assert found["limit"] == 4


def test_two_files_of_one_name_are_an_error(llama: Any, task: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "copy.yaml"
    path.write_text(Path(task()).read_text())
    with pytest.raises(LoricaError, match=r"copy.yaml: another task is called 'mine' too"):
        lm_eval_scores(llama, TOKENIZER, [task(), str(path)])


def test_a_group_is_run_once_with_its_members(tmp_path: Path, task: Callable[..., str]) -> None:
    from lm_eval.tasks import TaskManager

    task("one"), task("two"), task("three")
    (tmp_path / "g.yaml").write_text("group: both\ntask: [one, two]\naggregate_metric_list: [{metric: acc}]\n")
    manager = TaskManager(include_defaults=False, include_path=str(tmp_path))
    found = _loaded(manager, ["both", "three"])
    assert len(found) == 2
    assert set(manager.load(found)["tasks"]) == {"one", "two", "three"}


def test_an_unknown_task_is_named_with_the_nearest() -> None:
    with pytest.raises(LoricaError, match=r"no task 'boolqq'\. Did you mean 'boolq'"):
        check_names(["piqa", "boolqq"], ["boolq", "piqa"])
    with pytest.raises(LoricaError, match="a file of your own"):
        check_names(["zzz"], ["boolq", "piqa"])


@pytest.mark.slow
def test_an_unknown_task_is_found_among_all_of_the_harness(llama: Any) -> None:
    with pytest.raises(LoricaError, match=r"no task 'hellaswagg'\. Did you mean 'hellaswag'"):
        lm_eval_scores(llama, TOKENIZER, ["hellaswagg"])


def test_nothing_to_run_is_an_error(llama: Any, tmp_path: Path) -> None:
    with pytest.raises(LoricaError, match="name at least one"):
        lm_eval_scores(llama, TOKENIZER, [])
    with pytest.raises(LoricaError, match="no such file"):
        lm_eval_scores(llama, TOKENIZER, [str(tmp_path / "absent.yaml")])
    group = tmp_path / "group.yaml"
    group.write_text("group: g\ntask: [boolq]\n")
    with pytest.raises(LoricaError, match="is a group"):
        lm_eval_scores(llama, TOKENIZER, [str(group)])
    group.write_text("task: [")
    with pytest.raises(LoricaError, match=r"group.yaml: not YAML: line 1"):
        lm_eval_scores(llama, TOKENIZER, [str(group)])


def test_a_task_without_lm_eval_says_what_to_install(
    llama: Any, task: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    with pytest.raises(LoricaError, match=r"pip install 'lorica\[lm-eval\]'"):
        lm_eval_scores(llama, TOKENIZER, [task()])


@pytest.mark.reliability("S7")
def test_code_of_a_task_runs_only_where_it_is_allowed(llama: Any, task: Callable[..., str], tmp_path: Path) -> None:
    path, mark = Path(task()), tmp_path / "ran"
    (tmp_path / "own_code.py").write_text(
        f"open({str(mark)!r}, 'w').close()\ndef text(doc): return doc['question'] + '!'\n"
    )
    path.write_text(path.read_text().replace('"{{question}}"', "!function own_code.text"))
    with pytest.raises(LoricaError, match=r"mine.yaml:1: has the tag !function.* set allow_task_code"):
        lm_eval_scores(llama, TOKENIZER, [str(path)])
    assert not mark.exists()
    assert lm_eval_scores(llama, TOKENIZER, [str(path)], allow_task_code=True)["mine"]["acc"] is not None
    assert mark.exists()


@pytest.mark.reliability("S7")
@pytest.mark.parametrize(
    "yaml",
    [
        "task: t\nprocess_docs: !function utils.f",
        "task: t\nmetadata: {deep: [{x: !function utils.f}]}",
        "task: t\ndoc_to_text: !!python/object/apply:os.system [ls]",
        "task: t\ndoc_to_text: \"{{ ''.__class__ }}\"",
        "task: t\ndoc_to_text: \"{{ ''['__class__'] }}\"",
        "task: t\ndoc_to_text: \"{{ ''['_' ~ '_class_' ~ '_']() }}\"",
        'task: t\ndoc_to_text: "{% set x = a ~ b %}{{ q[x]() }}"',
        'task: t\ndoc_to_text: "{{ (q|attr(a))() }}"',
        'task: t\ndoc_to_text: "{{ (q|map(attribute=a)|first)() }}"',
        "task: t\nmetric_list: [{metric: somebody/metric}]",
        "task: t\nmetric_list: [{metric: acc, hf_evaluate: true}]",
        "task: t\nx: &x {metric: ./metric.py}\nmetric_list: [*x]",
        "include: code.yaml\ntask: t",
        "include: [plain.yaml, code.yaml]\ntask: t",
    ],
)
def test_code_is_found_wherever_it_stands(yaml: str, tmp_path: Path) -> None:
    (tmp_path / "code.yaml").write_text("doc_to_text: !function utils.f")
    (tmp_path / "plain.yaml").write_text("include: task.yaml\ndoc_to_text: '{{q}}'")
    (tmp_path / "task.yaml").write_text(yaml)
    assert code_in_task(tmp_path / "task.yaml")


@pytest.mark.reliability("S7")
@pytest.mark.parametrize(
    "yaml",
    [
        "task: t\ndoc_to_text: 'Question: {{question.strip()}}\\nAnswer:'\nmetric_list: [{metric: acc_norm}]",
        "task: t\ndoc_to_target: '{{options[label]}} {{a[0]}} {{a[:2]}}'\nfewshot: 3\nx: null\ny: 1.5",
        "task: t\ndoc_to_choice: \"{{['A', 'B'][label]}}\"\nmetric_list: [{metric: exact_match, hf_evaluate: false}]",
        "task: t\ndoc_to_text: '100 % {{ and more'",
        "include: plain.yaml\ntask: t\nx: &x [1]\ny: [*x, *x]",
        "",
    ],
)
def test_a_task_that_is_data_is_left_alone(yaml: str, tmp_path: Path) -> None:
    (tmp_path / "plain.yaml").write_text("include: task.yaml\ndoc_to_text: '{{q}}'")
    (tmp_path / "task.yaml").write_text(yaml)
    assert code_in_task(tmp_path / "task.yaml") == []


@pytest.mark.slow
def test_one_of_several_processes_scores_for_all(llama: Any, task: Callable[..., str]) -> None:
    file = task()

    def scores(rank: int | None) -> list[Any]:
        with processes.working_together():
            return processes.together([file], lambda one: lm_eval_scores(llama, TOKENIZER, [one]))

    alone = scores(None)
    assert on_ranks(2, scores) == [alone, alone]
