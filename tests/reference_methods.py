"""Slow, obvious implementations of the methods beyond the paper's tables: as reference.py."""

import torch
from reference import filled_svd, svd
from torch import Tensor


def resolved(matrix: Tensor, rank: int, scale: float, fill_seed=None):
    """The leading triplets; those below 1e-6 · scale are zeros, or arbitrary ones by a seed."""
    U, S, Vh = svd(matrix, rank)
    known = S > max(1e-6 * scale, 1e-300)
    U, S, Vh = U * known, S * known, Vh * known[:, None]
    if fill_seed is not None:
        left, _, right = filled_svd(U @ torch.diag(S) @ Vh, rank, fill_seed)
        return left, S, right
    return U, S, Vh


def nearest(matrix: Tensor, fill_seed=None) -> Tensor:
    """The nearest orthonormal matrix; without null directions unless asked."""
    if fill_seed is not None:
        U, _, Vh = filled_svd(matrix, min(matrix.shape), fill_seed)
        return U @ Vh
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    known = S > 1e-7 * S.max().clamp(min=1e-300)
    return U[:, known] @ Vh[known]


def iso_cts(task_vectors: Tensor, common_ratio=0.8, size="all", fill=False) -> Tensor:
    experts, rows, columns = task_vectors.shape
    q = min(rows, columns)
    if size == "nonzero":
        q = min(q, sum(int(torch.linalg.matrix_rank(x, rtol=1e-7)) for x in task_vectors))
    own = min(round((q - int(common_ratio * q)) / experts), q // experts)
    common = q - experts * own
    total = task_vectors.sum(0)
    seeds = range(experts + 3) if fill else [None] * (experts + 3)
    shared = resolved(total, common, total.norm(), seeds[experts])
    U, S, Vh = [], [], []
    for seed, task_vector in zip(seeds[:experts], task_vectors, strict=True):
        rest = task_vector - shared[0] @ shared[0].T @ task_vector
        u, s, vh = resolved(rest, own, task_vector.norm(), seed) if own else svd(rest, 0)
        U, S, Vh = [*U, u], [*S, s], [*Vh, vh]
    U, S, Vh = (
        torch.cat([*U, shared[0]], 1),
        torch.cat([*S, shared[1]]),
        torch.cat([*Vh, shared[2]]),
    )
    mean = S.sum() / q
    return mean * nearest(U, seeds[experts + 1]) @ nearest(Vh, seeds[experts + 2])


def dc_merge(task_vectors: Tensor, rank=None, spectrum=None, ramp=5.0, density=1e-3) -> Tensor:
    experts, rows, columns = task_vectors.shape
    most = max(min(rows, columns) // experts, 1) if rank is None else rank
    lefts, rights, smoothed = [], [], []
    for task_vector in task_vectors:
        U, S, Vh = resolved(task_vector, most, task_vector.norm())
        count = int((S > 0).sum())
        U, S, Vh = U[:, :count], S[:count], Vh[:count]
        how = spectrum or ("kept" if count == most else "mean")
        if how == "mean" and count:
            S = torch.full_like(S, (S.sum() / count).item())
        if how == "ramp" and count:
            steps = torch.linspace(min(ramp, (S[0] / S[-1]).item()), 1, count).to(S)
            S = S.sum() * steps / steps.sum()
        lefts, rights = [*lefts, U], [*rights, Vh]
        smoothed.append(U @ torch.diag(S) @ Vh)
    if not any(left.shape[1] for left in lefts):
        return torch.zeros_like(task_vectors[0])
    U, Vh = nearest(torch.cat(lefts, dim=1)), nearest(torch.cat(rights))
    size = U.shape[1]
    kept = []
    for matrix in smoothed:
        M = U.T @ matrix @ Vh.T
        order = M.abs().flatten().sort(descending=True).values
        limit = order[max(1, int(density * size * size)) - 1]
        kept.append(torch.where(M.abs() >= limit * (1 - 1e-6), M, 0))
    merged = torch.zeros(size, size).to(task_vectors)
    owner = [expert for expert, left in enumerate(lefts) for _ in range(left.shape[1])]
    for i in range(size):
        for j in range(size):
            values = [M[i, j].item() for M in kept]
            agreeing = [x for x in values if x * sum(values) > 0]
            if owner[i] == owner[j] and agreeing:
                merged[i, j] = sum(agreeing) / len(agreeing)
    return U @ merged @ Vh


def ssam(task_vectors: Tensor, rank_ratio=None, sequential=False) -> Tensor:
    experts, rows, columns = task_vectors.shape
    smaller = min(rows, columns)
    rank = max(smaller // experts if rank_ratio is None else int(rank_ratio * smaller), 1)

    def projection(squares):
        values, vectors = torch.linalg.eigh(squares)
        vectors = vectors[:, -rank:] * (values[-rank:] > 1e-14 * values[-1])
        return vectors @ vectors.T

    left = projection(sum(x @ x.T for x in task_vectors))
    right = projection(sum(x.T @ x for x in task_vectors))
    if sequential and rows >= columns:
        left = projection(sum(x @ right @ x.T for x in task_vectors))
    elif sequential:
        right = projection(sum(x.T @ left @ x for x in task_vectors))
    return left @ task_vectors.sum(0) @ right


def orthomerge(task_vectors: Tensor, base: Tensor, residual_scale=0.2) -> Tensor:
    """By the paper's formulas on the inputs, with task arithmetic for what is left."""
    own = torch.eye(base.shape[1]).to(base)
    skews = []
    for task_vector in task_vectors:
        U, _, Vh = torch.linalg.svd(base.T @ (base + task_vector))
        R = U @ Vh
        A = torch.linalg.inv(R + own) @ (R - own)
        skews.append((A - A.T) / 2)
    mean = sum(A.norm() for A in skews) / len(skews)
    total = sum(skews)
    A = total * mean / total.norm() if total.norm() > 0 else total
    rotations = [torch.linalg.inv(own - A) @ (own + A) for A in (A, *skews)]
    rest = sum(base + t - base @ R for t, R in zip(task_vectors, rotations[1:], strict=True))
    return base @ rotations[0] - base + residual_scale * rest


def slerp(v0: Tensor, v1: Tensor, t: float) -> Tensor:
    cosine = (v0 * v1).sum() / (v0.norm() * v1.norm())
    if cosine.abs() > 0.9995:
        return (1 - t) * v0 + t * v1
    angle = torch.acos(cosine)
    return (torch.sin((1 - t) * angle) * v0 + torch.sin(t * angle) * v1) / torch.sin(angle)


def model_stock(task_vectors: Tensor) -> Tensor:
    """One t for all entries."""
    count = len(task_vectors)
    rows = task_vectors.flatten(1)
    cosines = [
        (rows[i] @ rows[j]) / (rows[i].norm() * rows[j].norm())
        for i in range(count)
        for j in range(i)
    ]
    cosine = sum(cosines) / len(cosines)
    return count * cosine / (1 + (count - 1) * cosine) * task_vectors.mean(0)


def crumbs(task_vectors: Tensor, density: float, gamma: float) -> Tensor:
    """One entry at a time."""
    kept = torch.zeros_like(task_vectors)
    for row, own in zip(task_vectors.flatten(1), kept.view(len(kept), -1), strict=True):
        size = len(row)
        order = sorted(range(size), key=lambda j, row=row: (-abs(row[j].item()), j))
        outliers = min(int(gamma * size), size - int(density * size))
        for j in order[outliers : outliers + int(density * size)]:
            own[j] = row[j]
    return kept


def sce(task_vectors: Tensor, select_topk=1.0) -> Tensor:
    """One entry at a time."""
    flat = task_vectors.flatten(1).tolist()
    experts, size = len(flat), len(flat[0])
    means = [sum(row[j] for row in flat) / experts for j in range(size)]
    variances = [sum((row[j] - means[j]) ** 2 for row in flat) / experts for j in range(size)]
    count = int(select_topk * sum(v > 0 for v in variances))
    order = sorted(range(size), key=lambda j: (-variances[j], j))
    chosen = set(range(size) if select_topk == 1 else order[:count])
    squares = [sum(row[j] ** 2 for j in chosen) for row in flat]
    total = sum(squares)
    weights = [s / total for s in squares] if total else [1 / experts] * experts
    merged = []
    for j in range(size):
        values = [row[j] if j in chosen else 0.0 for row in flat]
        sign = 1 if sum(values) >= 0 else -1
        own = [(w, x) for w, x in zip(weights, values, strict=True) if x * sign > 0]
        share = sum(w for w, _ in own)
        merged.append(sum(w * x for w, x in own) / share if share else 0.0)
    return torch.tensor(merged, dtype=task_vectors.dtype).view(task_vectors.shape[1:])


def merged_in_bases(products: list[Tensor], U: Tensor, V: Tensor, merge, even=False) -> Tensor:
    """Coordinates of the products in orthonormal bases, merged, and back: `merge` of a stack."""
    merged = merge(torch.stack([U.T @ product @ V for product in products]))
    if even:
        mean = torch.linalg.svdvals(merged).mean()
        merged = mean * nearest(merged)
    return U @ merged @ V.T


def core_space(pairs, merge, even=False) -> Tensor:
    """All B beside each other and all A below each other give the bases, by their SVD."""
    U = torch.linalg.svd(torch.cat([b for b, _ in pairs], dim=1), full_matrices=False)[0]
    Vh = torch.linalg.svd(torch.cat([a for _, a in pairs]), full_matrices=False)[2]
    return merged_in_bases([b @ a for b, a in pairs], U, Vh.T, merge, even)


def compressed_space(pairs, merge, rank: int, even=False) -> Tensor:
    """The largest eigenvectors of Σ τ τᵀ and Σ τᵀ τ are the bases."""
    products = [b @ a for b, a in pairs]
    U = torch.linalg.eigh(sum(x @ x.T for x in products))[1].flip(1)[:, :rank]
    V = torch.linalg.eigh(sum(x.T @ x for x in products))[1].flip(1)[:, :rank]
    return merged_in_bases(products, U, V, merge, even)
