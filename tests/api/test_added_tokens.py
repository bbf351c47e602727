"""Adapters that add tokens to the base's: from upload to text, PEFT on the resized model as the judge."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM

from deltaserve.config import MIB, EngineConfig, ServeConfig
from deltaserve.errors import AdapterRefused
from deltaserve.remote import RemoteServer
from deltatest.grown_adapters import ADDED, KINDS, Grown, make_grown
from deltatest.live_runtime import serve_runtime
from deltatest.live_server import LiveServer
from deltatest.peft_adapters import edit_config, make_peft_lora, peft_greedy, peft_logits
from deltatest.tiny_models import save_random, tiny_config
from deltatest.tokenizers import byte_level

BASE = "tiny-base"
TEXT = f"the {ADDED[0]}quick brown {ADDED[2]} fox{ADDED[1]}"
NUM_TOKENS = 24


class Shelf:
    """A tied base with a tokenizer, a plain LoRA, and one adapter of each kind, on a server with two adapter slots."""

    def __init__(self, root: Path) -> None:
        torch.set_num_threads(1)
        self.tokenizer = byte_level()
        config = tiny_config("llama", vocab_size=self.tokenizer.vocab_size, tie_word_embeddings=True)
        self.base = save_random(config, root / BASE)
        self.tokenizer._hf.save_pretrained(self.base)
        self.model = AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32).eval()
        self.plain = make_peft_lora(self.model, root / "plain", seed=9, std=0.2, base_name=BASE)
        self.grown = {
            kind: make_grown(kind, self.model, self.tokenizer._hf, root / kind, seed=seed)
            for seed, kind in enumerate(kind for kind in KINDS if kind != "saved")
        }

    def config(self, store: Path) -> ServeConfig:
        engine = EngineConfig(
            max_model_len=128, max_num_seqs=16, max_num_batched_tokens=64, kv_cache_bytes=8 * MIB, adapter_slots=3
        )
        return ServeConfig(model=str(self.base), store=store, port=0, dtype="float32", drain_seconds=5, engine=engine)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return Shelf(tmp_path_factory.mktemp("grown"))


@pytest.fixture(scope="module")
def live(shelf: Shelf, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with serve_runtime(shelf.config(tmp_path_factory.mktemp("store") / "store")) as server:
        door = RemoteServer(server.url)
        door.upload(shelf.plain, "plain")
        for kind, grown in shelf.grown.items():
            told = door.upload(grown.folder, kind)
            assert told["added_tokens"] == dict(zip(ADDED, grown.ids, strict=True))
        yield server


@pytest.fixture
def http(live: LiveServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=live.url, timeout=60) as client:
        yield client


def complete(http: httpx.Client, model: str, prompt: Any, **fields: Any) -> dict[str, Any]:
    body = {"model": model, "prompt": prompt, "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
    answer = http.post("/v1/completions", json={**body, "return_token_ids": True, **fields})
    assert answer.status_code == 200, answer.text
    choice: dict[str, Any] = answer.json()["choices"][0]
    return choice


def wanted_ids(grown: Grown) -> list[int]:
    return peft_greedy(grown.model, grown.folder, grown.tokenizer.encode(TEXT), NUM_TOKENS)


def test_answers_are_pefts_in_words_of_the_adapter(http: httpx.Client, shelf: Shelf) -> None:
    """Prompts are read and answers written with the added tokens; three slots for five adapters, so they are evicted
    and loaded again."""
    met: set[int] = set()
    for _ in range(2):
        for kind, grown in shelf.grown.items():
            choice = complete(http, kind, TEXT, skip_special_tokens=False)
            assert choice["prompt_token_ids"] == grown.tokenizer.encode(TEXT)
            assert set(grown.ids) <= set(choice["prompt_token_ids"])
            assert choice["token_ids"] == wanted_ids(grown), kind
            assert choice["text"] == grown.tokenizer.decode(choice["token_ids"], skip_special_tokens=False)
            met |= set(choice["token_ids"]) & set(grown.ids)
        complete(http, "plain", "the quick")
    assert met, "no answer has an added token: the test shows less than it says"


def test_control_tokens_are_left_out_of_text(http: httpx.Client, shelf: Shelf) -> None:
    grown = shelf.grown["copied"]
    choice = complete(http, "copied", TEXT)
    assert choice["text"] == grown.tokenizer.decode(choice["token_ids"], skip_special_tokens=True)


def test_the_base_and_others_know_nothing_of_them(http: httpx.Client, shelf: Shelf, tmp_path: Path) -> None:
    """Beside an adapter with more tokens, in the same steps, others keep their tokens and their log probabilities."""
    asked = {"the quick": ("tiny-base", "plain")}
    alone = {model: complete(http, model, prompt, logprobs=5) for prompt, models in asked.items() for model in models}
    is_over = threading.Event()

    def keep_busy(other: httpx.Client) -> None:
        while not is_over.is_set():
            complete(other, "copied", TEXT, max_tokens=90)

    with ThreadPoolExecutor(4) as pool, httpx.Client(base_url=http.base_url, timeout=60) as other:
        busy = [pool.submit(keep_busy, other) for _ in range(4)]
        try:
            for model, wanted in alone.items():
                found = complete(http, model, "the quick", logprobs=5)
                assert found["token_ids"] == wanted["token_ids"]
                assert found["logprobs"] == wanted["logprobs"], f"{model}: the company changed its numbers"
            # A proof in the same steps compares logits of the base's tokens alone.
            late = make_peft_lora(shelf.model, tmp_path / "late", seed=10, std=0.2, base_name=BASE)
            assert RemoteServer(str(http.base_url)).upload(late, "late")["version"]
        finally:
            is_over.set()
        for job in busy:
            job.result()
    for model in ("tiny-base", "plain"):
        assert complete(http, model, TEXT)["prompt_token_ids"] == shelf.tokenizer.encode(TEXT)
        refused = http.post("/v1/completions", json={"model": model, "prompt": [5, shelf.grown["copied"].ids[0]]})
        assert refused.status_code == 400
        assert "outside the vocabulary" in refused.json()["error"]["message"]
    beyond = http.post("/v1/completions", json={"model": "copied", "prompt": [5, shelf.grown["copied"].ids[-1] + 1]})
    assert beyond.status_code == 400


def test_log_probabilities_are_over_all_tokens(http: httpx.Client, shelf: Shelf) -> None:
    grown = shelf.grown["copied"]
    ids = grown.tokenizer.encode(TEXT)
    logits = peft_logits(grown.model, grown.folder, ids)
    wanted = torch.log_softmax(logits, dim=-1)
    found = complete(http, "copied", ids, max_tokens=0, echo=True, logprobs=1)["logprobs"]["token_logprobs"]
    for place, value in enumerate(found[1:]):
        assert value == pytest.approx(float(wanted[place, ids[place + 1]]), abs=1e-4)


@pytest.mark.parametrize("fields", [{"repetition_penalty": 1.3}, {"frequency_penalty": 0.5}, {"top_p": 0.9, "seed": 3}])
def test_sampling_sees_them(http: httpx.Client, shelf: Shelf, fields: dict[str, Any]) -> None:
    """Penalties, filters, bias and stops take added tokens like any other."""
    grown = shelf.grown["copied"]
    loved = complete(http, "copied", TEXT, logit_bias={str(grown.ids[2]): 100}, max_tokens=3, temperature=1, **fields)
    assert loved["token_ids"] == [grown.ids[2]] * 3
    assert loved["text"].replace(" ", "") == ADDED[2] * 3
    ended = complete(http, "copied", TEXT, logit_bias={str(grown.ids[0]): 100}, stop_token_ids=[grown.ids[0]])
    assert ended["finish_reason"] == "stop"


def test_tokenizing_takes_the_adapters_words(http: httpx.Client, shelf: Shelf) -> None:
    grown = shelf.grown["trained"]
    found = http.post("/tokenize", json={"model": "trained", "prompt": TEXT, "return_token_strs": True}).json()
    assert found["tokens"] == grown.tokenizer.encode(TEXT)
    assert set(ADDED) <= set(found["token_strs"])
    assert http.post("/tokenize", json={"prompt": TEXT}).json()["tokens"] == shelf.tokenizer.encode(TEXT)
    back = http.post("/detokenize", json={"model": "trained", "tokens": found["tokens"], "skip_special_tokens": False})
    assert back.json()["prompt"] == grown.tokenizer.decode(found["tokens"], skip_special_tokens=False)
    for foreign in ({"tokens": [grown.ids[0]]}, {"model": "trained", "tokens": [grown.ids[-1] + 1]}):
        refused = http.post("/detokenize", json=foreign)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "tokens")


def test_composing(http: httpx.Client, shelf: Shelf) -> None:
    """Beside other adapters at full strength; two of the kind, or half of one, have no meaning."""
    body = {"model": BASE, "prompt": TEXT, "max_tokens": 4, "return_token_ids": True, "temperature": 0}

    def ask(*adapters: dict[str, Any]) -> Any:
        return http.post("/v1/completions", json={**body, "adapters": list(adapters)})

    both = ask({"id": "copied"}, {"id": "plain", "scale": 0.5}).json()["choices"][0]
    assert both["prompt_token_ids"] == shelf.grown["copied"].tokenizer.encode(TEXT)
    off = ask({"id": "copied", "scale": 0}).json()["choices"][0]
    assert off["prompt_token_ids"] == shelf.tokenizer.encode(TEXT)
    assert off["token_ids"] == complete(http, BASE, TEXT, max_tokens=4)["token_ids"]
    for adapters in (({"id": "copied"}, {"id": "trained"}), ({"id": "copied", "scale": 0.5},)):
        refused = ask(*adapters)
        assert refused.status_code == 400
        assert refused.json()["error"]["code"] == "composition_refused"


def test_ensembles_of_members_that_share_them(http: httpx.Client, shelf: Shelf) -> None:
    """One member alone answers as it would without an ensemble; members of other tokens are refused."""
    body = {"model": BASE, "prompt": TEXT, "max_tokens": 8, "return_token_ids": True, "temperature": 0}

    def ask(*members: dict[str, Any]) -> Any:
        return http.post("/v1/completions", json={**body, "ignore_eos": True, "ensemble": {"members": list(members)}})

    twice = ask({"model": "copied"}, {"model": "copied"}).json()["choices"][0]
    alone = complete(http, "copied", TEXT, max_tokens=8)
    assert (twice["prompt_token_ids"], twice["token_ids"]) == (alone["prompt_token_ids"], alone["token_ids"])
    refused = ask({"model": "copied"}, {"model": BASE})
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "ensemble_refused"


def test_untied_matrices_saved_whole(tmp_path: Path) -> None:
    """The version and its tokens outlive a restart, without the tokenizer files; an answer ends with the token that
    the adapter ends answers with."""
    tokenizer = byte_level()
    base = save_random(tiny_config("llama", vocab_size=tokenizer.vocab_size), tmp_path / BASE)
    tokenizer._hf.save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    grown = make_grown("saved", model, tokenizer._hf, tmp_path / "saved")
    config = json.loads((grown.folder / "tokenizer_config.json").read_text())
    (grown.folder / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": ADDED[1]}))
    serve = ServeConfig(
        model=str(base),
        store=tmp_path / "store",
        port=0,
        dtype="float32",
        drain_seconds=5,
        engine=EngineConfig(max_model_len=96, max_num_seqs=4, max_num_batched_tokens=32, kv_cache_bytes=2 * MIB),
    )
    ids = grown.tokenizer.encode(TEXT)
    wanted = peft_greedy(grown.model, grown.folder, ids, 12)
    with serve_runtime(serve) as server, httpx.Client(base_url=server.url, timeout=60) as http:
        version = RemoteServer(server.url).upload(grown.folder, "saved")["version"]
        assert complete(http, "saved", TEXT, max_tokens=12)["token_ids"] == wanted
    shutil.rmtree(tmp_path / "store" / "derived", ignore_errors=True)
    with serve_runtime(serve) as server, httpx.Client(base_url=server.url, timeout=60) as http:
        assert complete(http, "saved", TEXT, max_tokens=12)["token_ids"] == wanted
        ended = complete(http, "saved", TEXT, logit_bias={str(grown.ids[1]): 100}, ignore_eos=False)
        assert (ended["finish_reason"], ended["text"]) == ("stop", "")
        # The same bytes are the same version, whichever file tells of the tokens.
        (grown.folder / "tokenizer_config.json").unlink()
        (grown.folder / "tokenizer.json").unlink()
        listed = next((tmp_path / "store" / "versions").glob("*/tokens.json"))
        shutil.copy(listed, grown.folder / "tokens.json")
        assert RemoteServer(server.url).upload(grown.folder, "again")["version"] == version


def test_what_cannot_be_added_is_refused(live: LiveServer, shelf: Shelf, tmp_path: Path) -> None:
    door = RemoteServer(live.url)

    def spoiled(name: str, tokens: list[tuple[int, str]]) -> Path:
        folder = tmp_path / name
        shutil.copytree(shelf.grown["trained"].folder, folder)
        (folder / "tokenizer_config.json").unlink()
        listed = [{"id": i, "content": text} for i, text in tokens]
        (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": listed}))
        return folder

    first = shelf.grown["trained"].ids[0]
    good = list(zip(shelf.grown["trained"].ids, ADDED, strict=True))
    the = shelf.tokenizer._hf.convert_ids_to_tokens(shelf.tokenizer.encode("the")[0])
    cases = {
        "no-names": ([], "index_out_of_range"),
        "too-few": (good[:2], "index_out_of_range"),
        "too-many": ([*good, (first + 3, "<more>")], "missing_tensor"),
        "a-gap": ([*good[:2], (first + 3, "<x>")], "added_tokens"),
        "a-known-text": ([(first, the), *good[1:]], "added_tokens"),
    }
    for name, (tokens, code) in cases.items():
        with pytest.raises(AdapterRefused) as refused:
            door.upload(spoiled(name, tokens), name)
        assert code in {reason.code for reason in refused.value.reasons}, (name, refused.value.reasons)


def test_a_lora_that_begins_in_mid_prompt_adds_none(live: LiveServer, shelf: Shelf, tmp_path: Path) -> None:
    """Its prompts begin with the base, which has no row for them."""
    folder = tmp_path / "invoked"
    shutil.copytree(shelf.grown["copied"].folder, folder)
    edit_config(folder, alora_invocation_tokens=[5, 6])
    with pytest.raises(AdapterRefused) as refused:
        RemoteServer(live.url).upload(folder, "invoked")
    reasons = [(reason.code, reason.where) for reason in refused.value.reasons]
    assert reasons == [("unsupported_feature", "adapter_config.json:alora_invocation_tokens")]
