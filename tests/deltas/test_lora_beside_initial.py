"""LoRA uploaded with the factors it started from: on the base itself it answers as PEFT does on what was left of it."""

from __future__ import annotations

import contextlib
import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from deltaserve.deltas.fold import dense_delta, fold
from deltaserve.model.base import BaseModel, load_base
from deltaserve_store.digest import adapter_file_names, content_digest
from deltaserve_store.errors import AdapterInvalid
from deltaserve_store.file_names import INITIAL_TENSORS
from deltaserve_store.formats import read_adapter
from deltaserve_store.parsed import LoraDelta
from deltatest.admission_rig import Rig, open_rig, run
from deltatest.mixed_batch import MixedBatch, distance
from deltatest.of_kind import all_of
from deltatest.peft_adapters import base_logits, edit_config
from deltatest.tiny_models import build_tiny_model

IDS = torch.randint(3, 199, (24,), generator=torch.Generator().manual_seed(5)).tolist()
TARGETS = ["q_proj", "v_proj", "down_proj"]
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
METHODS = ("pissa_niter_2", "pissa", "olora", "corda", "lora_ga")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    folder = build_tiny_model("llama", tmp_path_factory.mktemp("base") / "tiny")
    return load_base(folder, dtype=torch.float32, cache_dir=folder / "cache")


@pytest.fixture(scope="module")
def model(base: BaseModel) -> Any:
    return AutoModelForCausalLM.from_pretrained(base.folder).eval()


def config_of(method: str, model: Any) -> Any:
    """A config, after the model was shown what the method looks at."""
    import peft
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    ids = torch.tensor([IDS])
    options: dict[str, Any] = {}
    if method == "corda":
        options["corda_config"] = CordaConfig(corda_method="ipm")
    if method == "lora_ga":
        options["lora_ga_config"] = peft.LoraGAConfig()
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=TARGETS,
        init_lora_weights=method,
        rank_pattern={} if method == "corda" else {"v_proj": 2},
        task_type="CAUSAL_LM",
        **options,
    )
    if method == "corda":
        preprocess_corda(model, config, run_model=lambda: model(ids))
    if method == "lora_ga":
        peft.tuners.lora.preprocess_loraga(model, config, lambda: model(ids, labels=ids).loss.backward())
    return config


def save(wrapped: Any, folder: Path) -> None:
    wrapped.save_pretrained(str(folder), save_embedding_layers=False)
    edit_config(folder, base_model_name_or_path="tests/tiny-base")
    (folder / "README.md").unlink(missing_ok=True)


Trained = Callable[[str], tuple[Path, torch.Tensor]]


@pytest.fixture(scope="module")
def trained(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """By method: what PEFT saves before and after training, as one upload, and the logits of its own model."""
    import peft

    made: dict[str, tuple[Path, torch.Tensor]] = {}

    def make(method: str) -> tuple[Path, torch.Tensor]:
        if method not in made:
            root, own = tmp_path_factory.mktemp(method), copy.deepcopy(model)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.manual_seed(3)
                wrapped = peft.get_peft_model(own, config_of(method, own))
                save(wrapped, root / "initial")
                with torch.no_grad():
                    for parameter in wrapped.parameters():
                        if parameter.requires_grad:
                            parameter.add_(torch.randn_like(parameter) * 0.1)
                save(wrapped, root / "a")
                with torch.no_grad():
                    logits = wrapped.eval()(torch.tensor([IDS])).logits[0]
            (root / "initial" / TENSORS).rename(root / "a" / INITIAL_TENSORS)
            made[method] = root / "a", logits
        return made[method]

    return make


@pytest.fixture
def upload(trained: Trained, tmp_path: Path) -> Path:
    """A copy to spoil."""
    folder = tmp_path / "upload"
    folder.mkdir()
    for file in trained("pissa_niter_2")[0].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_the_base_itself_answers_as_peft_does(method: str, trained: Trained, model: Any, base: BaseModel) -> None:
    folder, expected = trained(method)
    adapter = read_adapter(folder, base.spec)
    assert (adapter.rank, adapter.weight_deltas) == (8, ()), "nothing of the base is needed"
    assert adapter.num_parameters == sum(tensor.numel() for tensor in load_file(folder / TENSORS).values())
    folded = fold(adapter, base.spec, torch.float32)
    for name in folded.terms:
        error = dense_delta(folded, name, base.spec) - dense_delta(adapter, name, base.spec)
        assert float(error.abs().max()) < 1e-5
    batch = MixedBatch(base)
    batch.load("a", folded)
    found = batch.logits([IDS, IDS], ["a", None])
    assert distance(expected, base_logits(model, IDS)) > 0.3
    assert distance(found[0], expected) < 1e-4 * max(1.0, float(expected.square().mean().sqrt()))
    assert distance(found[1], base_logits(model, IDS)) < 1e-4


def test_a_config_that_says_true_is_read_with_the_factors_that_are_there(upload: Path, base: BaseModel) -> None:
    """PEFT's own recipe has one set it to true before the first save, and it stays."""
    before = all_of(LoraDelta, read_adapter(upload, base.spec).deltas)[0]
    edit_config(upload, init_lora_weights=True)
    after = all_of(LoraDelta, read_adapter(upload, base.spec).deltas)[0]
    assert torch.equal(before.b, after.b)
    (upload / INITIAL_TENSORS).unlink()
    assert read_adapter(upload, base.spec).rank == 4


def test_it_lives_through_the_door_and_its_version_is_of_all_three_files(
    base: BaseModel, upload: Path, tmp_path: Path
) -> None:
    assert adapter_file_names(upload) == (CONFIG, TENSORS, INITIAL_TENSORS)
    with contextlib.closing(open_rig(base, tmp_path / "rig")) as rig:
        _admitted(rig, upload)


def _admitted(rig: Rig, upload: Path) -> None:
    result = run(rig.admit(upload, "a"))
    assert result.evidence.max_error <= result.evidence.tolerance
    assert result.record.version == content_digest(upload)
    stored = rig.store.version_dir(result.record.version)
    assert (stored / INITIAL_TENSORS).read_bytes() == (upload / INITIAL_TENSORS).read_bytes()
    assert not rig.store.verify(result.record.version)
    read = (rig.admission._read_stored(result.record.version), read_adapter(upload, rig.base.spec))
    again, given = all_of(LoraDelta, (adapter.deltas[0] for adapter in read))
    assert torch.equal(again.b, given.b)
    tensors = load_file(upload / INITIAL_TENSORS)
    save_file({**tensors, A: tensors[A] + 1}, upload / INITIAL_TENSORS)
    assert content_digest(upload) != result.record.version


def _edit(name: str, value: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / INITIAL_TENSORS)
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value(tensors[name]) if callable(value) else value
        save_file(tensors, folder / INITIAL_TENSORS)

    return spoil


def _nan(old: torch.Tensor) -> torch.Tensor:
    old[0, 0] = float("nan")
    return old


def _config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_config(folder, **changes)


def _of_another_kind(folder: Path) -> None:
    edit_config(folder, peft_type="VERA")


BAD = {
    "a tensor missing": (_edit(A, None), "missing_tensor", f"{INITIAL_TENSORS}:{A}"),
    "another rank": (_edit(A, lambda old: old[:2].clone()), "shape_mismatch", f"{INITIAL_TENSORS}:{A}"),
    "integers": (_edit(A, lambda old: old.int()), "unsupported_dtype", f"{INITIAL_TENSORS}:{A}"),
    "NaN": (_edit(A, _nan), "non_finite", f"{INITIAL_TENSORS}:{A}"),
    "a stray tensor": (
        _edit(A.replace("q_proj", "k_proj"), torch.ones(4, 64)),
        "unexpected_tensor",
        f"{INITIAL_TENSORS}:{A.replace('q_proj', 'k_proj')}",
    ),
    "LoftQ": (
        _config(init_lora_weights="loftq", loftq_config={}),
        "unsupported_feature",
        f"{CONFIG}:init_lora_weights",
    ),
    "a start that leaves the base": (
        _config(init_lora_weights="orthogonal"),
        "invalid_value",
        f"{CONFIG}:init_lora_weights",
    ),
    "no number": (_config(init_lora_weights="pissa_niter_x"), "invalid_value", f"{CONFIG}:init_lora_weights"),
    "DoRA": (_config(use_dora=True), "unsupported_feature", f"{CONFIG}:use_dora"),
    "another kind": (_of_another_kind, "unexpected_file", INITIAL_TENSORS),
}


@pytest.mark.parametrize("name", BAD)
def test_damage_is_refused_by_name(name: str, upload: Path, base: BaseModel) -> None:
    spoil, code, where = BAD[name]
    spoil(upload)
    with pytest.raises(AdapterInvalid) as raised:
        read_adapter(upload, base.spec)
    assert (code, where) in [(reason.code, reason.where) for reason in raised.value.reasons]


def test_a_damaged_file_and_one_without_an_adapter_are_refused(upload: Path, base: BaseModel) -> None:
    (upload / INITIAL_TENSORS).write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{")
    with pytest.raises(AdapterInvalid) as raised:
        read_adapter(upload, base.spec)
    assert [reason.code for reason in raised.value.reasons] == ["bad_header"]
    (upload / TENSORS).unlink()
    with pytest.raises(AdapterInvalid) as raised:
        read_adapter(upload, base.spec)
    assert "missing_file" in [reason.code for reason in raised.value.reasons]


def test_without_the_factors_the_answer_names_both_ways_out(upload: Path, base: BaseModel) -> None:
    (upload / INITIAL_TENSORS).unlink()
    with pytest.raises(AdapterInvalid) as raised:
        read_adapter(upload, base.spec)
    (reason,) = raised.value.reasons
    assert (reason.code, reason.where) == ("unsupported_feature", f"{CONFIG}:init_lora_weights")
    assert INITIAL_TENSORS in reason.allowed
    assert "path_initial_model_for_weight_conversion" in reason.allowed
    assert json.loads((upload / CONFIG).read_text())["init_lora_weights"] == "pissa_niter_2"
