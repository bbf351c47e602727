"""Building, caching and doing without the C++ library.

A stand-in compiler, alone on PATH, notes each call and, asked to link, copies the library that this machine has already
built.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from deltaserve_kernels import BackendUnavailable, cpu, paged_attention, select, use_backend
from deltaserve_kernels.cpu import build
from deltatest.kernel_cases import PagedCase

PROBE = """
import logging, sys, torch
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(levelname)s %(message)s")
import deltaserve_kernels as dk
tables = dk.LoraTables(1, 1)
tables.set(0, 0, torch.ones(2, 8), torch.ones(2, 4))
work = dk.build_work_list([((0, 1.0, 1.0),)])
for _ in range(2):
    y = torch.zeros(1, 4)
    dk.lora_linear(y, torch.ones(1, 8), work, tables, [(0, 0, 4)])
print("result", y.tolist(), "backend", dk.select("cpu"))
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder of our own, and a PATH on which there is no compiler."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path / "cache" / "deltaserve"


@pytest.fixture
def real_library() -> Path:
    """The library of this machine; must come before ``cache``, which hides it."""
    if not cpu.is_available():
        pytest.skip(f"no C++ library to copy: {cpu.unavailable_reason()}")
    return build.ensure_built()


def install_compiler(tmp_path: Path, body: str) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    script = f"#!{sys.executable} -I\nimport os, shutil, sys, time\nfrom pathlib import Path\n{body}\n"
    (folder / "g++").write_text(script, encoding="utf-8")
    (folder / "g++").chmod(0o755)


def install_copying_compiler(tmp_path: Path, library: Path) -> None:
    """A ``g++`` that adds each call's source, or ``library``, to the file ``calls``; links by copying ``library``."""
    install_compiler(
        tmp_path,
        f"built = sys.argv[sys.argv.index('-o') + 1]\n"
        f"source = sys.argv[sys.argv.index('-c') + 1] if '-c' in sys.argv else 'library'\n"
        f"open({str(tmp_path / 'calls')!r}, 'a').write(Path(source).name + '\\n')\n"
        f"time.sleep(0.1)\n"
        f"if '-c' in sys.argv: Path(built).write_text(source)\n"
        f"elif any(not Path(given).exists() for given in sys.argv if given.endswith('.o')): sys.exit('no object')\n"
        f"else: shutil.copy({str(library)!r}, built)",
    )


def calls(tmp_path: Path) -> list[str]:
    """What the compiler was asked for, one entry a call."""
    file = tmp_path / "calls"
    return file.read_text().splitlines() if file.exists() else []


def copy_library(library: Path, cache: Path) -> Path:
    cache.mkdir(parents=True, exist_ok=True)
    for path in (library, library.with_suffix(".sha256")):
        shutil.copy(path, cache / path.name)
    return cache / library.name


def probe() -> str:
    """Run an operator in a fresh process, as the library loads once a process; its output."""
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "result [[16.0, 16.0, 16.0, 16.0]]" in done.stdout
    return done.stdout


@pytest.mark.usefixtures("cache")
def test_without_a_compiler_one_notice_and_the_definition_serves():
    text = probe()
    assert text.count("WARNING") == 1
    assert "no C++ compiler on PATH" in text
    assert "backend reference" in text


def test_a_whole_library_is_used_without_a_compiler(real_library, cache):
    copy_library(real_library, cache)
    text = probe()
    assert "WARNING" not in text
    assert "backend cpu" in text


def test_a_failing_compiler_is_quoted(tmp_path, cache):
    install_compiler(tmp_path, "sys.exit('fatal error: no such thing')")
    with pytest.raises(build.BuildFailed, match="fatal error: no such thing"):
        build.ensure_built()
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


@pytest.mark.parametrize("failing", [*build.UNITS, "library"])
def test_any_unit_that_fails_is_quoted_and_leaves_nothing(tmp_path, cache, failing):
    install_compiler(
        tmp_path,
        f"source = sys.argv[sys.argv.index('-c') + 1] if '-c' in sys.argv else 'library'\n"
        f"if Path(source).name == {failing!r}: sys.exit('fatal error in ' + Path(source).name)\n"
        f"Path(sys.argv[sys.argv.index('-o') + 1]).touch()",
    )
    with pytest.raises(build.BuildFailed, match=f"failed with code 1:\nfatal error in {failing}"):
        build.ensure_built()
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


@pytest.mark.parametrize("cores", [1, 2, 64])
def test_compilers_run_side_by_side_and_no_more_than_cores(real_library, tmp_path, cache, monkeypatch, cores):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setattr(build, "CPU_QUOTA", tmp_path / "no quota")
    expected = min(cores, len(build.UNITS))
    (tmp_path / "running").mkdir()
    install_compiler(
        tmp_path,
        f"mine, reached = Path({str(tmp_path / 'running')!r}) / str(os.getpid()), Path({str(tmp_path / 'reached')!r})\n"
        f"mine.touch()\n"
        f"for _ in range(2000):\n"
        f"    if len(list(mine.parent.iterdir())) >= {expected} or reached.exists(): break\n"
        f"    time.sleep(0.01)\n"
        f"reached.touch()\n"
        f"time.sleep(0.3)\n"
        f"open({str(tmp_path / 'calls')!r}, 'a').write(f'{{len(list(mine.parent.iterdir()))}}\\n')\n"
        f"time.sleep(0.1)\n"
        f"mine.unlink()\n"
        f"shutil.copy({str(real_library)!r}, sys.argv[sys.argv.index('-o') + 1])",
    )
    build.ensure_built()
    assert len(calls(tmp_path)) == len(build.UNITS) + 1
    assert max(map(int, calls(tmp_path))) == expected


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("max 100000", 4), ("150000 100000", 1), ("50000 100000", 1), ("300000 100000", 3), ("900000 100000", 4), ("", 4)],
)
def test_a_container_builds_with_its_share_of_the_cores(tmp_path, monkeypatch, quota, cores):
    (tmp_path / "cpu.max").write_text(quota)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 3})
    monkeypatch.setattr(build, "CPU_QUOTA", tmp_path / "cpu.max")
    assert build._cores() == cores


def test_after_a_failure_no_other_unit_is_begun(tmp_path, cache, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})
    install_compiler(tmp_path, f"open({str(tmp_path / 'calls')!r}, 'a').write('call\\n')\nsys.exit('no')")
    with pytest.raises(build.BuildFailed):
        build.ensure_built()
    assert len(calls(tmp_path)) == 1


def test_a_cache_folder_that_cannot_be_written_is_named(real_library, tmp_path, cache):
    install_copying_compiler(tmp_path, real_library)
    cache.parent.write_text("a file where the folder should be")
    with pytest.raises(build.BuildFailed, match="cannot write to the cache folder"):
        build.ensure_built()


def test_a_cache_folder_open_to_everybody_is_refused(real_library, cache):
    copy_library(real_library, cache)
    cache.chmod(0o777)
    with pytest.raises(build.BuildFailed, match="not writable by everybody"):
        build.ensure_built()


def test_the_module_builds_ahead_of_time_or_says_why_not(real_library, cache):
    command = [sys.executable, "-m", "deltaserve_kernels.cpu"]
    failed = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert failed.returncode == 1
    assert "no C++ compiler on PATH" in failed.stderr
    target = copy_library(real_library, cache)
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, str(target))


def test_those_who_start_together_build_once(real_library, tmp_path, cache):
    install_copying_compiler(tmp_path, real_library)
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(lambda _: build.ensure_built(), range(4)))
    assert paths == {cache / real_library.name}
    assert sorted(calls(tmp_path)) == sorted([*build.UNITS, "library"])
    assert calls(tmp_path)[-1] == "library"
    assert sorted(path.suffix for path in cache.iterdir()) == [".lock", ".sha256", ".so"]


@pytest.mark.parametrize("damage", ["truncated", "bit flipped", "no digest"])
def test_a_damaged_library_is_built_again(real_library, tmp_path, cache, damage):
    install_copying_compiler(tmp_path, real_library)
    target = copy_library(real_library, cache)
    good = target.read_bytes()
    build.ensure_built()
    assert calls(tmp_path) == []
    if damage == "truncated":
        target.write_bytes(good[:1000])
    elif damage == "bit flipped":
        target.write_bytes(good[:5000] + bytes([good[5000] ^ 1]) + good[5001:])
    else:
        target.with_suffix(".sha256").unlink()
    assert build.ensure_built() == target
    assert calls(tmp_path).count("library") == 1
    assert target.read_bytes() == good


def test_another_source_means_another_file(monkeypatch, tmp_path):
    before = build.library_path()
    for name in build.SOURCES:
        shutil.copy(build.SOURCE_FOLDER / name, tmp_path / name)
    monkeypatch.setattr(build, "SOURCE_FOLDER", tmp_path)
    assert build.library_path() == before
    for name in ("vec.inc", build.UNITS[-1]):
        with (tmp_path / name).open("a") as file:
            file.write("// changed\n")
        assert build.library_path() != before
        before = build.library_path()


@pytest.mark.parametrize("flags", ["FLAGS", "LINK_FLAGS"])
def test_another_flag_means_another_file(monkeypatch, flags):
    before = build.library_path()
    monkeypatch.setattr(build, flags, (*getattr(build, flags), "-g"))
    assert build.library_path() != before


def test_every_source_is_in_the_key():
    assert set(build.SOURCES) == {
        path.name for path in build.SOURCE_FOLDER.iterdir() if path.suffix in (".cpp", ".inc")
    }


def test_every_unit_is_compiled():
    assert set(build.UNITS) == {path.name for path in build.SOURCE_FOLDER.glob("*.cpp")}


def test_backend_names():
    with pytest.raises(BackendUnavailable, match="allowed: auto, reference, cpu"):
        use_backend("fast")
    with pytest.raises(BackendUnavailable):
        select("meta", "cpu")
    assert select("meta") == "reference"
    previous = use_backend("reference")
    try:
        assert select("cpu") == "reference"
    finally:
        use_backend(previous)


def test_the_gil_is_released_while_an_operator_runs():
    if not cpu.is_available():
        pytest.skip(f"no C++ library: {cpu.unavailable_reason()}")
    torch.set_num_threads(1)
    case = PagedCase([800], [800], 32, 8, 64)
    done = threading.Event()

    def work() -> None:
        paged_attention(*case.args, scale=0.1, backend="cpu")
        done.set()

    interval = sys.getswitchinterval()
    thread = threading.Thread(target=work)
    ticks = 0
    try:
        # With a switch interval this long, the loop below can only advance while the operator holds no GIL.
        sys.setswitchinterval(30)
        thread.start()
        while not done.wait(0.002):
            ticks += 1
    finally:
        sys.setswitchinterval(interval)
        thread.join()
    assert ticks >= 3
