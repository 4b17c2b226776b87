"""What data-free methods do without: a layer's real inputs. To check the methods, not to merge."""

import torch


@torch.no_grad()
def input_covariances(model, modules, batch, mask):
    """XᵀX / tr(XᵀX) of the inputs X (tokens, n) of linear layers, all tokens of a batch together.

    modules: label -> name of a linear module of the model; mask: which tokens count, as the batch
    is padded, bool (b, t). Returns label -> (n, n) float64.
    """
    found, hooks = {}, []

    def keep(label):
        def hook(_, inputs):
            X = inputs[0][mask].double()
            found[label] = X.mT @ X / X.square().sum()

        return hook

    for label, name in modules.items():
        hooks.append(model.get_submodule(name).register_forward_pre_hook(keep(label)))
    try:
        model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def share_of_energy(covariance, task_vector, rank):
    """Shares of a covariance's trace, from 0 to 1: (found, best possible, by chance).

    found: in the `rank` leading right singular directions of the task vector (m, n).
    """
    Vh = torch.linalg.svd(task_vector.double(), full_matrices=False)[2][:rank]
    best = torch.linalg.eigvalsh(covariance)[-rank:].sum()
    return float(torch.trace(Vh @ covariance @ Vh.mT)), float(best), rank / len(covariance)


def ridge(task_vectors, covariances, shrink=0.01):
    """τ minimising Σ tr((τ − τi) Gi (τ − τi)ᵀ) + μ ‖τ − Σ τi‖²F: (experts, m, n) -> (m, n).

    covariances Gi (experts, n, n), each of trace 1; μ = shrink times their sum's mean eigenvalue.
    With Gi = τiᵀτi / ‖τi‖²F the first term is the interference loss, Eq. 1.
    """
    T, G = task_vectors.double(), torch.stack(list(covariances)).double()
    C = G.sum(0)
    mu = shrink * torch.trace(C) / len(C)
    D = (T @ G).sum(0) + mu * T.sum(0)
    ridge_C = C + mu * torch.eye(len(C), dtype=C.dtype)
    return torch.linalg.solve(ridge_C, D, left=False).to(task_vectors.dtype)
