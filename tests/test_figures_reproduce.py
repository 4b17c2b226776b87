"""What the notebooks write equals what is committed, number for number.

`make test` and `make test-slow` run it once more after the notebooks, which write into figures/.
"""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NUMBERS = (":(glob)figures/**/*.csv", ":(glob)figures/**/*.md")


def git(root: Path, *arguments: str) -> str:
    try:
        run = subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"git cannot tell what is committed: {error}")
    return run.stdout.decode()


def differences(root: Path) -> str:
    """Lines of tables that differ from the last commit's, tables that are gone, and new ones.

    In the folders that are committed: a study of one's own may have another beside them.
    """
    changed = git(
        root, "diff", "HEAD", "--no-color", "--no-ext-diff", "--unified=0", "--", *NUMBERS
    )
    ours = {Path(name).parent for name in git(root, "ls-files", "--", *NUMBERS).splitlines()}
    others = git(root, "ls-files", "--others", "--exclude-standard", "--", *NUMBERS).splitlines()
    new = [name for name in others if Path(name).parent in ours]
    return changed + "".join(f"not committed: {name}\n" for name in new)


def test_tables_are_those_that_are_committed():
    assert git(ROOT, "ls-files", "--", *NUMBERS).count("\n") > 100
    assert differences(ROOT) == ""


def test_every_difference_is_seen(tmp_path):
    folder = tmp_path / "figures" / "study"
    folder.mkdir(parents=True)
    for name in ("changed.csv", "gone.csv", "same.md", "drawn.svg"):
        (folder / name).write_text("method,Avg\nties,51.25\n")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    author = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    git(tmp_path, *author, "commit", "--no-verify", "-qm", "Add figures")
    assert differences(tmp_path) == ""

    (folder / "changed.csv").write_text("method,Avg\nties,51.26\n")
    (folder / "gone.csv").unlink()
    (folder / "new.md").write_text("| method |\n")
    (folder / "drawn.svg").write_text("<svg/>")
    (tmp_path / "figures" / "own").mkdir()
    (tmp_path / "figures" / "own" / "mine.csv").write_text("1")
    git(tmp_path, "add", "figures/study/changed.csv")  # staged is not committed either
    found = differences(tmp_path)
    assert "-ties,51.25\n+ties,51.26\n" in found and "deleted file" in found
    assert "not committed: figures/study/new.md" in found
    assert "same.md" not in found and "drawn" not in found and "mine" not in found
