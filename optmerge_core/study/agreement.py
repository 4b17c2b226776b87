"""Does this machine agree with the committed numbers? Claim by claim, at the end of a run.

What is committed is what git's last commit has, or where there is no git, the tables as they were
before the first run. Scores of another processor may differ by a few answers, so a claim agrees if
its verdict is the same and its lead within `POINTS`.
"""

from __future__ import annotations

import csv
import io
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

POINTS = 3.0
"""What other processors may change a lead by, in points: the notebooks' own tolerance."""
CLAIMS = "tablexx_claims.csv"


def keep(root: Path, name: str) -> None:
    """Before a first run without git: a study's tables as they came, to runs/<name>/committed."""
    copies = _copies(root, name)
    if copies.parent.exists() or _in_git(root, name):  # it has run here before
        return
    for path in sorted((root / "figures" / name).glob("*.csv")):
        copies.mkdir(parents=True, exist_ok=True)
        (copies / path.name).write_text(path.read_text(encoding="utf-8"), encoding="utf-8")


def committed(root: Path, name: str) -> dict[str, str]:
    """A study's tables as committed, or as `keep` has kept them: file name -> text."""
    found = {path: git(root, "show", f"HEAD:./{path}") for path in _in_git(root, name)}
    if found:
        return {Path(path).name: text for path, text in found.items() if text is not None}
    copies = _copies(root, name).glob("*.csv")
    return {path.name: path.read_text(encoding="utf-8") for path in sorted(copies)}


def agreement(name: str, fresh: Path, before: Mapping[str, str]) -> list[str]:
    """One line a claim, then one about all tables; none for a study that has nothing committed.

    fresh: the folder that the run has written; before: file name -> text, see `committed`.
    """
    if not before:
        return []
    now = {path.name: path.read_text(encoding="utf-8") for path in fresh.glob("*.csv")}
    found = list(_claims(_rows(before.get(CLAIMS, "")), _rows(now.get(CLAIMS, ""))))
    lines = [f"{name}: {'agrees' if good else 'DIFFERS'}: {text}" for good, text in found]
    if found:
        lines.append(f"{name}: {sum(good for good, _ in found)} of {len(found)} claims agree")
    other = [file for file, text in before.items() if not _same(text, now.get(file))]
    same = f"{len(before) - len(other)} of {len(before)} tables are the committed ones to the digit"
    lines.append(f"{name}: {same}{', all but ' if other else ''}{', '.join(sorted(other))}")
    return lines


def _claims(
    before: Mapping[str, Mapping[str, str]], now: Mapping[str, Mapping[str, str]]
) -> Iterator[tuple[bool, str]]:
    """Of every claim of either table: does it agree, and in words with both numbers."""
    for claim in dict.fromkeys([*before, *now]):
        if claim not in now or claim not in before:
            yield False, f"{claim}: {'only committed' if claim in before else 'not committed'}"
            continue
        old, new = before[claim], now[claim]
        if old["verdict"] != new["verdict"]:
            said = f"{new['verdict']}, committed {old['verdict']}"
        else:
            said = new["verdict"]
        leads = _number(new["lead"]), _number(old["lead"])
        if leads == (None, None):
            yield old["verdict"] == new["verdict"], f"{claim}: {said}"
        elif None in leads:
            yield False, f"{claim}: {said} (a lead on one side only)"
        else:
            near = abs(leads[0] - leads[1]) <= POINTS
            text = f"{claim}: {said} (lead {leads[0]:g}, committed {leads[1]:g})"
            yield near and old["verdict"] == new["verdict"], text


def _rows(text: str) -> dict[str, dict[str, str]]:
    """Claim -> row; none of a table that sets the claims of several studies side by side."""
    rows = csv.DictReader(io.StringIO(text))
    return {row["claim"]: row for row in rows if "verdict" in row}


def _number(cell: str | None) -> float | None:
    return float(cell) if cell else None


def _same(text: str, other: str | None) -> bool:
    return other is not None and text.split() == other.split()


def _copies(root: Path, name: str) -> Path:
    return root / "runs" / name / "committed"


def _in_git(root: Path, name: str) -> list[str]:
    """The study's tables of the last commit, as paths from `root`; none without git."""
    listed = git(root, "ls-tree", "--name-only", "HEAD", f"figures/{name}/") or ""
    return [path for path in listed.splitlines() if path.endswith(".csv")]


def git(root: Path, *arguments: str) -> str | None:
    """What git says, None where there is no git, no repository or no commit."""
    command = ["git", *arguments]
    try:
        done = subprocess.run(command, cwd=root, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.decode()
