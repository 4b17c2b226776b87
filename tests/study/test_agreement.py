"""The last word of a run: which claims agree with the committed numbers, on made-up tables."""

import subprocess
from pathlib import Path

import pytest

from optmerge_core.study.agreement import agreement, committed, keep

HEADER = "claim,lead,low,high,verdict,why\n"
CLAIMS = (
    HEADER + "a wins,4,2,6,holds,\nb wins,0.5,-1,2,undecided,chance\nat 7B,,,,not testable here,\n"
)


@pytest.fixture
def fresh(tmp_path) -> Path:
    folder = tmp_path / "fresh"
    folder.mkdir()
    (folder / "tablexx_claims.csv").write_text(CLAIMS)
    (folder / "table02_main.csv").write_text("method,Avg\nties,51.25\n")
    return folder


@pytest.fixture
def before() -> dict[str, str]:
    return {"tablexx_claims.csv": CLAIMS, "table02_main.csv": "method,Avg\nties,51.25\n"}


def test_all_agrees(fresh, before):
    assert agreement("mine", fresh, before) == [
        "mine: agrees: a wins: holds (lead 4, committed 4)",
        "mine: agrees: b wins: undecided (lead 0.5, committed 0.5)",
        "mine: agrees: at 7B: not testable here",
        "mine: 3 of 3 claims agree",
        "mine: 2 of 2 tables are the committed ones to the digit",
    ]
    assert agreement("mine", fresh, {}) == []


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("a wins,6.9,2,8,holds,", "agrees: a wins: holds (lead 6.9, committed 4)"),
        ("a wins,7.1,2,8,holds,", "DIFFERS: a wins: holds (lead 7.1, committed 4)"),
        ("a wins,4,-1,6,undecided,",
         "DIFFERS: a wins: undecided, committed holds (lead 4, committed 4)"),
        ("a wins,,,,holds,", "DIFFERS: a wins: holds (a lead on one side only)"),
        ("another,4,2,6,holds,", "DIFFERS: a wins: only committed"),
    ],
)  # fmt: skip
def test_a_claim_that_does_not(fresh, before, row, said):
    (fresh / "tablexx_claims.csv").write_text(CLAIMS.replace("a wins,4,2,6,holds,", row))
    (fresh / "table02_main.csv").write_text("method,Avg\nties,51.26\n")
    lines = agreement("mine", fresh, before)
    assert f"mine: {said}" in lines
    right = "agrees" in said
    assert f"mine: {2 + right} of {3 + ('another' in row)} claims agree" in lines
    assert lines[-1].endswith("0 of 2 tables are the committed ones to the digit, all but "
                              "table02_main.csv, tablexx_claims.csv")  # fmt: skip


def test_tables_that_were_not_written(fresh, before):
    for path in fresh.iterdir():
        path.unlink()
    lines = agreement("mine", fresh, before)
    assert lines.count("mine: DIFFERS: a wins: only committed") == 1
    assert "mine: 0 of 3 claims agree" in lines and "0 of 2 tables" in lines[-1]


def test_a_comparison_has_the_claims_of_its_studies(fresh):
    both = "claim,one: lead,one: verdict\na wins,4,holds\n"
    (fresh / "tablexx_claims.csv").write_text(both)
    lines = agreement("comparison", fresh, {"tablexx_claims.csv": both})
    assert lines == ["comparison: 1 of 1 tables are the committed ones to the digit"]


def figures(root: Path) -> Path:
    folder = root / "figures" / "mine"
    folder.mkdir(parents=True)
    (folder / "tablexx_claims.csv").write_text(CLAIMS)
    (folder / "tablexx_claims.md").write_text("| claim |\n")
    return folder / "tablexx_claims.csv"


def test_without_git_a_copy_is_kept_once(tmp_path):
    table = figures(tmp_path)
    assert committed(tmp_path, "mine") == {}
    keep(tmp_path, "mine")
    table.write_text(HEADER)
    keep(tmp_path, "mine")
    assert committed(tmp_path, "mine") == {"tablexx_claims.csv": CLAIMS}
    keep(tmp_path, "another")
    assert committed(tmp_path, "another") == {} and not (tmp_path / "runs" / "another").exists()


def test_with_git_the_last_commit_counts(tmp_path):
    def git(*arguments):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True, capture_output=True)

    table = figures(tmp_path)
    git("init", "--quiet")
    git("add", ".")
    author = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    git(*author, "commit", "--no-verify", "-qm", "Add tables")
    table.write_text(HEADER)
    git("add", ".")
    keep(tmp_path, "mine")
    assert not (tmp_path / "runs").exists()
    assert committed(tmp_path, "mine") == {"tablexx_claims.csv": CLAIMS}
