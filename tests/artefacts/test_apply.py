"""An update put on and taken off gives the models it was made from, bit for bit; anything else is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lorica
from lorica.artefacts.apply import apply_updates
from lorica.artefacts.export import export_update
from lorica.errors import LoricaError
from lorica.json_file import sealed
from tests.artefacts.conftest import before_and_after, same_files, saved, stored, updated
from tests.builders import batch, tiny


def quiet(line: str) -> None:
    pass


def export(before: Path, after: Path, update: Path) -> dict[str, Any]:
    return export_update(str(before), str(after), str(update), say=quiet)


def apply(model: Path, updates: Path | list[Path], output: Path, **options: Any) -> dict[str, Any]:
    named = updates if isinstance(updates, list) else [updates]
    return apply_updates(str(model), [str(path) for path in named], str(output), say=quiet, **options)


def nothing_left(folder: Path, *known: str) -> bool:
    return {path.name for path in folder.iterdir()} == {"before", "after", "update", *known}


CASES: dict[str, tuple[str, torch.dtype, str, dict[str, Any]]] = {
    "llama": ("llama", torch.float32, "1GB", {}),
    "llama bfloat16": ("llama", torch.bfloat16, "1GB", {}),
    "llama float16": ("llama", torch.float16, "1GB", {}),
    "llama tied": ("llama-tied", torch.float32, "1GB", {"constraint": "output"}),
    "gpt2": ("gpt2", torch.float32, "1GB", {"constraint": "input"}),
    "t5": ("t5", torch.bfloat16, "1GB", {}),
    "sharded": ("qwen3", torch.float32, "40KB", {}),
    "activation": ("llama", torch.float32, "1GB", {"source": "activation"}),
    "embeddings and norms too": ("llama", torch.float32, "1GB", {"train_also": ["embed_tokens", "norm"]}),
}


@pytest.mark.parametrize("case", CASES)
def test_on_and_off_again_is_bit_for_bit(tmp_path: Path, case: str) -> None:
    name, dtype, shards, options = CASES[case]
    if "source" in options:
        model = tiny(name)
        options = options | {"calibration": [batch(model, 7)], "constraint": "input"}
    before, after = before_and_after(tmp_path, name, dtype, shards, **options)
    assert not same_files(before, after)
    result = export(before, after, tmp_path / "update")
    record = apply(before, tmp_path / "update", tmp_path / "on")
    assert (record["operation"], record["exact"]) == ("apply", True)
    assert same_files(tmp_path / "on", after)
    record = apply(tmp_path / "on", tmp_path / "update", tmp_path / "off", remove=True)
    assert (record["operation"], record["exact"]) == ("remove", True)
    assert same_files(tmp_path / "off", before)
    assert (record["before"], record["after"]) == (result["after"], result["before"])
    if shards == "40KB":
        assert len(list(before.glob("*.safetensors"))) > 1


def test_what_comes_out_is_a_plain_model(tmp_path: Path) -> None:
    before, after = before_and_after(tmp_path)
    (before / "tokenizer.json").write_text("{}")
    (before / "additional_chat_templates").mkdir()
    (before / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    for stale in ("plan.json", "lorica.json", "pytorch_model.bin", ".hidden.json"):
        (before / stale).write_text("{}")
    export(before, after, tmp_path / "update")
    apply(before, tmp_path / "update", tmp_path / "on")
    assert {
        path.relative_to(tmp_path / "on").as_posix() for path in (tmp_path / "on").rglob("*") if path.is_file()
    } == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "additional_chat_templates/tools.jinja",
        "lorica.json",
    }
    with torch.no_grad():
        logits = [
            AutoModelForCausalLM.from_pretrained(folder)(torch.arange(9)[None]).logits
            for folder in (tmp_path / "on", after, before)
        ]
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 0.4), (torch.bfloat16, 0.35)])
def test_an_update_is_much_smaller_than_its_model(tmp_path: Path, dtype: torch.dtype, limit: float) -> None:
    generator = torch.Generator().manual_seed(0)
    before = {f"{i}.weight": (0.1 * torch.randn(256, 192, generator=generator)).to(dtype) for i in range(4)}
    after = {}
    for key, weight in before.items():  # a quarter of the directions of either side
        u, _, vh = torch.linalg.svd(weight.double())
        core = torch.randn(64, 48, generator=generator, dtype=torch.float64)
        after[key] = (weight.double() + 0.005 * u[:, -64:] @ core @ vh[-48:]).to(dtype)
    for folder, state in (("before", before), ("after", after)):
        (tmp_path / folder).mkdir()
        save_file(state, tmp_path / folder / "model.safetensors")
    result = export(tmp_path / "before", tmp_path / "after", tmp_path / "update")
    assert result["bytes"] == sum(file.stat().st_size for file in (tmp_path / "update").iterdir())
    assert result["bytes"] < limit * result["model_bytes"]


def test_the_models_that_are_read_are_left_alone(tmp_path: Path) -> None:
    before, after = before_and_after(tmp_path)
    states = [{file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} for folder in (before, after)]
    export(before, after, tmp_path / "update")
    apply(before, tmp_path / "update", tmp_path / "on")
    apply(after, tmp_path / "update", tmp_path / "off", remove=True)
    apply(before, tmp_path / "update", tmp_path / "half", scale=0.5)
    assert states == [
        {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} for folder in (before, after)
    ]


def test_the_recorded_plan_travels_along(tmp_path: Path) -> None:
    model = tiny("llama")
    before = saved(model, tmp_path / "before")
    plan = lorica.plan(model, 0.25)
    after = saved(updated(model, plan), tmp_path / "after")
    record = {"plan": plan.records(), "method": "osft", "data": {"train": {"sha256": "abc"}}}
    (after / "lorica.json").write_text(json.dumps(record))
    export(before, after, tmp_path / "update")
    header = json.loads((tmp_path / "update" / "lorica-update.json").read_text())
    assert header["plan"] == plan.records()
    assert header["made"]["training"]["data"] == {"train": {"sha256": "abc"}}
    written = apply(before, tmp_path / "update", tmp_path / "on")
    assert written["updates"][0]["training"]["method"] == "osft"
    report = lorica.audit(before, tmp_path / "on")
    assert report.holds
    assert not report.assumed
    assert report.to_records() == lorica.audit(before, after, plan).to_records()


@pytest.mark.parametrize("scale", [0.5, -1.0, 2.0])
def test_a_scaled_update_lies_on_the_line_through_both_models(tmp_path: Path, scale: float) -> None:
    before, after = before_and_after(tmp_path)
    export(before, after, tmp_path / "update")
    record = apply(before, tmp_path / "update", tmp_path / "scaled", scale=scale)
    assert (record["operation"], record["exact"], record["scale"]) == ("scale", False, scale)
    a, b, s = stored(before), stored(after), stored(tmp_path / "scaled")
    for key in a:
        assert torch.equal(s[key], (a[key].double() + scale * (b[key].double() - a[key].double())).float())
    assert record["after"] != record["before"]


def branches(tmp_path: Path, name: str = "llama", dtype: torch.dtype = torch.float32, *, disjoint: bool = True) -> None:
    """Save ``before`` and two updates of it, ``one`` and ``two``, which read halves of the inputs of each layer."""
    model = tiny(name, dtype)
    before = saved(model, tmp_path / "before")
    family_stores_in_out = name == "gpt2"
    plan = lorica.plan(model, 0.5)
    for place, branch in enumerate(("one", "two")):
        generator = torch.Generator().manual_seed(place)
        state = stored(before)
        for key in (f"{planned}.weight" for planned in plan.names()):
            weight = state[key].T if family_stores_in_out else state[key]
            m, n = weight.shape
            basis, _ = torch.linalg.qr(
                torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
            )
            half = basis[:, : n // 2] if place == 0 or not disjoint else basis[:, n // 2 :]
            change = 0.02 * torch.randn(m, half.shape[1], dtype=torch.float64, generator=generator) @ half.T
            moved = (weight.double() + change).to(dtype)
            state[key] = (moved.T if family_stores_in_out else moved).contiguous()
        (tmp_path / branch).mkdir()
        save_file(state, tmp_path / branch / "model.safetensors", metadata={"format": "pt"})
        export(before, tmp_path / branch, tmp_path / f"update-{branch}")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_disjoint_updates_add_up(tmp_path: Path, name: str) -> None:
    branches(tmp_path, name)
    updates = [tmp_path / "update-one", tmp_path / "update-two"]
    record = apply(tmp_path / "before", updates, tmp_path / "both")
    assert (record["operation"], record["exact"]) == ("compose", False)
    overlap = record["overlap"]
    assert overlap["inputs"] == overlap["value"] < 1e-5 < 0.3 < overlap["outputs"]
    before, one, two, both = (stored(tmp_path / folder) for folder in ("before", "one", "two", "both"))
    for key in before:
        w = before[key].double()
        assert torch.equal(both[key], (w + (one[key].double() - w) + (two[key].double() - w)).float())
    # The second leaves alone what the first one reads: on those inputs the composition is the first model.
    key = next(k for k in before if not torch.equal(before[k], one[k]))
    in_out = name == "gpt2"
    d = one[key].double() - before[key].double()
    reads = (d if in_out else d.T)[:, :5]  # input directions that the first update uses
    answers = [(w[key].double().T if in_out else w[key].double()) @ reads for w in (one, both, two)]
    assert (answers[0] - answers[1]).norm() < 1e-5 * (answers[0] - answers[2]).norm()
    swapped = apply(tmp_path / "before", updates[::-1], tmp_path / "swapped")
    assert swapped["after"] == record["after"]
    apply(tmp_path / "before", updates, tmp_path / "half", scale=0.5)
    half = stored(tmp_path / "half")
    w = before[key].double()
    assert torch.equal(half[key], (w + 0.5 * (one[key].double() - w + (two[key].double() - w))).float())


def test_overlapping_updates_are_refused_with_the_number_and_the_place(tmp_path: Path) -> None:
    branches(tmp_path, disjoint=False)
    updates = [tmp_path / "update-one", tmp_path / "update-two"]
    with pytest.raises(
        LoricaError, match=r"update-one and .*update-two overlap by 0\.\d+ in model\.layers\."
    ) as refused:
        apply(tmp_path / "before", updates, tmp_path / "both")
    assert not (tmp_path / "both").exists()
    enough = float(str(refused.value).rpartition("--allow_overlap ")[2])
    record = apply(tmp_path / "before", updates, tmp_path / "both", allow_overlap=enough)
    assert enough - 0.01 <= record["overlap"]["value"] <= enough
    assert record["overlap"]["between"] == [str(path) for path in updates]


def test_in_bfloat16_the_refusal_says_what_rounding_may_cause(tmp_path: Path) -> None:
    branches(tmp_path, dtype=torch.bfloat16)
    updates = [tmp_path / "update-one", tmp_path / "update-two"]
    with pytest.raises(LoricaError, match=r"allowed is 0\.001; rounding alone may cause 0\.0"):
        apply(tmp_path / "before", updates, tmp_path / "both")


def test_updates_of_different_tensors_are_disjoint(tmp_path: Path) -> None:
    model = tiny("llama")
    before = saved(model, tmp_path / "before")
    for place in (0, 1):
        state = stored(before)
        state[f"model.layers.{place}.self_attn.q_proj.weight"] += 0.1
        (tmp_path / str(place)).mkdir()
        save_file(state, tmp_path / str(place) / "model.safetensors")
        export(before, tmp_path / str(place), tmp_path / f"update{place}")
    record = apply(before, [tmp_path / "update0", tmp_path / "update1"], tmp_path / "both", allow_overlap=0.0)
    assert (record["overlap"]["value"], record["overlap"]["tensor"]) == (0.0, None)


def chain(tmp_path: Path) -> list[Path]:
    """Save a model, it after one update, and after another on top; return the updates."""
    model = tiny("llama")
    saved(model, tmp_path / "before")
    for place, folder in enumerate(("middle", "after"), start=1):
        saved(updated(model, lorica.plan(model, 0.5), seed=place), tmp_path / folder)
    export(tmp_path / "before", tmp_path / "middle", tmp_path / "first")
    export(tmp_path / "middle", tmp_path / "after", tmp_path / "second")
    return [tmp_path / "first", tmp_path / "second"]


def test_updates_made_on_top_of_each_other_go_one_after_the_other(tmp_path: Path) -> None:
    updates = chain(tmp_path)
    record = apply(tmp_path / "before", updates[::-1], tmp_path / "on")
    assert same_files(tmp_path / "on", tmp_path / "after")
    assert record["exact"]
    assert [update["path"] for update in record["updates"]] == [str(path) for path in updates]
    apply(tmp_path / "after", updates, tmp_path / "off", remove=True)
    assert same_files(tmp_path / "off", tmp_path / "before")
    apply(tmp_path / "after", updates[1], tmp_path / "one off", remove=True)
    assert same_files(tmp_path / "one off", tmp_path / "middle")
    with pytest.raises(LoricaError, match="--scale needs updates that were all made from this model"):
        apply(tmp_path / "before", updates, tmp_path / "scaled", scale=0.5)


def test_updates_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    updates = chain(tmp_path)
    other = tiny("llama")
    updated(other, lorica.plan(other, 0.5), seed=5)
    saved(other, tmp_path / "other")
    export(tmp_path / "before", tmp_path / "other", tmp_path / "third")
    with pytest.raises(LoricaError, match=r"third was made neither from the model that .*first was made from nor"):
        apply(tmp_path / "before", [*updates, tmp_path / "third"], tmp_path / "on")
    with pytest.raises(LoricaError, match="are the same update; name it once"):
        apply(tmp_path / "before", [updates[0], updates[0]], tmp_path / "on")


def test_an_update_fits_its_own_model_only(tmp_path: Path) -> None:
    before, after = before_and_after(tmp_path)
    result = export(before, after, tmp_path / "update")
    with pytest.raises(LoricaError, match=r"after holds .*update already"):
        apply(after, tmp_path / "update", tmp_path / "on")
    with pytest.raises(LoricaError, match=r"before does not hold .*update"):
        apply(before, tmp_path / "update", tmp_path / "on", remove=True)
    state = load_file(before / "model.safetensors")
    state["model.norm.weight"][3] = torch.nextafter(state["model.norm.weight"][3], torch.zeros(()))  # one last place
    save_file(state, before / "model.safetensors", metadata={"format": "pt"})
    expected = f"is not the model that .*update was made from: SHA-256 .*, needed is {result['before'][:12]}; "
    with pytest.raises(LoricaError, match=expected + r"the first tensor: model\.norm\.weight differs in .*before"):
        apply(before, tmp_path / "update", tmp_path / "on")
    del state["lm_head.weight"]
    save_file(state | {"more": torch.ones(1)}, before / "model.safetensors")
    with pytest.raises(LoricaError, match=r"the first tensor: lm_head\.weight is missing from .*before"):
        apply(before, tmp_path / "update", tmp_path / "on")
    assert nothing_left(tmp_path)


def corrupt(path: Path, at: float) -> None:
    """Flip one bit of a file."""
    data = bytearray(path.read_bytes())
    data[int(at * len(data))] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("at", [0.0, 0.02, 0.5, 0.999])
def test_a_damaged_update_is_refused(tmp_path: Path, at: float) -> None:
    before, after = before_and_after(tmp_path)
    export(before, after, tmp_path / "update")
    corrupt(tmp_path / "update" / "update-00001.safetensors", at)
    with pytest.raises(LoricaError, match=r"update-00001\.safetensors: damaged: its SHA-256 begins"):
        apply(before, tmp_path / "update", tmp_path / "on")
    assert nothing_left(tmp_path)


def test_a_header_that_was_changed_is_refused(tmp_path: Path) -> None:
    before, after = before_and_after(tmp_path)
    export(before, after, tmp_path / "update")
    path = tmp_path / "update" / "lorica-update.json"
    header = json.loads(path.read_text())
    key = next(k for k, state in header["tensors"].items() if state["before"] != state["after"])

    def refused(changed: dict[str, Any] | str, message: str) -> None:
        path.write_text(changed if isinstance(changed, str) else json.dumps(sealed(changed)))
        with pytest.raises(LoricaError, match=message):
            apply(before, tmp_path / "update", tmp_path / "on")
        assert nothing_left(tmp_path)

    state = header["tensors"][key]
    wrong = header["tensors"] | {key: state | {"after": "0" * 64}}
    refused(header | {"tensors": wrong}, f"damaged: {key} does not come out as it was")
    unchanged = header["tensors"] | {key: state | {"after": state["before"]}}
    refused(header | {"tensors": unchanged}, f"disagree about {key}")
    refused(header | {"kind": "model"}, "damaged: kind: ")
    refused(header | {"files": {"../before/model.safetensors": "0"}}, "is no file of an update")
    refused(header | {"surprise": 1}, "surprise: Extra inputs are not permitted")
    refused("{", "damaged: Expecting")
    refused(json.dumps(header | {"family": "gpt2"}), "damaged: it was changed since it was written")
    path.unlink()
    refused_as = tmp_path / "update"
    with pytest.raises(LoricaError, match="no saved update"):
        apply(before, refused_as, tmp_path / "on")


def test_missing_and_foreign_files_are_refused(tmp_path: Path) -> None:
    before, after = before_and_after(tmp_path)
    export(before, after, tmp_path / "update")
    save_file({"x": torch.ones(1)}, tmp_path / "update" / "other.safetensors")
    with pytest.raises(LoricaError, match="not part of the update"):
        apply(before, tmp_path / "update", tmp_path / "on")
    (tmp_path / "update" / "other.safetensors").unlink()
    (tmp_path / "update" / "update-00001.safetensors").unlink()
    with pytest.raises(LoricaError, match="cannot read it: No such file"):
        apply(before, tmp_path / "update", tmp_path / "on")
    with pytest.raises(LoricaError, match="it is a model: make an update of it with lorica export-update"):
        apply(before, after, tmp_path / "on")


def test_options_out_of_range_are_refused(tmp_path: Path) -> None:
    before, after = before_and_after(tmp_path)
    update = tmp_path / "update"
    export(before, after, update)
    for options, message in [
        ({"scale": float("nan")}, "--scale nan is no finite number"),
        ({"scale": 0.5, "remove": True}, "leave --scale out"),
        ({"allow_overlap": 1.5}, "--allow_overlap 1.5 is out of range"),
        ({"scale": 1e300}, r"--scale 1e\+300: .* leaves the range of torch.float32"),
    ]:
        with pytest.raises(LoricaError, match=message):
            apply(before, update, tmp_path / "on", **options)
    with pytest.raises(LoricaError, match="no update is named"):
        apply(before, [], tmp_path / "on")
    with pytest.raises(LoricaError, match="name the folder of the model"):
        apply(before / "model.safetensors", update, tmp_path / "on")
    with pytest.raises(LoricaError, match="is not empty; name another folder"):
        apply(before, update, after)
    with pytest.raises(LoricaError, match="is a file; name a folder"):
        apply(before, update, after / "config.json")
    assert nothing_left(tmp_path)


def test_a_folder_with_the_files_of_two_models_is_refused(tmp_path: Path) -> None:
    before, after = before_and_after(tmp_path)
    export(before, after, tmp_path / "update")
    (before / "copy.safetensors").write_bytes((before / "model.safetensors").read_bytes())
    with pytest.raises(LoricaError, match=r"model\.safetensors and copy\.safetensors both hold"):
        apply(before, tmp_path / "update", tmp_path / "on")
    assert nothing_left(tmp_path)


def test_whole_numbers_are_kept_but_cannot_be_scaled(tmp_path: Path) -> None:
    for folder, count in (("before", 3), ("after", 40)):
        (tmp_path / folder).mkdir()
        save_file({"steps": torch.tensor([count]), "w": torch.ones(2)}, tmp_path / folder / "model.safetensors")
    export(tmp_path / "before", tmp_path / "after", tmp_path / "update")
    apply(tmp_path / "before", tmp_path / "update", tmp_path / "on")
    assert same_files(tmp_path / "on", tmp_path / "after")
    with pytest.raises(LoricaError, match=r"steps holds whole numbers \(torch.int64\)"):
        apply(tmp_path / "before", tmp_path / "update", tmp_path / "half", scale=0.5)


def test_a_disk_that_is_full_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, after = before_and_after(tmp_path)
    export(before, after, tmp_path / "update")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", full)
    with pytest.raises(LoricaError, match=r"--output_dir .*on: cannot write it: .*No space left"):
        apply(before, tmp_path / "update", tmp_path / "on")
    assert nothing_left(tmp_path)


def test_an_empty_output_folder_is_filled(tmp_path: Path) -> None:
    before, after = before_and_after(tmp_path)
    (tmp_path / "update").mkdir()
    export(before, after, tmp_path / "update")
    (tmp_path / "on").mkdir()
    apply(before, tmp_path / "update", tmp_path / "on")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "on").config.model_type == "llama"
