"""The two upper bounds: a model per task, and one model on all tasks at once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from lorica.errors import LoricaError
from lorica.methods.joint import Joint
from lorica.methods.per_task import PerTask
from lorica.methods.seqft import SeqFT
from lorica.methods.task import TaskData
from tests.builders import batch, task_of, tiny, train, trainable


def stream(model: torch.nn.Module, count: int = 3) -> list[TaskData]:
    tasks = [task_of(model, index, count, rows=4 + index) for index in range(count)]
    return [replace(task, earlier=tuple(old.rows for old in tasks[: task.index])) for task in tasks]


def trained(method: Any, model: torch.nn.Module, task: TaskData) -> dict[str, torch.Tensor]:
    method.begin_task(model, task)
    train(model, torch.optim.AdamW(trainable(model), lr=1e-3), 3, lambda step: batch(model, step))
    method.end_task(model, task)
    return model.state_dict()


def test_joint_learns_once_on_all_rows_in_order() -> None:
    tasks = stream(tiny("llama"))
    method = Joint.build({})
    assert [method.learns(task) for task in tasks] == [False, False, True]
    data: Any = method.training_data(tasks[-1])
    rows = [data[index] for index in range(len(data))]
    assert rows == [task.rows[index] for task in tasks for index in range(4 + task.index)]
    assert tasks[-1].collate(rows)["input_ids"].shape == (4 + 5 + 6, 7)


def test_joint_of_one_task_is_that_task() -> None:
    (task,) = stream(tiny("llama"), count=1)
    method = Joint.build({})
    assert method.learns(task)
    data: Any = method.training_data(task)
    assert [data[index] for index in range(len(data))] == [task.rows[index] for index in range(4)]


def test_joint_without_the_old_rows_says_so() -> None:
    last = replace(stream(tiny("llama"))[-1], earlier=())
    with pytest.raises(LoricaError, match="joint needs the rows of all 2 tasks before 'task-2' and got those of 0"):
        Joint.build({}).training_data(last)


def test_per_task_learns_each_task_alone() -> None:
    for task in stream(tiny("llama")):
        method = PerTask.build({})
        assert method.learns(task)
        assert method.training_data(task) is task.rows


@pytest.mark.parametrize("kind", [PerTask, Joint])
def test_training_itself_is_sequential_fine_tuning(kind: type[SeqFT]) -> None:
    results = []
    for method in (SeqFT.build({}), kind.build({})):
        model = tiny("llama")
        results.append(trained(method, model, stream(model)[-1]))
        assert method.state_dict() == {}
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


def test_what_the_bounds_declare() -> None:
    assert (PerTask.restarts, PerTask.needs_task_id, PerTask.needs_old_data) == (True, True, False)
    assert (Joint.restarts, Joint.needs_task_id, Joint.needs_old_data) == (False, False, True)
