"""``deltaserve adapters merge`` from commands to served logits; peft's own merges and full weights are the oracle."""

from __future__ import annotations

import asyncio
import copy
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from deltaserve.cli import main
from deltaserve.cli.merge import Outcome, merge_here
from deltaserve.cli.workbench import Workbench, find_sources, workbench
from deltaserve.errors import InvalidRequest
from deltaserve.model.identify import identify
from deltaserve_store.errors import BaseMismatch
from deltaserve_store.store import AdapterStore
from deltaserve_trainer.base import load_model
from deltaserve_trainer.errors import MergeRefused
from deltaserve_trainer.loss import mean_loss
from deltaserve_trainer.merging.merge import seeded
from deltaserve_trainer.merging.options import MergeOptions
from deltaserve_trainer.methods.lora import LoraMethod
from deltaserve_trainer.scoring import read_rows
from deltatest.base_specs import spec_of
from deltatest.peft_adapters import make_bitfit, make_peft_ia3, make_peft_lora, make_sparse
from deltatest.rotation_kinds import make_givens
from deltatest.runtime_factory import open_runtime
from deltatest.trainer_base import make_base, write_pairs

PROMPT = [7, 40, 120, 9, 200, 33, 61]
Run = Callable[..., str]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and a shelf of adapters for it."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("merge")
    make_base(folder / "base")
    model = load_model(folder / "base")
    for seed in (1, 2, 3):
        make_peft_lora(model, folder / f"lora-{seed}", rank=1 + seed, seed=seed, std=0.1, base_name="base")
    make_peft_lora(model, folder / "dora", use_dora=True, seed=4, std=0.1, base_name="base")
    make_peft_lora(model, folder / "stranger", seed=5, base_name="somebody/else")
    make_peft_ia3(model, folder / "ia3", std=0.05, base_name="base")

    spec = spec_of(model, fingerprint=identify(folder / "base"))
    for seed in (1, 2):
        make_sparse(spec, folder / f"sparse-{seed}", seed=seed)
    make_bitfit(spec, folder / "bitfit")
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """``deltaserve adapters`` on the base, in this process, with a store of its own; its stdout."""
    monkeypatch.chdir(place)

    def call(*arguments: object, fails: bool = False) -> str:
        capsys.readouterr()
        status = 0
        try:
            model = () if arguments[0] == "show" else ("--model", "base")
            main(["adapters", *map(str, arguments), "--store", str(tmp_path / "store"), *model])
        except SystemExit as stopped:
            status = int(stopped.code or 0)
        captured = capsys.readouterr()
        assert (status != 0) == fails, captured.err
        assert "Traceback" not in captured.err
        return captured.err if fails else captured.out

    return call


@pytest.fixture(scope="module")
def shared(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workbench]:
    """One runtime for all tests that need not start their own."""
    scratch = tmp_path_factory.mktemp("bench")
    with workbench(scratch / "store", str(place / "base"), None, None, scratch) as bench:
        yield bench


@pytest.fixture
def bench(shared: Workbench, tmp_path: Path) -> Workbench:
    shared.scratch = tmp_path
    return shared


def merged(bench: Workbench, place: Path, names: Sequence[str], **options: Any) -> tuple[Outcome, dict, Tensor]:
    """What the command does between reading its options and printing: the outcome, the door's answer, the logits."""
    sources = find_sources([str(place / name) for name in names], place / "no-store", bench.scratch)
    outcome = merge_here(bench, sources, MergeOptions(**options), max_rows=64)
    return outcome, bench.admit(outcome.folder, "result", source="merge"), served(bench, outcome.folder)


def served(bench: Workbench, folder: Path) -> Tensor:
    """The engine's logits of the prompt."""
    return bench.logits(folder, [PROMPT])[0]


def by_peft(place: Path, names: Sequence[str], weights: Sequence[float], **options: Any) -> Tensor:
    """peft loads the adapters, merges them itself, and answers."""
    model: Any = load_model(place / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = PeftModel.from_pretrained(copy.deepcopy(model), str(place / names[0]), adapter_name=names[0])
        for name in names[1:]:
            wrapped.load_adapter(str(place / name), adapter_name=name)
        wrapped.add_weighted_adapter(list(names), list(weights), "merged", **options)
        wrapped.set_adapter("merged")
    with torch.no_grad():
        return wrapped.eval()(torch.tensor([PROMPT])).logits[0]


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, atol=2e-4, rtol=1e-4)


def test_a_weighted_sum_is_the_concatenation_of_peft(run: Run, bench: Workbench, place: Path, tmp_path: Path) -> None:
    out = run(
        "merge", "lora-1", "lora-2", "--out", "both", "--weights", "0.7,0.4", "--json", "--keep", tmp_path / "kept"
    )
    report = json.loads(out)
    assert report["is_exact"]
    assert report["adapter"]["kinds"] == ["lora"]
    assert report["adapter"]["rank"] == 5
    assert [parent.split("@")[0] for parent in report["parents"]] == ["0.7*lora-1", "0.4*lora-2"]
    config = json.loads((tmp_path / "kept" / "adapter.json").read_text())
    assert config["method"].startswith("merge, exact; linear of 0.7*lora-1@")
    names = ["lora-1", "lora-2"]
    close(served(bench, tmp_path / "kept"), by_peft(place, names, [0.7, 0.4], combination_type="cat"))


def test_ties_as_low_rank_is_that_of_peft(bench: Workbench, place: Path) -> None:
    names = ["lora-1", "lora-2", "lora-3"]
    outcome, _, logits = merged(bench, place, names, method="ties", density=0.4, rank=6)
    report = outcome.report
    assert not report["is_exact"]
    assert 0 < report["mean_error"] <= report["largest_error"] < 1
    assert report["worst_module"].startswith("model.layers.")
    assert f"relative error at most {report['largest_error']:.3g} ({report['worst_module']})" in outcome.lines()[1]
    told = json.loads((outcome.folder / "adapter.json").read_text())["method"]
    assert told.startswith(f"merge, error {report['largest_error']:.3g}; ties density 0.4 rank 6 of lora-1@")
    close(logits, by_peft(place, names, [1.0] * 3, combination_type="ties_svd", density=0.4, svd_rank=6))


def test_sparse_adapters_stay_sparse_and_exact(bench: Workbench, place: Path) -> None:
    outcome, admitted, logits = merged(bench, place, ["sparse-1", "sparse-2"], method="dare", density=0.5, seed=3)
    assert outcome.report["is_exact"]
    assert "the result is stored as sparse entries, number by number" in outcome.lines()
    assert admitted["kinds"] == ["sparse"]
    model = load_model(place / "base")
    parts = {name: load_file(place / name / "adapter.safetensors") for name in ("sparse-1", "sparse-2")}

    for name, module in model.named_modules():
        for index, tensors in enumerate(parts.values()):
            if f"{name}.values" in tensors:
                weight = module.get_parameter("weight").data
                mask = torch.bernoulli(torch.full_like(weight, 0.5), generator=seeded(3, f"{index}:{name}"))
                delta = torch.zeros_like(weight)
                delta[tensors[f"{name}.rows"].long(), tensors[f"{name}.cols"].long()] = tensors[f"{name}.values"]
                weight += delta * mask / 0.5
    with torch.no_grad():
        close(logits, model(torch.tensor([PROMPT])).logits[0])


def test_an_exact_result_of_low_rank_is_not_told_to_be_sparse(bench: Workbench, place: Path) -> None:
    """Nothing is dropped and the ranks add up, so the nearest low-rank matrices are the sums themselves."""
    outcome, admitted, _ = merged(bench, place, ["lora-1", "lora-2"], method="dare", density=1.0)
    assert outcome.report["is_exact"]
    assert admitted["kinds"] == ["lora"]
    assert not any("sparse" in line for line in outcome.lines())


def test_unlike_kinds_add_up(bench: Workbench, place: Path) -> None:
    """A LoRA, a DoRA, entries and biases in one adapter: equal to all changes made to the weights."""
    outcome, admitted, logits = merged(bench, place, ["lora-1", "dora", "sparse-1", "bitfit"], method="linear")
    assert "exact: every number is what the method says, rounded once" in outcome.lines()
    assert sorted(admitted["kinds"]) == ["lora", "sparse", "vector"]
    model: Any = load_model(place / "base")
    plain = {name: weight.clone() for name, weight in model.state_dict().items()}
    for name in ("lora-1", "dora"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tuned = PeftModel.from_pretrained(load_model(place / "base"), str(place / name)).merge_and_unload()
        for key, weight in tuned.state_dict().items():
            model.state_dict()[key].add_(weight - plain[key])
    entries = load_file(place / "sparse-1" / "adapter.safetensors")
    biases = load_file(place / "bitfit" / "adapter.safetensors")
    for name, module in model.named_modules():
        if f"{name}.values" in entries:
            at = entries[f"{name}.rows"].long(), entries[f"{name}.cols"].long()
            module.weight.data[at] += entries[f"{name}.values"]
        if f"{name}.bias" in biases:
            assert module.bias is None
            module.bias = torch.nn.Parameter(biases[f"{name}.bias"])
    with torch.no_grad():
        close(logits, model(torch.tensor([PROMPT])).logits[0])


def test_the_result_is_served_in_one_batch_with_its_parents(run: Run, place: Path, tmp_path: Path) -> None:
    run("merge", "lora-1", "sparse-1", "ia3", "--out", "all")
    models = ["all", "base", "lora-1", "sparse-1", "all"]

    async def answers() -> tuple[list[list[int]], list[list[int]]]:
        async with open_runtime(place / "base", tmp_path / "store", base_names=("base",), check_each_step=True) as rt:
            for name in ("lora-1", "sparse-1"):
                await rt.admit(place / name, name)
            alone = [(await rt.generate(model, PROMPT)).token_ids for model in models]
            mixed = await asyncio.gather(*(rt.generate(model, PROMPT) for model in models))
            return alone, [completion.token_ids for completion in mixed]

    alone, mixed = asyncio.run(answers())
    assert alone == mixed
    assert alone[0] == alone[4]
    assert len({tuple(ids) for ids in alone}) == 4


def test_greedy_soup_keeps_what_helps_by_the_engines_own_loss(bench: Workbench, place: Path, tmp_path: Path) -> None:
    data = write_pairs(tmp_path / "held-out.jsonl", 6)
    names = ["lora-1", "lora-2", "lora-3"]
    outcome, _, _ = merged(bench, place, names, method="greedy-soup", data=str(data))
    report = outcome.report
    assert report["loss"] <= min(report["losses"])
    assert report["chosen"]
    told = json.loads((outcome.folder / "adapter.json").read_text())["method"]
    assert told == f"merge, exact; greedy-soup of {', '.join(report['chosen'])}"
    rows = read_rows(data, place / "base", max_rows=64, max_length=256)
    for name, loss in zip(names, report["losses"], strict=True):
        tuned = LoraMethod.load(load_model(place / "base"), place / name).model
        measured = mean_loss(tuned, rows, batch_size=8, pad_token_id=0, precision="float32")
        assert loss == pytest.approx(measured, abs=1e-4)


def test_names_versions_and_folders_are_sources(bench: Workbench, place: Path, tmp_path: Path) -> None:
    first = bench.admit(place / "lora-1", "a", source="test")["version"]
    bench.admit(place / "lora-2", "a", source="test")
    store = bench.runtime.store._folders.root
    (tmp_path / "copies").mkdir()
    sources = find_sources(["a", f"a@{first[:10]}", str(place / "lora-3")], store, tmp_path / "copies")
    assert [source.name for source in sources] == ["a", "a", "lora-3"]
    assert sources[1].version == first
    assert sources[0].version != first
    assert sources[1].told == f"a@{first[:12]}"
    fingerprint = bench.runtime.base.spec.fingerprint
    assert [source.admitted_for for source in sources] == [fingerprint, fingerprint, None]
    for source in sources:
        assert bench.read(source).rank
    with pytest.raises(InvalidRequest, match="admitted for another base"):
        bench.read(replace(sources[0], admitted_for="cd" * 32))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["lora-1", "lora-2", "--out", "../x"], "not a valid name"),
        (["lora-1", "lora-2", "--out", "x", "--weights", "a,b"], "write numbers as"),
        (["lora-1", "lora-2", "--out", "x", "--weights", "1"], "1 weights for 2 adapters"),
        (["lora-1", "--out", "x", "--method", "ties"], "at least 2 adapters"),
        (["lora-1", "lora-2", "--out", "x", "--method", "greedy-soup"], "give --data"),
        (["lora-1", "nowhere", "--out", "x"], "'nowhere' is no folder either"),
        (["lora-1", "lora-2", "--out", "x", "--keep", "lora-3"], "is there already"),
        (["lora-1", "lora-2", "--out", "x", "--method", "soup", "--density", "0.5"], "no option of soup"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_added(
    run: Run, tmp_path: Path, arguments: list[str], told: str
) -> None:
    assert told in run("merge", *arguments, fails=True)
    assert not list((tmp_path / "store").glob("versions/*"))


@pytest.mark.parametrize(
    ("names", "options", "told"),
    [
        (["lora-1", "stranger"], {"method": "soup"}, "base_mismatch"),
        (["lora-1", "lora-1"], {"method": "linear", "weights": (1.0, -1.0)}, "does not change the base"),
        (["sparse-1", "ia3"], {"method": "ties", "form": "lora"}, "give --rank"),
    ],
)
def test_what_turns_out_impossible_is_refused(
    bench: Workbench, place: Path, names: list[str], options: dict[str, Any], told: str
) -> None:
    with pytest.raises((MergeRefused, BaseMismatch)) as raised:
        merged(bench, place, names, **options)
    assert told in str(raised.value) + "".join(reason.code for reason in getattr(raised.value, "reasons", ()))


def test_a_server_that_holds_the_store_gets_the_files(
    run: Run, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What needs an engine runs here all the same; the door is the server's, and the store is only read."""
    sent: list[tuple[list[str], str]] = []

    class Server:
        def upload(self, files: Sequence[Path], name: str) -> dict[str, Any]:
            sent.append((sorted(file.name for file in files), name))
            return {"created": True, "version": "ab" * 32}

        def version(self) -> dict[str, Any]:
            return {"base": "served", "base_fingerprint": fingerprint}

    fingerprint = identify(place / "base")
    run("add", "lora-1", "--name", "a")
    before = sorted(path.name for path in (tmp_path / "store" / "versions").iterdir())
    monkeypatch.setattr("deltaserve.cli.workbench.find_server", lambda *_: Server())
    with AdapterStore.open(tmp_path / "store"):  # the server's lock
        assert "both: added, version abababababab" in run("merge", "a", "lora-2", "--out", "both")
        fingerprint = "ef" * 32
        told = run("merge", "a", "lora-2", "--out", "both", fails=True)
        assert "serves another base: served, fingerprint efefefefefef" in told
    assert sent == [(["adapter.json", "adapter.safetensors"], "both")]
    assert sorted(path.name for path in (tmp_path / "store" / "versions").iterdir()) == before


def test_what_has_no_part_in_a_sum_is_named(bench: Workbench, place: Path, tmp_path: Path) -> None:
    spec = bench.runtime.base.spec
    (turn,) = find_sources([str(make_givens(spec, tmp_path / "turn"))], place / "no-store", tmp_path)
    adapter = bench.read(turn, accept_base=True)
    with pytest.raises(MergeRefused, match=r"turn: RotationDelta of \S+ is no low-rank, sparse, dense or vector term"):
        bench.update(turn, adapter)
    prefix: Any = object()
    with pytest.raises(MergeRefused, match="turn: the adapter has prefix"):
        bench.update(turn, replace(adapter, prefix=prefix))
