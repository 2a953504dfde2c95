"""What ``--fsdp`` and ``--fsdp_config`` stand for, and what cannot be had with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch

from lorica import processes
from lorica.config import build_config
from lorica.errors import LoricaError
from lorica.experiments.arguments import check_training
from lorica.training.arguments import check_arguments, training_arguments
from lorica.training.sharding import check_sharded, offloads, sharding


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"fsdp": "shard_grad_op"}, "--fsdp shard_grad_op is not taken: weights that stay whole"),
        ({"fsdp": "no_shard"}, "--fsdp no_shard is not taken: leave --fsdp out"),
        ({"fsdp": "full_shrad"}, "--fsdp full_shrad: there is none of that name. Did you mean 'full_shard'?"),
        ({"fsdp_config": '{"version": 1}'}, "--fsdp_config: version = 1 is not taken: FSDP2 alone shards here"),
        ({"fsdp_config": "{1}"}, "--fsdp_config {1}: "),
        ({"fsdp_config": "[]"}, "[]: cannot read the FSDP configuration"),
        ({"fsdp_config": ["version"]}, "--fsdp_config: give names and values"),
        ({"fsdp_config": {"fsdp_reshard_after_forward": False}}, "reshard_after_forward = False is not taken: weights"),
        ({"fsdp_config": {"cpu_ofload": True}}, "cpu_ofload is not taken. Did you mean 'cpu_offload'?"),
        ({"fsdp_config": {"fsdp_offload_params": "half"}}, "cpu_offload = half is not taken: give true or false"),
        ({"fsdp_config": {"activation_checkpointing": True}}, "give --activation_checkpointing true"),
        ({"fsdp_config": {"state_dict_type": "LOCAL"}}, "give full_state_dict or sharded_state_dict"),
        ({"fsdp_config": {"transformer_layer_cls_to_wrap": "Block"}}, "transformer_layer_cls_to_wrap is not taken"),
        ({"fsdp": "false", "fsdp_config": {"version": 2}}, "--fsdp_config has no effect without --fsdp full_shard"),
        ({"fsdp": "hybrid_shard"}, "of 4 processes 4 are on this node: give --fsdp full_shard"),
    ],
)
def test_what_cannot_be_had_is_refused_by_name(
    given: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(LoricaError) as refused:
        sharding(check_arguments(given))
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("given", "node", "expected_of_it"),
    [
        ({}, 4, None),
        ({"fsdp": "none", "fsdp_config": None}, 4, None),
        ({"fsdp": True}, 4, (4, 1, False)),
        ({"fsdp": "full_shard auto_wrap", "fsdp_config": {"version": 2, "cpu_offload": "false"}}, 2, (4, 1, False)),
        ({"fsdp": ["hybrid_shard"]}, 2, (2, 2, False)),
        ({"fsdp": "full_shard offload"}, 4, (4, 1, True)),
        ({"fsdp": "hybrid_shard", "fsdp_config": {"fsdp_offload_params": "true"}}, 2, (2, 2, True)),
    ],
)
def test_how_many_processes_share_how_many_copies(
    given: dict[str, Any], node: int, expected_of_it: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(node))
    assert sharding(check_arguments(given)) == expected_of_it


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "ewc"}, "--fsdp: --method ewc needs whole weights; give osft or seqft"),
        ({"protect_learned": 0.1}, "--fsdp: --protect_learned is not taken: it looks at whole weights"),
        ({"prompts_file": "p.jsonl"}, "--fsdp: --prompts_file is not taken: each process would write texts"),
        ({"predict_forgetting": True}, "--fsdp: --predict_forgetting is not taken: each process would write texts"),
        ({"remember_tasks": True, "source": "activation"}, "--fsdp: --remember_tasks is not taken"),
        ({"constraint": "block"}, "--fsdp: --constraint block is held by an optimizer"),
        ({"ranks": "marginal"}, "--fsdp: --ranks marginal compares what was measured of all weights"),
        ({"source": "activation"}, "--fsdp: --calibration self is not taken: each process would write texts"),
        ({"ranks": "importance", "calibration": "self"}, "--fsdp: --calibration self is not taken"),
        ({"optim": "adafactor"}, "--fsdp: --optim adafactor is not known to step parts of a weight"),
        ({"label_smoothing_factor": 0.1}, "--fsdp: --label_smoothing_factor is not taken"),
        ({"save_only_model": True}, "--fsdp: --save_only_model is not taken"),
    ],
)
def test_what_a_sharded_model_cannot_be_trained_with(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    config = build_config({"model_name_or_path": "m", "train_file": "f", "output_dir": str(tmp_path)} | given)
    arguments = training_arguments(config.training, config.output_dir, hidden_size=8, seq2seq=False)
    with pytest.raises(LoricaError, match=message):
        check_sharded(arguments, config.method, vars(config))


def test_lorica_run_takes_the_same() -> None:
    check_training({"fsdp": "full_shard", "fsdp_config": {"version": 2}}, "the stream")
    with pytest.raises(LoricaError, match="--fsdp shard_grad_op is not taken: weights that stay whole"):
        check_training({"fsdp": "shard_grad_op"}, "the stream")


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        ({}, False),
        ({"fsdp": "full_shard"}, False),
        ({"fsdp": "full_shard offload"}, True),
        ({"fsdp": "full_shard", "fsdp_config": {"fsdp_offload_params": "true"}}, True),
        ({"fsdp_config": {"cpu_offload": True}}, False),
    ],
)
def test_an_offload_is_known_before_the_processes_meet(given: dict[str, Any], asked: bool) -> None:
    assert offloads(given) is asked


def test_gpus_that_offload_meet_with_their_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(processes, "_have_met", False)
    monkeypatch.setattr(accelerate, "PartialState", lambda **given: None)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **given: begun.append(backend))
    with processes.working_together(on_host=False):
        assert begun == []
    with processes.working_together(on_host=True):
        assert begun == ["cpu:gloo,cuda:nccl"]


def test_processes_that_have_met_for_gpus_alone_cannot_offload(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(processes, "exchange_on_host", lambda: False)
    with pytest.raises(LoricaError, match="--fsdp offload: give it with the command"):
        sharding(check_arguments({"fsdp": "full_shard offload"}))
