"""Compare a wheel with the tree: every file of the installed packages must be in it.

    python .ci/check_wheel.py dist/chopgrad_align-0.1.0-py3-none-any.whl

A subpackage or a kind of file that pyproject.toml does not list would be missing from the wheel only: an editable
install, in which the tests run, reads the tree itself.
"""

import sys
from pathlib import Path
from zipfile import ZipFile

ROOT = Path(__file__).parents[1]
PACKAGES = {"chopgrad_align": "chopgrad_align", "configs": "chopgrad_configs", "rewards": "chopgrad_rewards"}


def main(wheel: str) -> None:
    with ZipFile(wheel) as archive:
        sizes = {item.filename: item.file_size for item in archive.infolist()}
    expected = {
        f"{package}/{path.relative_to(ROOT / folder).as_posix()}": path.stat().st_size
        for folder, package in PACKAGES.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    wrong = sorted(name for name, size in expected.items() if sizes.get(name) != size)
    if wrong:
        sys.exit(f"not in {wheel}, or another file there (see [tool.setuptools] in pyproject.toml): {', '.join(wrong)}")
    print(f"{len(expected)} files, {Path(wheel).stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main(sys.argv[1])
