"""Slow, obvious implementations of the published algorithms, for the tests to compare with.

Written from the papers and the description of their released code: loops over experts, full
SVDs, autograd and torch.optim. Nothing here uses the package.
"""

import math

import torch
from torch import Tensor


def interference_loss(tau: Tensor, task_vectors, targets, subspaces) -> Tensor:
    """Eq. 1 and 3: Σi ‖(τ − Ti) Liᵀ‖²F / ‖τi‖²F, a zero task vector counting for nothing."""
    loss = 0.0 * tau.sum()
    for task_vector, target, subspace in zip(task_vectors, targets, subspaces, strict=True):
        energy = task_vector.square().sum()
        if energy > 0:
            loss = loss + ((tau - target) @ subspace.T).square().sum() / energy
    return loss


def descend(task_vectors, targets, subspaces, start, optimizer, learning_rate, momentum, steps):
    """The merged task vector after the steps, and (step, loss, norm) before and along them."""
    tau = start.clone().requires_grad_()
    if optimizer == "adam":
        descent = torch.optim.Adam([tau], lr=learning_rate)
    else:
        descent = torch.optim.SGD([tau], lr=learning_rate, momentum=momentum)
    trace = []
    for step in range(steps + 1):
        loss = interference_loss(tau, task_vectors, targets, subspaces)
        trace.append((step, loss.item(), tau.detach().norm().item()))
        if step < steps:
            descent.zero_grad()
            loss.backward()
            descent.step()
    return tau.detach(), trace


def svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U[:, :rank], S[:rank], Vh[:rank]


def wudi(task_vectors, learning_rate=1e-5, optimizer="adam", momentum=0.9, steps=300, init="sum"):
    start = task_vectors.sum(0) if init == "sum" else task_vectors.mean(0)
    return descend(
        task_vectors, task_vectors, task_vectors, start, optimizer, learning_rate, momentum, steps
    )


def leading(S: Tensor, Vh: Tensor, rows: int) -> Tensor:
    """ΣV of the leading directions, below them zeros up to `rows` (0: none)."""
    return torch.nn.functional.pad(torch.diag(S) @ Vh, (0, 0, 0, max(rows - len(S), 0)))


def optmerge_full(task_vectors, learning_rate=1e-5, steps=300, paper=False, pad=False):
    """Centred targets; the subspace of the uncentred SVD (released code) or the centred (paper).

    pad: multiply with all m rows of ΣV, most of them 0, as the released code does.
    """
    experts, rows, columns = task_vectors.shape
    rank = max(min(rows, columns) // experts, 1)
    mean = task_vectors.mean(0)
    targets, subspaces = [], []
    for task_vector in task_vectors:
        U, S, Vh = svd(task_vector - mean, rank)
        targets.append(U @ torch.diag(S) @ Vh + mean)
        if not paper:
            _, S, Vh = svd(task_vector, rank)
        subspaces.append(leading(S, Vh, rows if pad else 0))
    start = task_vectors.sum(0)
    return descend(task_vectors, targets, subspaces, start, "adam", learning_rate, 0.0, steps)


def optmerge_lora(task_vectors, learning_rate=1e-4, steps=300, pad=False):
    experts, rows, columns = task_vectors.shape
    rank = max(min(rows, columns) // experts, 1)
    targets, subspaces = [], []
    for task_vector in task_vectors:
        U, S, Vh = svd(task_vector, rank)
        targets.append(U @ torch.diag(S) @ Vh)
        subspaces.append(leading(S, Vh, rows if pad else 0))
    start = task_vectors.mean(0)
    return descend(task_vectors, targets, subspaces, start, "sgd", learning_rate, 0.9, steps)


def optmerge_modality(task_vectors, learning_rate=5e-2, steps=300):
    rank = max(min(task_vectors.shape[1:]) // 5, 1)
    targets = []
    for task_vector in task_vectors:
        U, S, Vh = svd(task_vector, rank)
        targets.append(U @ torch.diag(S) @ Vh)
    start = task_vectors.mean(0)
    return descend(task_vectors, targets, task_vectors, start, "sgd", learning_rate, 0.9, steps)


def _quadratic_form(task_vectors: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    columns = task_vectors.shape[2]
    C, D = torch.zeros(columns, columns).to(task_vectors), torch.zeros_like(task_vectors[0])
    for task_vector in task_vectors:
        energy = task_vector.square().sum()
        if energy > 0:
            C += task_vector.T @ task_vector / energy
            D += task_vector @ task_vector.T @ task_vector / energy
    eigenvalues, V = torch.linalg.eigh(C)
    return D, eigenvalues.clamp(min=1e-8), V, task_vectors.sum(0)


def ridge(task_vectors: Tensor, shrink=0.1, init="sum") -> Tensor:
    """argmin of WUDI's loss + μ‖τ − start‖²F, solved row by row as one least-squares problem."""
    columns = task_vectors.shape[2]
    start = task_vectors.sum(0) if init == "sum" else task_vectors.mean(0)
    weights = [t.norm() if t.norm() > 0 else torch.ones(()).to(t) for t in task_vectors]
    root = (shrink * sum((t.norm() > 0).item() for t in task_vectors) / columns) ** 0.5
    inputs = [t / w for t, w in zip(task_vectors, weights, strict=True)]
    A = torch.cat([*inputs, root * torch.eye(columns).to(start)])
    outputs = [x @ t.T for x, t in zip(inputs, task_vectors, strict=True)]
    B = torch.cat([*outputs, root * start.T])
    return torch.linalg.lstsq(A, B, driver="gelsd").solution.T


def swudi(task_vectors: Tensor, exp_time=300.0, rank_ratio=0.65) -> Tensor:
    D, eigenvalues, V, S = _quadratic_form(task_vectors)
    columns = len(eigenvalues)
    merged = S.clone()
    for j in range(columns - int(-(-rank_ratio * columns // 1)), columns):
        f = 1 - torch.exp(-exp_time * eigenvalues[j])
        v = V[:, j]
        merged += torch.outer(D @ v * f / eigenvalues[j] - S @ v * f, v)
    return merged


def aswudi(task_vectors: Tensor) -> Tensor:
    D, eigenvalues, V, S = _quadratic_form(task_vectors)
    columns = len(eigenvalues)
    leading = int(torch.ceil(eigenvalues.sqrt().sum() ** 2 / eigenvalues.sum()))
    merged = S.clone()
    for j in range(max(columns - leading, 0), columns):
        v = V[:, j]
        merged += torch.outer(D @ v / eigenvalues[j] - S @ v, v)
    return merged


def ties(task_vectors: Tensor, density: float = 0.2) -> Tensor:
    """One entry at a time."""
    experts = len(task_vectors)
    flat = task_vectors.reshape(experts, -1).tolist()
    size = len(flat[0])
    k = int((1 - density) * size)
    trimmed = []
    for expert in flat:
        threshold = sorted(map(abs, expert))[k - 1] if k else 0.0
        trimmed.append([x if abs(x) >= threshold else 0.0 for x in expert])
    sums = [sum(expert[j] for expert in trimmed) for j in range(size)]
    balance = sum((total > 0) - (total < 0) for total in sums)
    merged = []
    for j in range(size):
        direction = sums[j] or balance
        values = [expert[j] for expert in trimmed if expert[j] * direction > 0]
        merged.append(sum(values) / len(values) if values else 0.0)
    return torch.tensor(merged, dtype=task_vectors.dtype).view(task_vectors.shape[1:])


def ties_by_count(task_vectors: Tensor, densities, weights=None, normalize=True) -> Tensor:
    """mergekit's TIES, one entry at a time: of equal magnitudes the first in memory are kept."""
    experts = len(task_vectors)
    flat = task_vectors.reshape(experts, -1).tolist()
    size, weights = len(flat[0]), weights or [1.0] * experts
    trimmed = []
    for expert, density, weight in zip(flat, densities, weights, strict=True):
        order = sorted(range(size), key=lambda j, expert=expert: (-abs(expert[j]), j))
        kept = set(order[: max(1, int(density * size))])
        trimmed.append([weight * x if j in kept else 0.0 for j, x in enumerate(expert)])
    merged = []
    for j in range(size):
        values = [(weight, expert[j]) for weight, expert in zip(weights, trimmed, strict=True)]
        direction = 1 if sum(x for _, x in values) >= 0 else -1
        agreeing = [(weight, x) for weight, x in values if x * direction > 0]
        share = sum(weight for weight, _ in agreeing) if normalize else 1
        merged.append(sum(x for _, x in agreeing) / (share or 1))
    return torch.tensor(merged, dtype=task_vectors.dtype).view(task_vectors.shape[1:])


def complete(basis: Tensor, count: int, seed: int) -> Tensor:
    """The columns, and orthonormal ones up to `count`: Gram-Schmidt of Gaussian ones, twice."""
    generator = torch.Generator().manual_seed(seed)
    missing = count - basis.shape[1]
    drawn = torch.randn(len(basis), missing, generator=generator, dtype=torch.float64)
    columns = list(basis.T)
    for column in drawn.T:
        for other in 2 * columns:
            column = column - (other @ column) * other
        columns.append(column / column.norm())
    return torch.stack(columns, dim=1)


def filled_svd(matrix: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """An SVD whose null directions are those of `complete`, instead of LAPACK's."""
    U, S, Vh = svd(matrix, rank)
    known = int((S > 1e-7 * torch.linalg.matrix_norm(matrix, 2)).sum())
    left = complete(U[:, :known], len(S), 2 * seed)
    right = complete(Vh[:known].T, len(S), 2 * seed + 1)
    return left, S * (torch.arange(len(S)) < known), right.T


def tsv(task_vectors: Tensor, fill: bool = False) -> Tensor:
    """fill: the null directions of every SVD are those of `filled_svd`."""
    experts, rows, columns = task_vectors.shape
    rank = max(min(rows, columns) // experts, 1)

    def decomposed(matrix, rank, seed):
        return filled_svd(matrix, rank, seed) if fill else svd(matrix, rank)

    parts = [decomposed(matrix, rank, seed) for seed, matrix in enumerate(task_vectors)]
    U = torch.cat([U for U, _, _ in parts], dim=1)
    S = torch.cat([S for _, S, _ in parts])
    Vh = torch.cat([Vh for _, _, Vh in parts], dim=0)
    P_U, _, Q_U = decomposed(U, min(U.shape), experts)
    P_V, _, Q_V = decomposed(Vh, min(Vh.shape), experts + 1)
    return P_U @ Q_U @ torch.diag(S) @ P_V @ Q_V


def iso_c(task_vectors: Tensor, fill: bool = False) -> Tensor:
    total = task_vectors.sum(0)
    U, S, Vh = filled_svd(total, min(total.shape), 0) if fill else svd(total, min(total.shape))
    return U @ torch.diag(torch.full_like(S, S.mean().item())) @ Vh


def svc(merged: Tensor, task_vectors: Tensor, alpha: float) -> Tensor:
    """One direction and one expert at a time."""
    U, S, Vh = torch.linalg.svd(merged, full_matrices=False)
    result = torch.zeros_like(merged)
    for u, sigma, v in zip(U.T, S, Vh, strict=True):
        counts = []
        for task_vector in task_vectors:
            own = u @ task_vector
            s = (u @ merged) @ own / (own @ own) if own.norm() > 0 else torch.zeros(())
            counts.append(max(alpha, s.item()))
        result += len(counts) / sum(counts) * sigma * torch.outer(u, v)
    return result


def marchenko_pastur_median(beta: float, cells: int = 100_000) -> float:
    """Median of the density √((b − t)(t − a)) / (2πβt) on [a, b] = [(1 − √β)², (1 + √β)²].

    With t = 1 + β − 2√β cos φ the density becomes 2 sin²φ / (πt) on [0, π], smooth even where a
    is 0; it is integrated by the midpoint rule up to one half.
    """
    width = math.pi / cells
    phi = (torch.arange(cells, dtype=torch.float64) + 0.5) * width
    t = 1 + beta - 2 * math.sqrt(beta) * phi.cos()
    mass = (2 * phi.sin() ** 2 / (math.pi * t) * width).cumsum(0)
    half = torch.searchsorted(mass, mass.new_tensor(0.5))
    return t[half].item()
