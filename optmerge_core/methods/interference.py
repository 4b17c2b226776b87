"""Interference, the loss of WUDI (arXiv 2503.08099) and OptMerge (arXiv 2505.19892), minimised.

    loss(τ) = Σi wi ‖(τ − Ti) Liᵀ‖²F,    wi = 1 / ‖τi‖²F                   (Eq. 1 and Eq. 3)

is quadratic in the merged task vector τ, whatever targets Ti and input subspaces Li a method takes.
With C = Σ wi LiᵀLi (n×n) and D = Σ wi Ti LiᵀLi (m×n)

    loss(τ) = ⟨τ C, τ⟩ − 2 ⟨τ, D⟩ + constant,    gradient = 2 (τ C − D),

so a step costs one m×n×n product however many experts there are, and gradient descent with
momentum, being linear, is a polynomial in the eigenvalues of C. `ridge` stops short
of the minimum too, in one step instead of many.

Where the Li have, together, fewer rows than columns, neither C nor D needs to be made: with the
√wi Li stacked to L (r×n), and √wi Ti Liᵀ beside each other to W (m×r), C = LᵀL and D = W L, and of
any function f of the eigenvalues D f(C) = W f(L Lᵀ) L.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from optmerge_core.methods.contract import Matrices, Matrix, check_choice, check_share
from optmerge_core.methods.svd import eigenpairs, gram, truncated_svd

OnStep = Callable[[int, float, float], None] | None
OVERSAMPLED = 8  # random columns beyond the rank


@dataclass(frozen=True)
class Descent:
    """Where the descent starts and how it goes; `optmerge` explains the fields."""

    init: str
    optimizer: str
    learning_rate: float
    learning_rate_unit: str = "absolute"
    momentum: float = 0.9
    steps: int = 300
    shrink: float = 0.1

    def __post_init__(self) -> None:
        check_choice("init", self.init, ("sum", "mean", "zero"))
        check_choice("optimizer", self.optimizer, ("adam", "sgd", "ridge"))
        check_choice("learning_rate_unit", self.learning_rate_unit, ("absolute", "rms"))
        check_share("momentum", self.momentum, zero=True)
        if self.learning_rate < 0 or self.steps < 0:
            raise ValueError(
                f"learning_rate {self.learning_rate} and steps {self.steps} must not be negative"
            )
        if self.shrink <= 0:
            raise ValueError(f"shrink is {self.shrink}; it must be positive")


def minimise_interference(
    task_vectors: Matrices,
    targets: Matrices,
    subspaces: Float[Tensor, "experts _ n"],
    descent: Descent,
    on_step: OnStep = None,
) -> Matrix:
    """Descend from the start τ0, in the displacement δ = τ − τ0: -> (m, n).

    task_vectors and targets (experts, m, n), subspaces (experts, any, n). Replacing Ti by Ti − τ0
    moves the origin of the quadratic form to τ0. Where the start is already optimal the gradient is
    then exactly 0, not the rounding error of τ0 C − D, which Adam would blow up to full steps.
    """
    if descent.init == "zero":
        start = torch.zeros_like(task_vectors[0])
    else:
        start = task_vectors.sum(0) if descent.init == "sum" else task_vectors.mean(0)
    form = interference(task_vectors, (target - start for target in targets), subspaces)
    learning_rate = descent.learning_rate
    if descent.learning_rate_unit == "rms":
        learning_rate *= task_vectors.square().mean().sqrt().item()
    if descent.optimizer == "ridge":
        return start + ridge(form, start, descent.shrink, on_step)
    if descent.optimizer == "adam":
        return start + adam(form, start, learning_rate, descent.steps, on_step)
    return start + sgd(form, start, learning_rate, descent.momentum, descent.steps, on_step)


@dataclass(frozen=True)
class Interference:
    """The quadratic form ⟨τ C, τ⟩ − 2 ⟨τ, D⟩ + constant; see the top of this file."""

    left: Float[Tensor, "m _"]  # W, or D
    right: Float[Tensor, "_ n"]  # L, or C in float64
    in_factors: bool  # W and L instead of D and C
    terms: int  # of the sums in C or L Lᵀ
    constant: float

    @cached_property
    def C(self) -> Float[Tensor, "n n"]:
        return (gram(self.right) if self.in_factors else self.right).to(self.left)

    @cached_property
    def D(self) -> Matrix:
        return self.left @ self.right if self.in_factors else self.left

    @cached_property
    def factored(self) -> bool:
        """Whether two products with L are cheaper than one with C."""
        rows, columns = self.right.shape
        return self.in_factors and 2 * rows < columns

    def times_C(self, tau: Matrix) -> Matrix:
        return tau @ self.right.mT @ self.right if self.factored else tau @ self.C

    def loss(self, tau: Matrix) -> float:
        return torch.sum(tau * (self.times_C(tau) - 2 * self.D)).item() + self.constant

    def gradient(self, tau: Matrix, out: Tensor | None = None) -> Matrix:
        """2 (τ C − D), in one pass over the result."""
        left, right = (tau @ self.right.mT, self.right) if self.factored else (tau, self.C)
        return torch.addmm(self.D, left, right, alpha=2, beta=-2, out=out)

    @cached_property
    def eigenpairs(self) -> tuple[Float64[Tensor, " r"], Float64[Tensor, "r r"]]:
        """Eigenvalues and vectors, in columns, of L Lᵀ, or of C; what is not resolved is 0."""
        return eigenpairs(gram(self.right.mT) if self.in_factors else self.right, self.terms)

    def filtered(self, response: Float64[Tensor, " r"]) -> Matrix:
        """D f(C), with f of the eigenvalues: W U f(Λ) Uᵀ L, or D V f(Λ) Vᵀ."""
        (_, U), left, right = self.eigenpairs, self.left, self.right
        if not self.in_factors:
            DfC: Tensor = torch.linalg.multi_dot([left, (U * response).to(left), U.mT.to(left)])
            return DfC
        if len(left) < right.shape[1]:
            return (left.double() @ U * response @ U.mT).to(left) @ right
        return left @ (U * response @ (U.mT @ right.double())).to(left)

    def along(self, start: Matrix) -> tuple[Float64[Tensor, " r"], Float64[Tensor, " r"]]:
        """‖D v‖² and ⟨start v, D v⟩, start in float64, of each eigenvector v = Lᵀu / √λ of C."""
        (eigenvalues, U), left = self.eigenpairs, self.left.double() @ self.eigenpairs[1]
        pull = left.square().sum(dim=0)
        if self.in_factors:
            return eigenvalues * pull, (start @ self.right.double().mT @ U * left).sum(dim=0)
        return pull, (start @ U * left).sum(dim=0)


def interference(
    task_vectors: Matrices, targets: Iterable[Matrix], subspaces: Float[Tensor, "experts _ n"]
) -> Interference:
    """Σi ‖(τ − Ti) Liᵀ‖²F / ‖τi‖²F as a quadratic form in τ.

    task_vectors and targets (experts, m, n), subspaces (experts, any, n). An expert that is zero
    has the weight 0.
    """
    subspaces = fewer_rows(subspaces)
    experts, rows, columns = subspaces.shape
    norms = torch.linalg.vector_norm(task_vectors, dim=(1, 2), keepdim=True)
    norms = torch.where(norms > 0, norms, torch.inf)
    terms = max(experts * rows, columns)
    if experts * rows <= columns:
        L = subspaces / norms
        W = torch.cat([Ti @ Li.mT for Ti, Li in zip(targets, L, strict=True)], dim=1)
        return Interference(W, L.flatten(0, 1), True, terms, W.square().sum().item())
    C = torch.zeros(columns, columns, dtype=torch.float64, device=subspaces.device)
    D, constant = torch.zeros_like(task_vectors[0]), 0.0
    for Ti, Li, norm in zip(targets, subspaces, norms, strict=True):
        LL = gram(Li) / norm.double().square()
        TLL = Ti @ (Li / norm).mT @ (Li / norm) if 2 * rows < columns else Ti @ LL.to(Ti)
        C += LL
        D += TLL
        constant += torch.sum(Ti * TLL).item()
    return Interference(D, C, False, terms, constant)


def fewer_rows(
    subspaces: Float[Tensor, "experts _ n"], tolerance: float = 1e-6
) -> Float[Tensor, "experts _ n"]:
    """The same LᵢᵀLᵢ with fewer rows, (experts, r, n), where two products with all L then pay.

    Lᵢ of rank r is Q (QᵀLᵢ), with Q an orthonormal basis of its columns: those of Lᵢ Ω, Ω random,
    of which only r are independent, and some more against rounding (Halko et al., arXiv 0909.4061).
    What is left over must be below `tolerance` of Lᵢ, or `subspaces` comes back as it is; LᵢᵀLᵢ is
    then right to its square.
    """
    experts, rows, columns = subspaces.shape
    most = (columns - 1) // (2 * experts)
    if rows <= most or not most:
        return subspaces
    drawn = torch.randn(columns, most, generator=torch.Generator().manual_seed(0))
    omega, written = drawn.to(subspaces.device, torch.float64), []

    def basis(L: Float[Tensor, "m n"]) -> tuple[Float64[Tensor, "m k"], int]:
        """Of the columns of L Ω, and how many are independent."""
        Q, R = torch.linalg.qr(L.double() @ omega)
        size = R.diagonal().abs()
        return Q, int((size > tolerance * size.amax()).sum())

    for subspace in subspaces:
        if basis(subspace[:: max(1, rows // (2 * most))])[1] == most:
            return subspaces  # some of its rows alone have too high a rank
        L, (Q, rank) = subspace.double(), basis(subspace)
        Q = Q[:, : rank + OVERSAMPLED]
        short = Q.mT @ L
        if torch.linalg.vector_norm(L - Q @ short) > tolerance * torch.linalg.vector_norm(L):
            return subspaces
        _, S, Vh = truncated_svd(short)
        kept = tolerance * S.amax() <= S
        written.append((S[kept].unsqueeze(-1) * Vh[kept]).to(subspace))
    return torch.nn.utils.rnn.pad_sequence(written, batch_first=True)


def adam(
    form: Interference, start: Matrix, learning_rate: float, steps: int, on_step: OnStep = None
) -> Matrix:
    """Displacement (m, n) after `steps` of torch's Adam, given the gradient instead of deriving it.

    `form` is the loss of the displacement δ = τ − start, which only `on_step`(step, loss, ‖τ‖F)
    needs to know the start for; the same holds for `sgd`.
    """
    delta = torch.zeros_like(start)
    delta.grad = torch.empty_like(start)
    optimizer = torch.optim.Adam([delta], lr=learning_rate, fused=True)
    for step in range(steps + 1):
        if on_step:
            on_step(step, form.loss(delta), torch.linalg.norm(start + delta).item())
        if step < steps:
            form.gradient(delta, out=delta.grad)
            optimizer.step()
    return delta


def sgd(
    form: Interference,
    start: Matrix,
    learning_rate: float,
    momentum: float,
    steps: int,
    on_step: OnStep = None,
) -> Matrix:
    """Displacement (m, n) after `steps` of gradient descent with momentum, in closed form.

    With C = V Λ Vᵀ the displacement is D V q(Λ) Vᵀ at every step, and the response q follows the
    same recurrence as the weights, one number per eigenvalue:

        velocity ← momentum · velocity + 2 (Λ q − 1),    q ← q − learning_rate · velocity

    in float64, and with no division by small eigenvalues. A step is a 3×3 matrix for every
    eigenvalue, acting on (q, velocity, 1), and `steps` of them its power. Where Λ is 0, so is D V.
    """
    eigenvalues, _ = form.eigenpairs
    step_matrix = _step_matrix(eigenvalues, learning_rate, momentum)
    if on_step:
        pull, along = form.along(start.double())
        start_norm = torch.linalg.norm(start.double())
        state = torch.eye(3).to(step_matrix)[2].expand(len(eigenvalues), 3)
        for step in range(steps + 1):
            q = state[:, 0]
            loss = form.constant + torch.sum(q * (eigenvalues * q - 2) * pull)
            square = start_norm**2 + torch.sum(q * (2 * along + q * pull))
            on_step(step, loss.item(), square.clamp(min=0).sqrt().item())
            state = (step_matrix @ state.unsqueeze(-1)).squeeze(-1)
    return form.filtered(torch.linalg.matrix_power(step_matrix, steps)[:, 0, 2])


def _step_matrix(
    eigenvalues: Float[Tensor, " r"], learning_rate: float, momentum: float
) -> Float[Tensor, "r 3 3"]:
    """One step of gradient descent with momentum on (q, velocity, 1), for each eigenvalue."""
    step = torch.zeros(len(eigenvalues), 3, 3).to(eigenvalues)
    step[:, 1, 0] = 2 * eigenvalues
    step[:, 1, 1] = momentum
    step[:, 1, 2] = -2
    step[:, 0] = -learning_rate * step[:, 1]
    step[:, 0, 0] += 1
    step[:, 2, 2] = 1
    return step


def ridge(form: Interference, start: Matrix, shrink: float, on_step: OnStep = None) -> Matrix:
    """Displacement (m, n) that minimises loss + μ‖δ‖²F, δ = τ − start: D (C + μI)⁻¹.

    μ = shrink times the mean eigenvalue of C, tr(C) / n, so that the result follows the scale of
    the task vectors and the number of experts. `on_step` sees step 0, the start, and 1, the result.
    """
    eigenvalues, _ = form.eigenpairs
    mu = shrink * eigenvalues.sum() / start.shape[1]
    delta = form.filtered(torch.where(eigenvalues > 0, 1 / (eigenvalues + mu), 0))
    if on_step:
        for step, moved in enumerate((torch.zeros_like(delta), delta)):
            on_step(step, form.loss(moved), torch.linalg.norm(start + moved).item())
    return delta
