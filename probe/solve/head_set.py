"""Which heads are fitted over the same rows: their loss, weights, penalties and bases.

Shapes: H heads, K outputs, D columns, N rows, G weightings of the rows. What of an objective needs
no pass over the rows is here, and is the same wherever the rows lie.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from probe.solve.coordinates import Basis
from probe.solve.losses import Loss
from probe.solve.preconditioner import contrasts

ABSENT_INTERCEPT = -1e3  # of a class without a row: exp(-1000) is 0


@dataclass(frozen=True)
class HeadSet:
    """H heads.

    weights (G, N), each row summing to 1: heads pick one by `group` (H,), and one of the bases by
    `basis` (H,). l2 (H,) is the penalty. present (G, K): the classes of softmax that have a row
    with weight, where some have none. The others' weights are 0 and their intercept is
    ABSENT_INTERCEPT: their probability stays 0.
    """

    loss: Loss
    weights: Tensor
    l2: Tensor
    group: Tensor
    bases: Sequence[Basis]
    basis: Tensor
    present: Tensor | None = None

    def select(self, heads: Tensor) -> HeadSet:
        """Keep the heads of an index (H',)."""
        return replace(
            self,
            loss=self.loss.select(heads),
            l2=self.l2[heads],
            group=self.group[heads],
            basis=self.basis[heads],
        )

    def penalty(self, theta: Tensor) -> Tensor:
        """Return l2 / 2 |theta without its last column|^2 of theta (H, K, D), (H,) float64."""
        return 0.5 * self.l2.double() * theta[..., :-1].double().square().sum((1, 2))

    def penalty_gradient(self, theta: Tensor) -> Tensor:
        """Return l2 theta, zero for the intercept, (H, K, D). It is the penalty's Hessian, too."""
        out = self.l2[:, None, None] * theta
        out[..., -1] = 0
        return out

    def weights_of(self, rows: slice) -> Tensor:
        """Return each head's weights of a block, (H, n)."""
        return self.weights[:, rows][self.group]

    def contrasts(self, outputs: int) -> Tensor:
        """Return directions that move classes against each other, (H, K, K-1): see contrasts."""
        H, device = len(self.l2), self.l2.device
        if self.present is None:
            return contrasts(outputs).to(device).expand(H, -1, -1)
        each = [contrasts(outputs, classes) for classes in self.present.cpu()]
        return torch.stack(each).to(device)[self.group]

    def centred(self, theta: Tensor) -> Tensor:
        """Return theta (H, K, D) less what moves all classes together, which changes no softmax."""
        if self.present is None:
            return theta - theta.mean(1, keepdim=True)
        # Only classes that are present: an absent one's intercept stays ABSENT_INTERCEPT.
        among = self.present[self.group][..., None].to(theta.dtype)  # (H, K, 1)
        return theta - among * (among * theta).sum(1, keepdim=True) / among.sum(1, keepdim=True)

    def to_basis(self, gradients: Tensor) -> Tensor:
        """Return gradients (H, K, D) in the coordinates of their bases: g B."""
        return self._times([one.B for one in self.bases], gradients)

    def from_basis(self, steps: Tensor) -> Tensor:
        """Return steps (H, K, D) given in the coordinates of their bases in those of rows: s B'."""
        return self._times([one.B.T for one in self.bases], steps)

    def _times(self, matrices: list[Tensor], T: Tensor) -> Tensor:
        """Return T (H, K, D) times the matrix (D, D) of each head's basis."""
        # One basis for all heads is one matrix product; else one for each basis that has heads.
        if len(matrices) == 1:
            return T @ matrices[0]
        out = torch.empty_like(T)
        for b, matrix in enumerate(matrices):
            heads = (self.basis == b).nonzero()[:, 0]
            if len(heads):
                out[heads] = T[heads] @ matrix
        return out

    def basis_of(self, head: int) -> Basis:
        """Return a head's basis."""
        return self.bases[int(self.basis[head])]

    @property
    def spectrum(self) -> Tensor:
        """Return the eigenvalues of each head's Gram matrix, (H, D) in float64."""
        return torch.stack([b.spectrum for b in self.bases]).double()[self.basis]

    def gram_in_basis(self, gram: Tensor, head: int) -> Tensor:
        """Return B' gram B of a Gram matrix (D, D), float64, with a head's basis B."""
        # z B has the Gram matrix B' (sum w z z') B.
        B = self.basis_of(head).B.double()
        return B.T @ gram @ B
