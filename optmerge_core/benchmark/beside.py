"""The paper's tables beside ours: what has a counterpart here, row by row.

Models, tasks and questions are others, so averages are not meant to be equal: what can be compared
is order, differences between rows, and shares. Averages are per cent of the questions.
"""

from pathlib import Path

import pandas as pd

from optmerge_core.figures import LABELS, compare, paper_table

TABLES = {
    "table02_full_finetuning": ("table2_internvl25_1b_full_finetuning", "InternVL2.5-Instruct"),
    "table03_lora": ("table3_qwen2vl_7b_lora", "Qwen2-VL-Base"),
}
"""A study's table of scores -> the paper's, and its base model's name there."""
AVERAGE = "Avg"
BASE, OPTMERGE = LABELS["base_model"], LABELS["optmerge"]
MERGES = [name for key, name in LABELS.items() if key not in ("base_model", "mixture")]


def averages(paper, stem):
    """The paper's averages by method, its base model under our name; None where it has none."""
    if stem not in TABLES:
        return None
    name, base = TABLES[stem]
    return paper_table(paper, name)[AVERAGE].rename({base: BASE})


def scores(paper, results):
    """Table 2 or 3: paper, here, difference, and the rank of each among the methods of both."""
    return ranked(averages(paper, results.stem), results.scores[AVERAGE])


def ranked(paper, here):
    """Columns paper, here, difference, rank of paper and of here among merges that both have."""
    table = compare(paper, here).dropna()
    merges = [n for n in MERGES if n in table.index]
    for column in ("paper", "here"):
        table[f"rank, {column}"] = table.loc[merges, column].rank(ascending=False)
    return table


def training(paper, studies):
    """Table 1: samples of each task's training, in the paper and here."""
    table = {"paper": paper_table(paper, "table1_training_data")["samples"]}
    table |= {r.name: r.table("table01_training_data")["samples"] for r in studies}
    return pd.DataFrame(table).loc[table["paper"].index]


def ablation(paper, studies):
    """Table 4: average of each step from WUDI to OptMerge, and how far the step moved τm here."""
    published = paper_table(paper, "table4_ablation")
    table = published.set_axis(["paper, Qwen2-VL", "paper, modalities"], axis=1)
    for r in studies:
        ours = r.table("table04_ablation")
        table[r.name] = ours[AVERAGE]
        table[f"{r.name}: change of τm"] = ours["change of τm"]
    return table


def modalities(paper, omni):
    """Table 5: the average over its data sets, and over our kinds of questions."""
    published = paper_table(paper, "table5_modality_merging").loc[AVERAGE]
    return ranked(published, omni.scores[AVERAGE])


def makers(paper, comparison):
    """Table 6: experts by different makers; comparison: the folder with notebook 06's tables."""
    ours = pd.read_csv(Path(comparison, "table06_different_makers.csv"), index_col=0)
    published = paper_table(paper, "table6_huggingface_checkpoints")
    return ranked(published[AVERAGE], ours[AVERAGE])


def cost(paper, studies):
    """Table 7: hours and memory (GB) of merging and of mixture training, and merging's share."""
    published = paper_table(paper, "table7_cost")[["solving_time_hours", "gpu_memory_gb"]]
    rows = {f"paper: {setting}": row for setting, row in published.iterrows()}
    for r in studies:
        for setting, row in r.table("table07_cost").iterrows():
            hours = {"solving_time_hours": row["seconds"] / 3600}
            rows[f"{r.name}: {setting}"] = hours | {"gpu_memory_gb": row["peak memory (GB)"]}
    table = pd.DataFrame(rows).T.astype(float).set_axis(["hours", "memory (GB)"], axis=1)
    merges, trainings = table.iloc[::2], table.iloc[1::2]
    table.loc[merges.index, "% of the time"] = 100 * (merges["hours"] / trainings["hours"].values)
    return table


def rank_ratios(paper, studies):
    """Table 8: what each rank ratio costs against the best one, in points."""
    table = {"paper": paper_table(paper, "table8_rank_ratio_internvl25_1b")[AVERAGE]}
    table |= {r.name: r.table("table08_rank_ratio")[AVERAGE] for r in studies}
    table = pd.DataFrame(table)
    return table - table.max()


def scale(paper, studies):
    """Table 9: base, best single expert and OptMerge, and its leads over the two."""
    published = {"paper, 32B": paper_table(paper, "table9_qwen25vl_32b")[AVERAGE]}
    rows = {}
    for name, scores in (published | {r.name: r.scores[AVERAGE] for r in studies}).items():
        best = scores[[n for n in scores.index if n.startswith("Individual ")]].max()
        rows[name] = {BASE: scores.iloc[0], "best expert": best, OPTMERGE: scores[OPTMERGE]}
    table = pd.DataFrame(rows).T
    for other in (BASE, "best expert"):
        table[f"lead over the {other.lower()}"] = table[OPTMERGE] - table[other]
    return table


def two_abilities(paper, studies):
    """Table 10: the average over its benchmarks, and over our pairs of abilities."""
    table = {"paper": paper_table(paper, "table10_general_tasks").mean(axis=1)}
    table |= {r.name: r.table("table10_two_abilities")[AVERAGE] for r in studies}
    return pd.DataFrame(table).loc[table["paper"].index]
