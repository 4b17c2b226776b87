"""The words of a run's page: the finding from made-up tables, a sentence for every figure."""

from pathlib import Path

from optmerge_core.study.report_text import SENTENCES, findings

ROOT = Path(__file__).resolve().parents[2]


def test_the_finding_by_hand(tmp_path):
    (tmp_path / "table02_full_finetuning.csv").write_text(
        "method,OCR,VQA,Avg\nBase model,30,50,40\n"
        "Individual OCR,90,40,65\nIndividual VQA,20,70,45\n"
        "Weight Average,40,50,45\nOptMerge,60,60,60\nMixture Training,80,80,80\n"
    )
    (tmp_path / "tablexx_claims.csv").write_text("claim,verdict\nb,undecided\na,holds\nc,holds\n")
    assert findings(tmp_path) == [
        "Best merge: OptMerge, 60.0 % of the test questions; the base model 40.0 %, "
        "the experts, each on its own task, 80.0 %, mixture training 80.0 %.",
        "Holds (2 of the paper's 3 claims): a; c.",
        "Undecided (1 of the paper's 3 claims): b.",
    ]


def test_modalities_and_a_study_without_tables(tmp_path):
    assert findings(tmp_path) == []
    (tmp_path / "tablexx_claims.csv").write_text("claim,one: verdict\na,holds\n")
    assert findings(tmp_path) == []
    (tmp_path / "table05_modalities.csv").write_text(
        "model,Avg\nVision,70\nIso-C,60\nBase model,55\n"
    )
    assert findings(tmp_path) == [
        "Best merge: Iso-C, 60.0 % of the test questions; the base model 55.0 %."
    ]


def test_every_figure_has_its_sentence():
    stems = {path.stem for path in (ROOT / "figures").glob("*/*.png")}
    assert stems == set(SENTENCES)
    assert all(sentence.endswith(".") and len(sentence) < 90 for sentence in SENTENCES.values())
