"""Choosing scaling coefficients on validation data."""

from collections.abc import Iterator, Mapping

import pandas as pd
import psutil
from tqdm.auto import tqdm


def search_scaling(score, methods, grid, extensions=6):
    """Validation accuracy of every method over scaling coefficients, one tidy row each.

    score(method, scaling_coefficient) -> per cent. A method's grid grows until two values above its
    best have done worse, so that a dip does not end the search, and one below; `extensions` times
    at most, times 1.5 upwards or times 0.5 downwards. A merge that only does harm is best at 0, the
    base model.
    """
    tables = []
    for method in tqdm(methods, desc="scaling coefficients", leave=False):
        pending, rows = sorted(grid), []
        for _ in range(extensions + 1):
            rows += [(method, value, score(method, value)) for value in pending]
            table = pd.DataFrame(rows, columns=["method", "scaling_coefficient", "accuracy"])
            tried, best = sorted(table["scaling_coefficient"]), best_scaling(table)[method]
            pending = [round(1.5 * tried[-1], 4)] if best in tried[-2:] else []
            pending += [round(0.5 * best, 4)] if best == tried[0] else []
            if not pending:
                break
        tables.append(table)
    table = pd.concat(tables)
    return table.sort_values(["method", "scaling_coefficient"], ignore_index=True)


def best_scaling(table):
    """Method -> scaling coefficient with the best validation accuracy (the smaller of equals)."""
    ordered = table.sort_values(["accuracy", "scaling_coefficient"], ascending=[False, True])
    return ordered.groupby("method")["scaling_coefficient"].first().to_dict()


class MergedTaskVectors(Mapping):
    """Variant -> merged task vector (name -> tensor), computed when it is asked for.

    merge: variant -> merged task vector; variants: their names, to which others may be added.
    Results are kept while all of them take less than `share` of the memory that was free; beyond
    that the oldest goes, and is computed again when it is asked for. A merged task vector takes 4
    bytes a parameter: 28 GB for 7B parameters.
    """

    def __init__(self, merge, variants, share=0.4):
        self.merge, self.variants = merge, variants
        self.limit = share * psutil.virtual_memory().available
        self.kept = {}

    def __getitem__(self, variant):
        if variant not in self.variants:
            raise KeyError(variant)
        if variant not in self.kept:
            size = sum(self._bytes(kept) for kept in self.kept.values())
            while self.kept and size + self._bytes(next(reversed(self.kept.values()))) > self.limit:
                size -= self._bytes(self.kept.pop(next(iter(self.kept))))
            self.kept[variant] = self.merge(variant)
        return self.kept[variant]

    def __iter__(self) -> Iterator[str]:
        return iter(self.variants)

    def __len__(self):
        return len(self.variants)

    @staticmethod
    def _bytes(merged):
        return sum(tensor.nbytes for tensor in merged.values())
