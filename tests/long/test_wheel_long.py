"""A wheel in another project's environment: commands run from a folder with packages of the same names, and recipes are found."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAMESAKES = ("data", "model", "tools", "trainer")


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install a wheel of the tree into a new environment, which takes third-party packages from this one; return its bin folder."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    tracked = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in tracked.stdout.splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    wheel = [sys.executable, "-m", "pip", "wheel", "-q", str(source), "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run(wheel, check=True)
    venv.create(folder / "env", with_pip=False, symlinks=True)
    (site,) = (folder / "env" / "lib").glob("python*/site-packages")
    # A .pth inside a folder that a .pth names is not read: the editable install of this tree stays out.
    (site / "third_party.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (built,) = folder.glob("*.whl")
    into = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(folder / "env"),
        "install",
        "-q",
        "--no-deps",
        "--ignore-installed",
        str(built),
    ]
    subprocess.run(into, check=True)
    return folder / "env" / "bin"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Return a folder that holds modules and packages of our names, each of which fails when it is imported."""
    for name in NAMESAKES:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('the namesake was imported')\n")
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('the namesake was imported')\n")
    return tmp_path


def run(command: Path, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run([str(command), *arguments], cwd=folder, env=offline, capture_output=True, text=True, timeout=120)


@pytest.mark.long
def test_every_command_starts_in_a_folder_with_namesakes(commands: Path, project: Path) -> None:
    names = sorted(path.name for path in commands.glob("mmt-*"))
    assert {"mmt-train", "mmt-check", "mmt-export"} <= {*names}
    for name in names:
        done = run(commands / name, "--help", folder=project)
        assert done.returncode == 0 and "usage:" in done.stdout, (name, done.stderr)


@pytest.mark.long
def test_recipes_are_found_by_name(commands: Path, project: Path) -> None:
    done = run(commands / "mmt-train", "--cfg", "recipe:llava15_lora", "output_dir=run", folder=project)
    assert done.returncode == 2, done.stderr
    assert "openai/clip-vit-large-patch14-336" in done.stderr, done.stderr
    missing = run(commands / "mmt-train", "--cfg", "recipe:llava", folder=project)
    names = ", ".join(sorted(file.stem for file in (ROOT / "recipes").glob("*.toml")))
    assert missing.returncode == 2 and f"no such recipe; there are {names}\n" in missing.stderr
