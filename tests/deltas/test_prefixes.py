"""Prefixes folded: the K and V that PEFT would cache, in whole blocks; and the oracle of the proof."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from deltaserve.deltas.folded import FoldedAdapter, FoldedFileInvalid
from deltaserve.deltas.prefixes import PrefixTerm, fold_prefix, plain_prefix
from deltaserve.errors import AdapterRefused
from deltaserve.model.base import BaseModel, load_base
from deltaserve.model.prefix import prefixed_logits
from deltaserve_store.formats import read_adapter
from deltaserve_store.prefix_deltas import KeyValuePrefix
from deltatest.prefix_adapters import CASES, Oracle, make_prefix, num_tokens
from deltatest.real_engine import fold_folder
from deltatest.tiny_models import build_tiny_model

torch.set_num_threads(1)
IDS = tuple(torch.randint(3, 199, (30,), generator=torch.Generator().manual_seed(5)).tolist())


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model("llama-rope-scaled", tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def base(base_folder: Path) -> BaseModel:
    return load_base(base_folder, dtype=torch.float32, cache_dir=base_folder / "cache")


@pytest.fixture(scope="module")
def shelf(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Oracle]]:
    root = tmp_path_factory.mktemp("prefixes")
    model = AutoModelForCausalLM.from_pretrained(base_folder, attn_implementation="eager").eval()
    folders = {name: make_prefix(model, root / name, name, seed=index) for index, name in enumerate(CASES)}
    return {name: (folder, Oracle(model, folder)) for name, folder in folders.items()}


def cached(oracle: Oracle, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """K and V [kv_heads, p, head_dim] of each layer that PEFT attends to before the first token."""
    with torch.no_grad():
        cache = oracle.model(torch.tensor([list(IDS)]), use_cache=True, **oracle.options).past_key_values
    return [(layer.keys[0, :, :count], layer.values[0, :, :count]) for layer in cache.layers]


@pytest.mark.parametrize("name", CASES)
def test_the_pages_hold_what_peft_caches(name: str, base: BaseModel, shelf: dict[str, tuple[Path, Oracle]]) -> None:
    folder, oracle = shelf[name]
    count = num_tokens(name)
    folded = fold_folder(folder, base)
    assert (folded.kinds, folded.rank, folded.terms) == (("prefix",), None, {})
    prefix = folded.prefix
    assert prefix is not None
    assert prefix.num_tokens == count
    assert prefix.pages.shape == (1, -(-count // 16), base.spec.num_layers, 2, 2, 16, 16)
    is_given = isinstance(read_adapter(folder, base.spec).prefix, KeyValuePrefix)
    assert (prefix.embeddings is None) == is_given
    size = 0 if prefix.embeddings is None else count * base.spec.hidden_size
    assert folded.nbytes == 4 * (prefix.pages.numel() + size)
    flat = prefix.pages[0].permute(1, 2, 3, 0, 4, 5).flatten(3, 4)  # [layers, 2, heads, positions, size]
    assert not flat[:, :, :, count:].any()
    for layer, (keys, values) in enumerate(cached(oracle, count)):
        assert torch.allclose(flat[layer, 0, :, :count], keys, atol=2e-5)
        assert torch.allclose(flat[layer, 1, :, :count], values, atol=2e-5)


@pytest.mark.parametrize("name", CASES)
def test_the_oracle_of_the_proof_answers_as_peft_does(
    name: str, base: BaseModel, shelf: dict[str, tuple[Path, Oracle]]
) -> None:
    folder, oracle = shelf[name]
    prefix = read_adapter(folder, base.spec).prefix
    assert prefix is not None
    plain = plain_prefix(prefix, base.spec)
    found = prefixed_logits(base, torch.tensor(IDS), embeddings=plain.embeddings, keys_values=plain.keys_values)
    wanted = oracle.logits(IDS)
    assert float((found - wanted).abs().max()) < 1e-4
    assert float((base.folded_logits(torch.tensor(IDS), {}) - wanted).abs().max()) > 0.5, "no effect to compare"


def test_generate_and_forward_of_the_oracle_agree(shelf: dict[str, tuple[Path, Oracle]]) -> None:
    """Positions go on behind the virtual tokens in both, so that equal to one is equal to the other."""
    for name in ("prefix", "prompt"):
        assert shelf[name][1].generate(IDS, 6) == shelf[name][1].greedy(IDS, 6)


def test_a_folded_file_keeps_every_bit(base: BaseModel, shelf: dict[str, tuple[Path, Oracle]], tmp_path: Path) -> None:
    for name in ("cartridge", "prompt"):
        folded = fold_folder(shelf[name][0], base)
        folded.save(tmp_path / name)
        loaded = FoldedAdapter.load(tmp_path / name, base.spec, torch.float32)
        assert folded.prefix is not None
        assert loaded.prefix is not None
        assert torch.equal(loaded.prefix.pages, folded.prefix.pages)
        assert (loaded.prefix.num_tokens, loaded.kinds) == (folded.prefix.num_tokens, ("prefix",))
        if name == "cartridge":
            assert loaded.prefix.embeddings is None
        else:
            assert loaded.prefix.embeddings is not None
            assert folded.prefix.embeddings is not None
            assert torch.equal(loaded.prefix.embeddings, folded.prefix.embeddings)


def _shorter(prefix: PrefixTerm) -> PrefixTerm:
    return replace(prefix, num_tokens=16)


def _narrower(prefix: PrefixTerm) -> PrefixTerm:
    return replace(prefix, pages=prefix.pages.half())


def _cut(prefix: PrefixTerm) -> PrefixTerm:
    return replace(prefix, pages=prefix.pages[..., :8].contiguous())


def _strange(prefix: PrefixTerm) -> PrefixTerm:
    return replace(prefix, embeddings=torch.zeros(36, 64))


def test_a_folded_file_that_does_not_say_what_it_is_made_of_is_folded_again(
    base: BaseModel, shelf: dict[str, tuple[Path, Oracle]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Taken for given K and V, those of embeddings would be wrong in a composition."""
    told = PrefixTerm.tensors
    monkeypatch.setattr(PrefixTerm, "tensors", lambda term: {k: v for k, v in told(term).items() if k != "embeddings"})
    fold_folder(shelf["prompt"][0], base).save(tmp_path / "old")
    with pytest.raises(FoldedFileInvalid, match="the prefix is incomplete"):
        FoldedAdapter.load(tmp_path / "old", base.spec, torch.float32)


@pytest.mark.parametrize("spoil", [_shorter, _narrower, _cut, _strange])
def test_a_folded_file_that_does_not_fit_is_refused(
    spoil: Callable[[PrefixTerm], PrefixTerm],
    base: BaseModel,
    shelf: dict[str, tuple[Path, Oracle]],
    tmp_path: Path,
) -> None:
    folded = fold_folder(shelf["cartridge"][0], base)
    assert folded.prefix is not None
    replace(folded, prefix=spoil(folded.prefix)).save(tmp_path / "bad")
    with pytest.raises(FoldedFileInvalid, match="the prefix has"):
        FoldedAdapter.load(tmp_path / "bad", base.spec, torch.float32)


def test_the_oracle_is_not_made_of_the_pages(base: BaseModel, shelf: dict[str, tuple[Path, Oracle]]) -> None:
    """What the door compares with must not change when the conversion goes wrong."""
    for name in ("cartridge", "multitask"):
        prefix = read_adapter(shelf[name][0], base.spec).prefix
        assert prefix is not None
        before = plain_prefix(prefix, base.spec)
        fold_prefix(prefix, base.spec, torch.float32, base).pages.add_(1.0)
        after = plain_prefix(prefix, base.spec)
        for one, other in zip(before.keys_values, after.keys_values, strict=True):
            assert torch.equal(one[0], other[0])
        if before.embeddings is not None:
            assert after.embeddings is not None
            assert torch.equal(before.embeddings, after.embeddings)


def test_what_overflows_the_serving_dtype_is_refused(base_folder: Path, shelf: dict[str, tuple[Path, Oracle]]) -> None:
    half = load_base(base_folder, dtype=torch.float16, cache_dir=base_folder / "cache")
    parsed = read_adapter(shelf["prefix"][0], half.spec)
    assert isinstance(parsed.prefix, KeyValuePrefix)
    from deltaserve.deltas.fold import fold

    fold(parsed, half.spec, torch.float16, half)
    huge = replace(parsed, prefix=KeyValuePrefix(parsed.prefix.flat * 1e5))
    with pytest.raises(AdapterRefused) as refused:
        fold(huge, half.spec, torch.float16, half)
    assert [(reason.code, reason.where) for reason in refused.value.reasons] == [("value_out_of_range", "prefix")]


def test_embeddings_need_the_base(base: BaseModel, shelf: dict[str, tuple[Path, Oracle]]) -> None:
    prefix = read_adapter(shelf["prompt"][0], base.spec).prefix
    assert prefix is not None
    with pytest.raises(ValueError, match="give the base"):
        fold_prefix(prefix, base.spec, torch.float32, None)
