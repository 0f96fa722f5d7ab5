"""transformers' own common model tests on our four models; what is left out stands in tests/common_model_cases.py."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import transformers

STUBS = {  # test modules that the source distribution lacks, and which a model without generation does not need
    "exporters": ("test_export", "ExportTesterMixin"),
    "generation": ("test_utils", "GenerationTesterMixin"),
}


def pip(*arguments: str) -> None:
    """Runs pip without dependencies; a test without a package index is skipped."""
    command = [sys.executable, "-m", "pip", *arguments, "--disable-pip-version-check", "--quiet", "--no-deps"]
    result = subprocess.run([*command, "--retries", "1"], capture_output=True, text=True)
    if result.returncode:
        pytest.skip(f"the package index cannot be reached: {result.stderr.strip().splitlines()[-1]}")


def install(package: str, folder: Path) -> None:
    """A package into a folder of its own."""
    pip("install", package, "--target", str(folder))


@pytest.mark.slow
def test_common_model_tests_of_transformers(tmp_path):
    version = f"transformers=={transformers.__version__}"
    pip("download", version, "--no-binary", ":all:", "--dest", str(tmp_path))
    install("parameterized", tmp_path / "site")  # which its tests import
    root = f"transformers-{transformers.__version__}"
    with tarfile.open(tmp_path / f"{root}.tar.gz") as archive:
        archive.extract(f"{root}/tests/test_modeling_common.py", tmp_path, filter="data")
    tests = tmp_path / root / "tests"
    (tests / "__init__.py").touch()
    for package, (module, mixin) in STUBS.items():
        (tests / package).mkdir()
        (tests / package / "__init__.py").touch()
        (tests / package / f"{module}.py").write_text(f"class {mixin}:\n    pass\n")
    shutil.copy(Path(__file__).with_name("common_model_cases.py"), tests / "test_cases.py")
    variables = {"PYTHONPATH": str(tmp_path / "site"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", str(tests / "test_cases.py")],
        capture_output=True,
        text=True,
        cwd=tmp_path / root,
        env=os.environ | variables,
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    passed = int(re.search(r"(\d+) passed", result.stdout)[1])
    assert passed > 260, result.stdout[-2000:]
    left_out = [line for line in result.stdout.splitlines() if "LEFT OUT: " in line]
    assert sum(int(re.match(r"SKIPPED \[(\d+)\]", line)[1]) for line in left_out) == 4 * 3 + 3, left_out
