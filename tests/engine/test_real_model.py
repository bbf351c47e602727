"""The whole engine on real models: greedy tokens equal ``generate()``, in mixed batches with preemption forced."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from deltaserve.deltas.folded import FoldedAdapter, LowRankTerm
from deltaserve.model.base import BaseModel, load_base
from deltatest.engine_fakes import request as make_request
from deltatest.real_engine import real_rig
from deltatest.tiny_models import ARCHITECTURES, VOCAB_SIZE, build_tiny_model

torch.set_num_threads(1)

NUM_TOKENS = 64
# Around windows (24), block borders (16, 32, 48) and longrope's switch (48, crossed while decoding).
PROMPT_LENGTHS = (1, 16, 40, 61)


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist() for length in PROMPT_LENGTHS]


def strong_adapter(base: BaseModel) -> FoldedAdapter:
    """Rank 2 on every linear, strong enough that its rows would spoil a neighbour's at once."""
    generator = torch.Generator().manual_seed(5)
    terms = {
        name: (
            LowRankTerm(
                torch.randn(2, linear.in_features, generator=generator) * 0.3,
                torch.randn(2, linear.out_features, generator=generator) * 0.3,
            ),
        )
        for name, linear in base.spec.linears.items()
    }
    return FoldedAdapter(terms, base.spec.fingerprint, torch.float32)


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_greedy_equals_generate_in_mixed_batches_with_preemption_forced(architecture: str, tmp_path: Path) -> None:
    folder = build_tiny_model(architecture, tmp_path / architecture)
    base = load_base(folder, dtype=torch.float32, cache_dir=tmp_path / "digests")
    oracle = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    rig = real_rig(base, {"strong": strong_adapter(base)}, num_blocks=14, max_num_batched_tokens=24)
    requests = [
        make_request(f"base{i}", prompt, max_tokens=NUM_TOKENS, ignore_eos=True) for i, prompt in enumerate(prompts())
    ]
    company = [make_request(f"a{i}", [5 + i] * 9, "strong", max_tokens=20, ignore_eos=True) for i in range(2)]
    tokens = rig.run(*requests, *company)
    assert rig.num_preempted > 0
    for i, prompt in enumerate(prompts()):
        ids = torch.tensor([prompt])
        with torch.no_grad():
            wanted = oracle.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_TOKENS, do_sample=False, eos_token_id=None
            )
        assert tokens[f"base{i}"] == [wanted[0, len(prompt) :].tolist()]
    assert tokens["a0"] != [tokens["base0"][0][:20]]


def test_prompt_logprobs_and_cached_prefixes_agree_with_transformers(tmp_path: Path) -> None:
    folder = build_tiny_model("llama", tmp_path / "llama")
    base = load_base(folder, dtype=torch.float32, cache_dir=tmp_path / "digests")
    oracle = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    prompt = prompts()[3]
    rig = real_rig(base)
    cold = rig.run(make_request("cold", prompt, max_tokens=8, ignore_eos=True))["cold"]
    warm = rig.run(make_request("warm", prompt, max_tokens=8, ignore_eos=True))["warm"]
    assert warm == cold
    rig.engine.add(make_request("echo", prompt, max_tokens=0, prompt_logprobs=3), 0.0)
    outputs = []
    while rig.engine.open_ids:
        outputs += rig.engine.step().outputs
    told = outputs[0].prompt_logprobs
    assert told is not None
    with torch.no_grad():
        logprobs = torch.log_softmax(oracle(torch.tensor([prompt])).logits[0], dim=-1)
    for position, entry in enumerate(told):
        if position == 0:
            assert entry is None
            continue
        assert entry is not None
        assert entry.token_id == prompt[position]
        assert entry.logprob == pytest.approx(float(logprobs[position - 1, prompt[position]]), abs=1e-4)
        assert [token for token, _ in entry.top] == logprobs[position - 1].topk(3).indices.tolist()
