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


def fetch(folder: Path) -> None:
    """transformers' source distribution of the installed version, and the package its tests import, into `folder`."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    for arguments in (
        ["download", f"transformers=={transformers.__version__}", "--no-binary", ":all:", "--dest", str(folder)],
        ["install", "parameterized", "--target", str(folder / "site")],
    ):
        command = [*pip, *arguments, "--quiet", "--no-deps", "--retries", "1"]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            pytest.skip(f"the package index cannot be reached: {result.stderr.strip().splitlines()[-1]}")


@pytest.mark.slow
def test_common_model_tests_of_transformers(tmp_path):
    fetch(tmp_path)
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
