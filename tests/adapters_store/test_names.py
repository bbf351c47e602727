"""From the model field to a version."""

from __future__ import annotations

import dataclasses
import pickle

import pytest

from deltaserve_store.errors import InvalidName, NotFound
from deltaserve_store.manifest import AdapterRecord, BaseRef
from deltaserve_store.names import AliasEntry, NameEntry, NameMap, validate_name

V1 = "a1b2c3d4" + "0" * 56
V2 = "a1b2c3d4" + "1" * 56
V3 = "ffffffff" + "2" * 56
BASE = "org/tiny-base"


def record(name: str, version: str, tenant: str = "red") -> AdapterRecord:
    return AdapterRecord(name, version, tenant, ("lora",), "peft-lora", 4, 1, 1, 0.0, BaseRef("fp"))


def entry(name: str, *versions: str, tenant: str = "red") -> NameEntry:
    return NameEntry(versions[-1], {version: record(name, version, tenant) for version in versions})


NAMES = NameMap(
    base_names=(BASE, "tiny", "with:colon"),
    adapters={
        "red": {"poet": entry("poet", V1, V2), "lawyer": entry("lawyer", V3)},
        "blue": {"poet": entry("poet", V3, tenant="blue")},
    },
    aliases={"red": {"prod": AliasEntry("poet"), "fixed": AliasEntry("poet", V1), "lost": AliasEntry("gone")}},
)


@pytest.mark.parametrize(
    ("model", "name", "version"),
    [
        (BASE, BASE, None),
        ("tiny", "tiny", None),
        ("with:colon", "with:colon", None),
        ("poet", "poet", V2),
        ("lawyer", "lawyer", V3),
        (f"poet@{V1}", "poet", V1),
        (f"poet@{V1[:9]}", "poet", V1),
        (f"poet@{V2[:9]}", "poet", V2),
        ("prod", "poet", V2),
        ("fixed", "poet", V1),
        (f"prod@{V1}", "poet", V1),
        (f"fixed@{V1[:9]}", "poet", V1),
        (f"{BASE}:poet", "poet", V2),
        (f"{BASE}:prod", "poet", V2),
        (f"tiny:poet@{V1}", "poet", V1),
        ("with:colon:lawyer", "lawyer", V3),
    ],
)
def test_resolves(model: str, name: str, version: str | None) -> None:
    resolved = NAMES.resolve("red", model)
    assert (resolved.name, resolved.version, resolved.is_base) == (name, version, version is None)
    assert resolved.record == (None if version is None else record(name, version))


@pytest.mark.parametrize(
    "model",
    [
        "",
        "nobody",
        "Poet",
        "poet ",
        "poet@",
        "poet@a1b2c3d",
        "poet@a1b2c3d4",
        f"poet@{V1}0",
        f"poet@{V1.upper()}",
        f"poet@{V3}",
        f"fixed@{V2}",
        "lost",
        ":poet",
        "other:poet",
        f"{BASE}:",
        f"{BASE}:nobody",
        f"{BASE}:{BASE}",
        f"tiny@{V1}",
        "poet:tiny",
        "@",
        "poet\0",
        "\ud800",
        "x" * 10_000,
    ],
)
def test_refuses(model: str) -> None:
    with pytest.raises(NotFound) as raised:
        NAMES.resolve("red", model)
    assert (raised.value.status, raised.value.error_code, raised.value.param) == (404, "model_not_found", "model")
    assert len(raised.value.message) < 600
    raised.value.message.encode()


def test_an_ambiguous_prefix_says_so() -> None:
    with pytest.raises(NotFound, match="2 versions begin so"):
        NAMES.resolve("red", "poet@a1b2c3d4")


def test_tenants_are_apart() -> None:
    assert NAMES.resolve("blue", "poet").version == V3
    for model in ("lawyer", "prod", f"poet@{V1}"):
        with pytest.raises(NotFound):
            NAMES.resolve("blue", model)
    with pytest.raises(NotFound):
        NAMES.resolve("nobody", "poet")
    assert NAMES.resolve("nobody", BASE).is_base


def test_lists() -> None:
    assert NAMES.names("red") == ("lawyer", "poet")
    assert [item.version for item in NAMES.current("red")] == [V3, V2]
    assert NAMES.current("nobody") == ()
    assert NAMES.versions() == {V1, V2, V3}


def test_is_frozen_and_crosses_processes() -> None:
    assert pickle.loads(pickle.dumps(NAMES)) == NAMES  # noqa: S301
    with pytest.raises(dataclasses.FrozenInstanceError):
        NAMES.base_names = ()  # type: ignore[misc]


def test_names_that_may_be_given() -> None:
    for name in ("a", "A-b_c.1", "0", "x" * 64):
        assert validate_name(name) == name
    for name in ("", ".x", "_x", "x/y", "x:y", "x@y", "x y", "x" * 65, "é", "x\n", None):
        with pytest.raises(InvalidName) as raised:
            validate_name(name, param="alias")  # type: ignore[arg-type]
        assert raised.value.param == "alias"
        assert raised.value.status == 400
