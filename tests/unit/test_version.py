"""The version, and what is left of it where an application is packed without data files."""

import shutil
import subprocess
import sys
from pathlib import Path

import sb3_dqs

PACKAGE = Path(sb3_dqs.__file__).parent


def test_version():
    assert sb3_dqs.__version__ == (PACKAGE / "version.txt").read_text().strip()


def test_import_without_data_files(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "sb3_dqs", ignore=shutil.ignore_patterns("*.txt", "__pycache__"))
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import sb3_dqs; print(sb3_dqs.__file__, sb3_dqs.__version__)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == [str(tmp_path / "sb3_dqs" / "__init__.py"), "unknown"]
