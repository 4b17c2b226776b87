"""What task vectors look like as matrices: spectra, effective ranks, shared subspaces, noise.

Everything takes plain tensors; matrices are (rows, columns) = (output, input features), and
leading dimensions are a batch, usually the experts.
"""

import math

import torch
from torch import Tensor

from optmerge_core.methods.contract import check_choice
from optmerge_core.methods.svd import truncated_svd


def stable_rank(singular_values: Tensor) -> Tensor:
    """‖A‖²F / S1², between 1 and the rank: (..., r) -> (...). A zero matrix has 0."""
    squares = singular_values.square()
    return squares.sum(-1) / _nonzero(squares.amax(-1))


def entropy_rank(singular_values: Tensor) -> Tensor:
    """exp(−Σ p log p) with p = S² / ΣS², the shares of energy: (..., r) -> (...).

    The definition of Roy and Vetterli (2007) on energies instead of singular values; the number
    of equal singular values that would be as spread out. A zero matrix has 0.
    """
    squares = singular_values.square()
    energy = squares.sum(-1, keepdim=True)
    shares = squares / _nonzero(energy)
    entropy: Tensor = torch.special.entr(shares).sum(-1)
    return entropy.exp() * (energy.squeeze(-1) > 0)


def energy_kept(singular_values: Tensor) -> Tensor:
    """Share of ‖A‖²F in the k largest singular values, k = 1 … r: (..., r) -> (..., r).

    Singular values descending. A zero matrix loses nothing: all ones.
    """
    squares = singular_values.square()
    energy = squares.sum(-1, keepdim=True)
    return torch.where(energy > 0, squares.cumsum(-1) / _nonzero(energy), 1)


def cosine_matrix(task_vectors: Tensor) -> Tensor:
    """Cosines between experts' task vectors as flat vectors: (N, *shape) -> (N, N).

    A zero task vector has cosine 0 with everything, itself included.
    """
    flat = task_vectors.flatten(1)
    unit = flat / _nonzero(torch.linalg.vector_norm(flat, dim=1, keepdim=True))
    return (unit @ unit.mT).clamp(-1, 1)


def sign_conflict_matrix(task_vectors: Tensor) -> Tensor:
    """Share of the entries that are nonzero in both experts whose signs differ.

    (N, *shape) -> (N, N), 0 on the diagonal, 0.5 for independent experts; 0 where two experts
    share no nonzero entry.
    """
    signs = task_vectors.flatten(1).sign()
    rows = []
    for expert in signs:
        product = signs * expert
        rows.append((product < 0).sum(1) / (product != 0).sum(1).clamp(min=1))
    return torch.stack(rows).to(task_vectors.dtype)


def subspace_overlap(task_vectors: Tensor, rank: int, side: str = "input") -> Tensor:
    """Mean squared cosine of the principal angles between experts' top-`rank` subspaces.

    (N, m, n) -> (N, N): ‖Viᵀ Vj‖²F / k for side "input", the same of U for side "output". 1 for
    equal subspaces, 0 for orthogonal ones, k/n (k/m) expected by chance. Directions an expert of
    lower rank does not have count as orthogonal to everything.
    """
    check_choice("side", side, ("input", "output"))
    U, _, Vh = truncated_svd(task_vectors, rank)
    return basis_overlap(Vh if side == "input" else U.mT)


def basis_overlap(bases: Tensor) -> Tensor:
    """`subspace_overlap` of orthonormal rows that are there already: (N, k, n) -> (N, N)."""
    cosines = torch.einsum("ian,jbn->ijab", bases, bases)
    return cosines.square().sum((-2, -1)) / bases.shape[1]


def rounding_noise(base: Tensor, expert: Tensor) -> Tensor:
    """Standard deviation of each entry of `expert − base` that comes from rounding both.

    (*shape) each, in the dtypes they were stored in -> (*shape), float64. Rounding to a grid of
    spacing ulp is an error uniform on ±ulp/2, of standard deviation ulp/√12; two independent
    ones add in squares. The Frobenius norm of the result is the root mean square Frobenius norm
    of the noise. An expert trained from the rounded base carries its own share only: pass the
    base as float64, whose rounding is negligible.
    """
    return torch.hypot(_ulp(base), _ulp(expert)) / math.sqrt(12)


def _ulp(values: Tensor) -> Tensor:
    """Distance to the next larger magnitude in the values' own dtype, as float64."""
    grid = torch.finfo(values.dtype)
    magnitudes = values.double().abs().clamp(min=grid.smallest_normal)
    return torch.exp2(torch.frexp(magnitudes).exponent.double() - 1) * grid.eps


def gavish_donoho_threshold(rows: int, columns: int, noise: float) -> float:
    """Singular values below this are noise: the optimal hard threshold for a noisy matrix.

    Gavish and Donoho, "The optimal hard threshold for singular values is 4/√3" (2014), for the
    standard deviation `noise` of an entry: λ(β)·√max(m, n)·noise with β = min(m, n) / max(m, n).
    """
    beta = min(rows, columns) / max(rows, columns)
    optimum = math.sqrt(2 * (beta + 1) + 8 * beta / (beta + 1 + math.sqrt(beta**2 + 14 * beta + 1)))
    return optimum * math.sqrt(max(rows, columns)) * noise


def _nonzero(divisor: Tensor) -> Tensor:
    """The divisor with 1 in place of 0, for quotients whose numerator is then 0 as well."""
    return torch.where(divisor == 0, 1, divisor)
