"""Against PEFT's OSF: the same split and the same freedom; with AdamW, only ours stays inside."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.optim import SGD

from tests.parity.peers import assert_same_freedom, leakage_table, ours

peft = pytest.importorskip("peft", minversion="0.21")
if not hasattr(peft, "OSFConfig"):
    pytest.skip("this PEFT has no OSF", allow_module_level=True)

script = leakage_table()


def wrapped(model: torch.nn.Module) -> torch.nn.Module:
    return peft.get_peft_model(model, peft.OSFConfig(target_modules=r".*_proj", effective_rank=0.5))


def layers_of(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    named = model.named_modules()
    return {n.removeprefix("base_model.model."): m for n, m in named if hasattr(m, "osf_svd_params")}


def test_the_same_split_and_the_same_function_at_the_start() -> None:
    base = script.tiny_llama()
    theirs, mine = wrapped(copy.deepcopy(base)), copy.deepcopy(base)
    bases = ours(mine)
    layers = layers_of(theirs)
    assert set(layers) == set(bases)
    for name, layer in layers.items():
        low_u, low_v = layer._osf_U_low_init["default"].double(), layer._osf_V_low_init["default"].double()
        q_u, q_v = bases[name]
        for q, low in ((q_u, low_u), (q_v, low_v.T)):
            torch.testing.assert_close(q @ (q.T @ low), low, rtol=0, atol=2e-5)
            if low.shape == q.shape:
                torch.testing.assert_close(q @ q.T, low @ low.T, rtol=0, atol=2e-5)
        weight = base.get_submodule(name).weight.detach().double()
        u, _, vh = torch.linalg.svd(weight, full_matrices=False)
        k = layer.effective_rank["default"]
        assert_same_freedom((q_u, q_v), u[:, :k], vh[:k].T)
    torch.testing.assert_close(script.logits(theirs), script.logits(base), rtol=1e-4, atol=1e-5)
    assert torch.equal(script.logits(mine), script.logits(base))


def test_sgd_updates_of_theirs_are_updates_of_ours() -> None:
    base = script.tiny_llama()
    bases = ours(copy.deepcopy(base))
    theirs = wrapped(copy.deepcopy(base))
    script.train(theirs, SGD([p for p in theirs.parameters() if p.requires_grad], lr=100.0), 10)
    for name, layer in layers_of(theirs).items():
        q_u, q_v = bases[name]
        change = script._osf_change(layer)
        assert change.norm() > 1e-3
        assert (q_u @ (q_u.T @ change @ q_v) @ q_v.T - change).norm() < 1e-3 * change.norm()


def test_updates_of_ours_are_updates_of_theirs() -> None:
    base = script.tiny_llama()
    mine, theirs = copy.deepcopy(base), wrapped(copy.deepcopy(base))
    bases = ours(mine)
    script.train(mine, script.adamw(mine, 1e-3), 5)
    for name, layer in layers_of(theirs).items():
        q_u, q_v = bases[name]
        low = [layer.osf_svd_params["default"][key].data for key in ("U_low", "S_low", "V_low")]
        start = (low[0].double() * low[1].double()) @ low[2].double()
        core = mine.get_submodule(name).core.detach().double()
        x, s, yh = torch.linalg.svd(q_u.T @ start @ q_v + core, full_matrices=False)
        for factor, value in zip(low, (q_u @ x, s, yh @ q_v.T), strict=True):
            factor.copy_(value)
    torch.testing.assert_close(script.logits(theirs), script.logits(mine), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_with_adamw_theirs_leaks_and_ours_does_not(dtype: torch.dtype) -> None:
    rows = {name: script.row(name, dtype, 20, 1e-4) for name in ("lorica", "peft OSF")}
    assert rows["lorica"]["leak_u_master"] <= 1e-6
    assert rows["lorica"]["leak_v_master"] <= 1e-6
    assert rows["lorica"]["step_0_logit_error"] == 0
    assert min(rows["peft OSF"]["leak_u_master"], rows["peft OSF"]["leak_v_master"]) > 1e-2
    assert rows["lorica"]["leak_u_deployed"] < rows["peft OSF"]["leak_u_deployed"] / 2
