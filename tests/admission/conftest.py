"""One tiny base and a shelf of real adapter folders, made once; a fresh store and door for each test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from deltaserve.model.base import BaseModel, load_base
from deltatest.admission_rig import Rig, open_rig
from deltatest.peft_adapters import (
    make_bitfit,
    make_peft_ia3,
    make_peft_ln_tuning,
    make_peft_lora,
    make_peft_shira,
    make_sparse,
)
from deltatest.tiny_models import build_tiny_model

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model("llama", tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="session")
def load(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[torch.dtype], BaseModel]:
    cache = tmp_path_factory.mktemp("digests")
    loaded: dict[torch.dtype, BaseModel] = {}

    def load_dtype(dtype: torch.dtype) -> BaseModel:
        if dtype not in loaded:
            loaded[dtype] = load_base(base_folder, dtype=dtype, cache_dir=cache)
        return loaded[dtype]

    return load_dtype


@pytest.fixture(scope="session")
def base(load: Callable[[torch.dtype], BaseModel]) -> BaseModel:
    return load(torch.float32)


@pytest.fixture(scope="session")
def hf_model(base_folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base_folder).eval()


@pytest.fixture(scope="session")
def shelf(hf_model: Any, base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders: ``lora-0`` .. ``lora-3`` (ranks 2 to 5), ``shira``, ``sparse``, ``zero`` (no effect), ``other-base``; of
    vectors ``dora``, ``ia3``, ``norms``, ``bitfit``."""
    root = tmp_path_factory.mktemp("adapters")
    for seed in range(4):
        make_peft_lora(hf_model, root / f"lora-{seed}", rank=2 + seed, seed=seed)
    make_peft_shira(hf_model, root / "shira", std=0.3)
    make_sparse(base.spec, root / "sparse")
    make_peft_lora(hf_model, root / "dora", use_dora=True)
    make_peft_ia3(hf_model, root / "ia3", std=0.1)
    make_peft_ln_tuning(hf_model, root / "norms", std=0.1)
    make_bitfit(base.spec, root / "bitfit")
    make_peft_lora(hf_model, root / "zero", std=0.0)
    make_peft_lora(hf_model, root / "other-base", base_name="somebody/else")
    return root


@pytest.fixture
def rig(base: BaseModel, tmp_path: Path) -> Iterator[Rig]:
    rig = open_rig(base, tmp_path / "store")
    yield rig
    rig.close()
