"""What is published: the wheel holds all that is needed and nothing else, the sdist builds it."""

from __future__ import annotations

import email
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path, PurePosixPath

import pytest

pytestmark = pytest.mark.once

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "tl_contextmix"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> zipfile.ZipFile:
    return zipfile.ZipFile(next(built.glob("*.whl")))


def test_the_wheel_holds_every_file_of_the_package(wheel: zipfile.ZipFile) -> None:
    found = {name for name in wheel.namelist() if ".dist-info/" not in name}
    sources = {
        path.relative_to(ROOT).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert found == sources
    # What trains and scores the models is not needed where they are used.
    models = {PurePosixPath(name).name for name in found if "/demo_models/" in name}
    assert not models & {path.name for path in (ROOT / "scripts").rglob("*.py")}
    for name in found:
        assert wheel.read(name) == (ROOT / name).read_bytes()
    assert "tl_contextmix/py.typed" in found
    models = [name for name in found if name.endswith("model.safetensors")]
    assert len(models) == 3
    for model in models:
        card = str(PurePosixPath(model).with_name("MODEL_CARD.md"))
        assert "Same licence as the package" in wheel.read(card).decode()


def metadata(wheel: zipfile.ZipFile, name: str) -> str:
    found = next(n for n in wheel.namelist() if n.endswith(f".dist-info/{name}"))
    return wheel.read(found).decode()


def test_the_metadata(wheel: zipfile.ZipFile) -> None:
    found = email.message_from_string(metadata(wheel, "METADATA"))
    assert found["License-Expression"] == "MIT"
    assert found["License-File"] == "LICENSE"
    assert metadata(wheel, "licenses/LICENSE") == (ROOT / "LICENSE").read_text()
    assert found["Requires-Python"] == ">=3.10"
    classifiers = found.get_all("Classifier") or []
    assert "Typing :: Typed" in classifiers
    assert "Programming Language :: Python :: 3.11" in classifiers
    # A licence classifier beside a licence expression is refused by package indexes.
    assert not [name for name in classifiers if name.startswith("License ::")]
    body = found.get_payload()
    assert isinstance(body, str)
    assert (ROOT / "README.md").read_text().strip() == body.strip()
    scripts = metadata(wheel, "entry_points.txt")
    assert "tl-contextmix = tl_contextmix.__main__:main" in scripts


def test_the_sdist_holds_what_builds_and_tests_it(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        found = {name.partition("/")[2] for name in archive.getnames()}
    for name in ("CITATION.cff", "CONTRIBUTING.md", "LICENSE", "README.md", "pyproject.toml"):
        assert name in found
    for folder in ("tests", "scripts"):
        assert {p.relative_to(ROOT).as_posix() for p in (ROOT / folder).rglob("*.py")} <= found
    assert not [name for name in found if name.startswith((".ci", "benchmarks/"))]


def test_the_citation_names_this_version(wheel: zipfile.ZipFile) -> None:
    citation = (ROOT / "CITATION.cff").read_text()
    version = email.message_from_string(metadata(wheel, "METADATA"))["Version"]
    assert f"\nversion: {version}\n" in citation
    assert "license: MIT" in citation
