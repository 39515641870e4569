"""GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection (arXiv 2403.03507).

All weights train, but Adam's moments of a matrix W (m, n) exist in r dimensions only. Every `update_proj_gap` updates
the leading singular vectors of the present gradient become the basis P of the smaller side (here m < n):

    R = P' G (r, n),   m, v = Adam's moments of R,   W <- W - lr * scale * P (m / (sqrt(v) + eps)),   P = U[:, :r] of G

Between two bases the update stays in one subspace; over many it does not, so the sum has any rank. Moments are kept when
the basis changes, as the authors do. A state of P and 2 r n numbers takes the place of 2 m n.
"""

from __future__ import annotations

from ftrecipes.methods.optimizers.projected import ProjectedMethod


class GaLore(ProjectedMethod):
    """Keeps Adam's moments in a low-rank subspace of each gradient."""
