"""Commands that need no engine: keys, settings that contradict each other, help."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from deltaserve.cli import app, main
from deltaserve.config import ServeConfig, parse_bytes
from deltaserve.errors import ConfigError


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of a command in this process."""
    capsys.readouterr()
    status = 0
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as stopped:
        status = int(stopped.code or 0)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_a_key_is_printed_once_and_kept_as_a_digest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "keys.json"
    status, out, _ = call(capsys, "keys", "add", "--file", file, "--name", "ci", "--scopes", "use,upload")
    key = out.strip()
    assert status == 0
    assert key.startswith("ds-")
    assert key not in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    _, listed, _ = call(capsys, "keys", "list", "--file", file, "--json")
    (record,) = json.loads(listed)
    assert (record["label"], record["scopes"]) == ("ci", ["use", "upload"])
    assert key not in listed
    status, _, _ = call(capsys, "keys", "revoke", record["id"], "--file", file)
    assert status == 0
    assert json.loads(call(capsys, "keys", "list", "--file", file, "--json")[1]) == []


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["serve", "--host", "0.0.0.0"], "deltaserve keys add"),
        (["serve", "--dtype", "int8"], "float32, bfloat16, float16"),
        (["serve", "--operators", "magic"], "auto, reference, cpu, triton"),
        (["serve", "--conversion-rank", "2000"], "between 1 and 1024"),
        (["serve", "--conversion-error", "-0.1"], "between 0 and 1"),
        (["serve", "--conversion-flops", "0"], "--conversion-flops is 0.0"),
        (["serve", "--load-format", "gguf"], "auto or dummy"),
        (["serve", "--kv-cache-bytes", "lots"], "512MB"),
        (["serve", "--max-num-seqs", "0"], "at least 1"),
        (["serve", "--request-timeout", "nan"], "--request-timeout is nan"),
        (["serve", "--chat-template", "plain=binary"], "not UTF-8"),
        (["adapters", "import", "no-such-folder", "--store", "documents"], "not a folder"),
        (["serve", "--drain-seconds", "inf"], "at least 0"),
        (["adapters", "list", "--store", "documents"], "no store here yet"),
        (["adapters", "show", "x", "--store", "file"], "no store here yet"),
        (["store", "gc", "--store", "documents"], "no store here yet"),
        (["serve", "--port", "0", "--store", "file"], "File exists: file"),
        (["keys", "add", "--file", "file/keys.json"], "file"),
        (["serve", "--chat-template", "plain"], "NAME=FILE"),
        (["serve", "--api-keys", "no-such-file.json"], "does not exist"),
        (["serve", "--port", "0", "--model", "no-such-folder"], "no-such-folder"),
        (["keys", "add", "--scopes", "root"], "admin, upload, use"),
        (["train", "--data", "x.jsonl", "--name", "../x"], "not a valid name"),
        (["train", "--data", "x.jsonl", "--name", "x", "--method", "magic"], "method"),
        (["train", "--data", "x.jsonl", "--name", "x", "--set", "lora.rnak=4"], "rnak"),
        (["train", "--data", "no-such.jsonl", "--name", "x"], "no-such.jsonl"),
        (["evaluate", "--adapter", "no-such-folder", "--data", "x.jsonl"], "not a folder"),
        (["adapters", "add", "nothing-here", "--name", "x", "--server", "http://127.0.0.1:9"], "nothing-here"),
        (["adapters", "list", "--server", "127.0.0.1:9"], "http://HOST:PORT"),
        (["adapters", "list", "--server", "http://127.0.0.1:port"], "http://HOST:PORT"),
    ],
)
def test_what_cannot_work_is_one_line_that_says_what_to_do(
    arguments: list[str],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "documents").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    status, _, error = call(capsys, *arguments)
    assert status == 1
    assert not list((tmp_path / "documents").iterdir()), "asking about a folder leaves nothing in it"
    assert told in error
    assert "Traceback" not in error
    assert not any(path.name != "runs" for path in tmp_path.iterdir() if "store" in path.name)


@pytest.mark.parametrize(
    ("text", "size"), [("1", 1), ("512MB", 512 << 20), ("2GiB", 2 << 30), ("1.5 kb", 1536), ("3t", 3 << 40)]
)
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "MB", "-1MB", "0", "nan", "inf", "1e400", "12 parsecs"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_bytes(text)


def test_only_loopback_needs_no_keys() -> None:
    for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost"):
        assert ServeConfig(host=host).is_loopback
    for host in ("0.0.0.0", "::", "example.org", "10.1.2.3"):
        with pytest.raises(ConfigError, match="keys add"):
            ServeConfig(host=host)


def every_command() -> list[list[str]]:
    found = []
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        found.append([name])
        found += [[name, inner] for inner in getattr(command, "commands", {})]
    return found


@pytest.mark.parametrize("command", every_command(), ids=" ".join)
def test_help_fits_a_screen(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = call(capsys, *command, "--help")
    assert status == 0
    assert len(out.splitlines()) <= 60
    assert max(map(len, out.splitlines())) <= 100


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom deltaserve.cli import main\n"
        "try:\n    main(['serve', '--help'])\nexcept SystemExit:\n    pass\n"
        "print([m for m in ('torch', 'transformers', 'fastapi', 'peft') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_server_needs_no_training_packages() -> None:
    code = (
        "import sys\n"
        "for name in ('peft', 'accelerate', 'datasets', 'matplotlib', 'trl', 'aiohttp'):\n"
        "    sys.modules[name] = None\n"
        "import deltaserve.cli.server_process\n"
        "print('imported')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["imported"], done.stderr


def test_every_group_is_walked() -> None:
    """``every_command`` walks these; an empty walk would test nothing."""
    assert len(every_command()) >= 15
    assert ["adapters", "import"] in every_command()
