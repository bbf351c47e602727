"""What the base is called: by requests, and by the files of adapters."""

from __future__ import annotations

from pathlib import Path

from deltaserve.config import ServeConfig
from deltaserve.runtime import base_names


def test_the_embedded_base_has_its_own_name() -> None:
    assert base_names(ServeConfig()) == ("tinybase",)


def test_a_folder_is_called_by_its_last_part(tmp_path: Path) -> None:
    folder = tmp_path / "my-base"
    folder.mkdir()
    assert base_names(ServeConfig(model=str(folder))) == ("my-base",)


def test_a_hub_id_stays_whole() -> None:
    assert base_names(ServeConfig(model="org/my-base", allow_hub=True)) == ("org/my-base",)


def test_the_served_name_comes_first_and_further_names_last(tmp_path: Path) -> None:
    config = ServeConfig(model=str(tmp_path), served_model_name="prod", base_names=("org/my-base", "prod"))
    assert base_names(config) == ("prod", tmp_path.name, "org/my-base")
