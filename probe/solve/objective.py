"""The penalised loss of many heads at once: value, gradient and curvature.

All are products over blocks of rows, and sums over blocks: the rows may lie in memory, in a file,
or on several machines.

Shapes: N rows, D columns, H heads, K outputs of a head, G columns of row weights.
Z (N, D) centred features with a last column of ones, so that the intercept is a
coordinate like any other; theta (H, K, D). With softmax a head has K classes; with
sigmoid K = 1 and a head is one column of labels.

    f_h(theta) = sum_i w_i * loss(y_i, theta z_i) + l2_h / 2 * ||theta without its last column||^2,
    sum_i w_i = 1

Everything is computed relative to the true class, so that a loss of 1e-9 keeps its digits in
float32: with margins m_k = logit_k - logit_y the loss is log(1 + sum_{k != y} exp m_k), never
a difference of large numbers. A block's rows are of one class, and lie along the last axis: every
step on logits (H, K, n) then runs along memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from probe.solve.preconditioner import (
    Basis,
    Dense,
    HeadInverse,
    Inverse,
    Preconditioner,
    Woodbury,
    contrasts,
)
from probe.solve.rows import Rows

BLOCK_ELEMENTS = 1 << 19  # elements of a block's logits: 2 MB in float32, near a core's own cache
TINY_PROBABILITY = 1e-20  # a probability below this counts as none
ABSENT_INTERCEPT = -1e3  # an intercept that leaves none
HARD_STEP = 12  # products in a Newton step after which a better preconditioner is looked for
MIN_PRODUCTS_WORTH = (
    32  # products that an inverse by rows may cost, or as many as the hardest step took
)
PRODUCT_OVERHEAD = 2e7  # operations in the time that a product takes whatever its size
UNCOUNTED_CURVATURE = (
    1e-5  # of a class's curvature that may lie in other rows than those counted out
)
RARE_SHARE = 0.2  # a class is rare where this share of the rows holds its curvature
INVERSES_BYTES = 1 << 30  # bytes for the inverses of rare directions


@dataclass(frozen=True)
class Point:
    """f at a theta: value (H,) float64, gradient (H, K, D), and the curvature of each row.

    curvature (H, K, N): probabilities of softmax, p * (1 - p) of sigmoid.
    """

    value: Tensor
    gradient: Tensor
    curvature: Tensor

    def select(self, heads: Tensor) -> Point:
        """Keep the heads of an index (H',)."""
        return Point(self.value[heads], self.gradient[heads], self.curvature[heads])

    def assign(self, heads: Tensor, other: Point) -> None:
        """Write another point over the heads of an index (H',)."""
        for mine, theirs in zip(
            (self.value, self.gradient, self.curvature),
            (other.value, other.gradient, other.curvature),
            strict=True,
        ):
            mine[heads] = theirs


@dataclass(frozen=True)
class Objective:
    """H penalised losses over the same rows.

    y: None for softmax, whose classes the rows know, or (L, N) of 0 and 1 for sigmoid, whose rows
        heads pick by `column` (H,).
    weights: (G, N), each row summing to 1; heads pick by `group` (H,), and from the bases
        by `basis` (H,).
    present: (G, K), the classes of softmax that have a row with weight, where some have none. The
        others' weights are 0 and their intercept is ABSENT_INTERCEPT: their probability stays 0.
    bf16_rows: the rows at bfloat16, in the coordinates of the one basis, where that is faster.
    """

    rows: Rows
    y: Tensor | None
    weights: Tensor
    bases: list[Basis]
    l2: Tensor
    group: Tensor
    basis: Tensor
    column: Tensor | None = None
    present: Tensor | None = None
    bf16_rows: Rows | None = None

    def select(self, heads: Tensor) -> Self:
        """Keep the heads of an index (H',)."""
        column = None if self.column is None else self.column[heads]
        return replace(
            self, l2=self.l2[heads], group=self.group[heads], basis=self.basis[heads], column=column
        )

    def blocks(self, outputs: int) -> Iterator[tuple[slice, Tensor, int]]:
        """Yield rows, Z (n, D) and class of blocks whose logits hold about BLOCK_ELEMENTS."""
        return self.rows.blocks(min(max(512, BLOCK_ELEMENTS // (len(self.l2) * outputs)), 2048))

    def penalised(self, theta: Tensor) -> Tensor:
        """Return l2 * theta, zero for the intercept, (H, K, D): the penalty's gradient."""
        out = self.l2[:, None, None] * theta
        out[..., -1] = 0
        return out

    def weighted(self, rows: slice) -> Tensor:
        """Return each head's weights of a block, (H, n)."""
        return self.weights[:, rows][self.group]

    def __call__(self, theta: Tensor) -> Point:
        """Evaluate all heads at theta (H, K, D)."""
        H, K, _ = theta.shape
        value = 0.5 * self.l2.double() * theta[..., :-1].double().square().sum((1, 2))
        gradient = self.penalised(theta)
        curvature = theta.new_empty(H, K, len(self.rows))
        for rows, Z, true in self.blocks(K):
            w = self.weighted(rows)
            loss, R, curvature[..., rows] = self._loss(rows, logits(Z, theta), true)
            value += torch.einsum("hn,hn->h", w.double(), loss.double())
            accumulate_gradient(gradient, R.mul_(w[:, None]), Z)
        return Point(value, gradient, curvature)

    def _loss(self, rows: slice, m: Tensor, true: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return loss (H, n), its derivative by the logits m (H, K, n), and the curvature."""
        if self.y is not None:
            sign = 1 - 2 * self.y[:, rows][self.column][:, None]  # -1 where the label is 1
            m = sign * m
            p = _floored(torch.sigmoid(m))
            curved = p * torch.sigmoid(-m)
            return torch.nn.functional.softplus(m[:, 0], threshold=40), sign * p, curved
        m -= m[:, true : true + 1].clone()
        top = m.amax(1, keepdim=True)  # >= 0, and 0 where the true class wins
        down = torch.exp(-top)
        e = _floored(torch.exp(m.sub_(top)))
        e[:, true] = 0
        others = e.sum(1, keepdim=True)
        loss = top + torch.log1p(others + torch.expm1(-top))
        total = others + down
        R = e.div_(total)
        p = R.clone()
        R[:, true] = (-others / total)[:, 0]
        p[:, true] = down.div_(total)[:, 0]
        return loss[:, 0], R, p

    def hessian_product(self, point: Point, V: Tensor) -> Tensor:
        """Return the Hessian at a point times V, both (H, K, D)."""
        out = self.penalised(V)
        for rows, Z, true in self.blocks(V.shape[1]):
            curved = point.curvature[..., rows]
            A = logits(Z, V)  # (H, K, n)
            if self.y is None:  # (diag(p) - p p') A, taken relative to the true class
                A -= A[:, true : true + 1].clone()
                A -= (curved * A).sum(1, keepdim=True)
            accumulate_gradient(out, A.mul_(curved).mul_(self.weighted(rows)[:, None]), Z)
        return out

    def to_basis(self, gradients: Tensor) -> Tensor:
        """Return gradients (H, K, D) in the coordinates of their bases: g B."""
        return self._times_bases(gradients, [one.B for one in self.bases])

    def from_basis(self, steps: Tensor) -> Tensor:
        """Return steps (H, K, D) that are given in the coordinates of their bases: s B'."""
        return self._times_bases(steps, [one.B.T for one in self.bases])

    def _times_bases(self, T: Tensor, matrices: list[Tensor]) -> Tensor:
        if len(matrices) == 1:
            return T @ matrices[0]
        out = torch.empty_like(T)
        for g, matrix in enumerate(matrices):
            heads = (self.basis == g).nonzero()[:, 0]
            if len(heads):
                out[heads] = T[heads] @ matrix
        return out

    @property
    def has_bf16(self) -> bool:
        """Say whether there are rows at bfloat16."""
        return self.bf16_rows is not None

    def hessian_product_bf16(self, point: Point, V: Tensor) -> Tensor:
        """Return the Hessian times V in the coordinates of the basis, nearly, both (H, K, D).

        By the rows at bfloat16; where V has no more digits than that it is the product with one
        matrix, a little other than the Hessian.
        """
        assert self.bf16_rows is not None
        return replace(self, rows=self.bf16_rows).hessian_product(point, V)

    def preconditioner(
        self, point: Point, cg_iterations: Tensor, kept: Mapping[int, HeadInverse]
    ) -> Preconditioner:
        """Return an approximate inverse of the Hessian, better where steps were hard.

        cg_iterations (H,) counts the products of the hardest Newton step. Where more than
        HARD_STEP, and where they cost more than building it, a head gets an inverse of its own
        (preconditioner.py): of its Hessian, or of the rows that hold the curvature of a rare
        class. kept are such inverses, by head, that are still good. All in the coordinates of the
        bases.
        """
        M = self.mean_curvature(point)
        hard = [h for h in (cg_iterations > HARD_STEP).nonzero()[:, 0].tolist() if h not in kept]
        free_bytes = INVERSES_BYTES - sum(one.nbytes for one in kept.values())
        if self.y is not None:
            base = Preconditioner.kronecker(M, self.l2, self.spectrum, self.contrasts(1))
            return replace(
                base,
                head_inverses=dict(kept) | self._inverses(point, hard, cg_iterations, free_bytes),
            )
        own = dict(kept) | self._dense(point, hard, cg_iterations, free_bytes)
        free_bytes -= sum(one.nbytes for h, one in own.items() if h not in kept)
        parts: dict[int, tuple[Tensor, Tensor]] = {}
        for h in hard:
            if h in own:
                continue
            if part := self._active(point, h, int(cg_iterations[h])):
                R = len(part[0])
                free_bytes -= point.gradient.element_size() * R * (R + self.rows.width)
                if free_bytes < 0:
                    break
                parts[h] = part
                M[h] -= part[1].T @ part[1]
        U = self.contrasts(M.shape[1])
        base = Preconditioner.kronecker(M, self.l2, self.spectrum, U)
        if not parts:
            return replace(base, head_inverses=own)
        wanted = [rows for rows, _ in parts.values()]
        taken = torch.split(self.rows.take(torch.cat(wanted)), [len(rows) for rows in wanted])
        for (h, (_, f)), Z in zip(parts.items(), taken, strict=True):
            basis = self.bases[int(self.basis[h])]
            if found := Woodbury.from_rows(basis, base.Q[h], base.m[h], self.l2[h], f, Z):
                own[h] = found
            else:
                M[h] += f.T @ f
        if not parts.keys() <= own.keys():
            base = Preconditioner.kronecker(M, self.l2, self.spectrum, U)
        return replace(base, head_inverses=own)

    def contrasts(self, outputs: int) -> Tensor:
        """Return directions that move classes against each other, (H, K, K-1): see contrasts."""
        H, device = len(self.l2), self.l2.device
        if self.present is None:
            return contrasts(outputs).to(device).expand(H, -1, -1)
        return torch.stack([contrasts(outputs, one) for one in self.present.cpu()]).to(device)[
            self.group
        ]

    def centred(self, theta: Tensor) -> Tensor:
        """Return theta (H, K, D) less what moves all classes together, which changes no softmax."""
        if self.present is None:
            return theta - theta.mean(1, keepdim=True)
        among = self.present[self.group][..., None].to(theta.dtype)  # (H, K, 1)
        return theta - among * (among * theta).sum(1, keepdim=True) / among.sum(1, keepdim=True)

    @property
    def spectrum(self) -> Tensor:
        """Return the eigenvalues of each head's Gram matrix, (H, D) in float64."""
        return torch.stack([b.spectrum for b in self.bases]).double()[self.basis]

    def gram_in_basis(self, gram: Tensor, head: int) -> Tensor:
        """Return a Gram matrix (D, D), float64, in the coordinates of a head's basis."""
        B = self.bases[int(self.basis[head])].B.double()
        return B.T @ gram @ B

    def mean_curvature(self, point: Point) -> Tensor:
        """Return sum_i w_i (diag(p_i) - p_i p_i') without its diagonal, (H, K, K) in float64."""
        H, K = point.gradient.shape[:2]
        M = torch.zeros(H, K, K, dtype=torch.float64, device=point.gradient.device)
        for start in range(0, len(self.rows), 4096):
            rows = slice(start, start + 4096)
            curved = point.curvature[..., rows]
            wp = curved * self.weighted(rows)[:, None]
            if self.y is None:
                M -= torch.einsum("hkn,hln->hkl", wp, curved)
            else:
                M += wp.sum(2)[..., None]
        return M

    def _dense(
        self, point: Point, hard: list[int], cg_iterations: Tensor, free_bytes: int
    ) -> dict[int, Dense]:
        """Return the inverse Hessian of softmax heads with so few parameters that it pays."""
        N, D, K = len(self.rows), self.rows.width, point.gradient.shape[1]
        U = self.contrasts(K)
        price = K * (K + 1.0) * N * D**2 + (K * D) ** 3.0
        own: dict[int, Dense] = {}
        for h in hard:
            size = point.gradient.element_size() * ((K - 1) * D) ** 2
            if (
                price
                > max(int(cg_iterations[h]), MIN_PRODUCTS_WORTH)
                * (4.0 * N * D * K + PRODUCT_OVERHEAD)
                or size > free_bytes
            ):
                continue
            p, w = self.curvature_of(point, h).double(), self.weights[self.group[h]].double()
            upper = torch.triu_indices(K, K, device=p.device)
            grams = self.rows.grams(
                [w * p[k] * (float(k == j) - p[j]) for k, j in upper.T.tolist()]
            )
            blocks = torch.empty(K, K, D, D, dtype=torch.float64, device=p.device)
            for (k, j), gram in zip(upper.T.tolist(), grams, strict=True):
                blocks[k, j] = blocks[j, k] = self.gram_in_basis(gram, h)
            if found := Dense.from_blocks(blocks, self.l2[h], self.l2.dtype, U[h]):
                own[h] = found
                free_bytes -= found.nbytes
        return own

    def _active(self, point: Point, head: int, cg_iterations: int) -> tuple[Tensor, Tensor] | None:
        """Return rows (R,) that hold the curvature of the rarest class r, and their f (R, K).

        A class is rare where few rows hold its curvature, w p_r (1 - p_r). Such a row's
        w (diag(p) - p p') has the part f f', f = sqrt(w p_r / (1 - p_r)) (e_r - p), that holds all
        of the row's curvature along r: what is left has none there. A class with less curvature
        than the penalty, such as one without a row, has none worth counting out.
        """
        p, w = self.curvature_of(point, head).double(), self.weights[self.group[head]].double()
        v = w * p * (1 - p)  # (K, N)
        share = v.sum(1).square() / v.square().sum(1).clamp_min(1e-300) * w.square().sum()
        share = torch.where(v.sum(1) > self.l2[head], share, torch.inf)
        r = int(share.argmin())
        if not share[r] <= RARE_SHARE:
            return None
        falling, order = v[r].sort(descending=True)
        rest = max(UNCOUNTED_CURVATURE * float(falling.sum()), float(self.l2[head]))
        R = int((falling.cumsum(0) < falling.sum() - rest).sum()) + 1
        N, D, K = len(self.rows), self.rows.width, len(p)
        price, worth = (
            R * R * (6.0 * D + R),
            max(cg_iterations, MIN_PRODUCTS_WORTH) * 4.0 * N * D * K,
        )
        if price > worth:
            return None
        rows = order[:R]
        f = -p[:, rows]
        f[r] += 1
        f *= (w[rows] * p[r, rows] / (1 - p[r, rows])).sqrt()
        return (rows, f.T) if bool(f.isfinite().all()) else None

    def _inverses(
        self, point: Point, hard: list[int], cg_iterations: Tensor, free_bytes: int
    ) -> dict[int, Inverse]:
        """Return the inverse Hessian of heads of one output, where it pays.

        Where that makes the difference, the rows with the last percent of the curvature are taken
        as one.
        """
        N, D = len(self.rows), self.rows.width
        curved = {
            h: self.weights[self.group[h]].double() * self.curvature_of(point, h)[0].double()
            for h in hard
        }
        most = max(0, free_bytes) // (point.gradient.element_size() * D * D)
        grams: dict[int, Tensor] = {}
        least: dict[int, Tensor] = {}
        for h, v in curved.items():
            falling = v.sort(descending=True).values
            some = int((falling.cumsum(0) < 0.99 * v.sum()).sum())
            worth = int(cg_iterations[h]) * (4.0 * N * D + PRODUCT_OVERHEAD)
            n = next((n for n in (N - 1, some) if 8.0 * D**3 + 4.0 * n * D**2 <= worth), None)
            if n is None or not v.sum() > TINY_PROBABILITY or len(grams) == most:
                continue
            least[h] = falling[n]
            grams[h] = v[v < least[h]].sum() * self.bases[int(self.basis[h])].gram
            grams[h].diagonal()[:-1].add_(self.l2[h].double())
        above = [torch.where(curved[h] >= least[h], curved[h], 0) for h in grams]
        for gram, more in zip(grams.values(), self.rows.grams(above), strict=True):
            gram += more
        found = {
            h: Inverse.from_hessian(self.gram_in_basis(gram, h), self.l2.dtype)
            for h, gram in grams.items()
        }
        return {h: one for h, one in found.items() if one}

    def curvature_of(self, point: Point, head: int) -> Tensor:
        """Return the curvature of one head at all rows, (K, N)."""
        return point.curvature[head]


def logits(Z: Tensor, theta: Tensor) -> Tensor:
    """Return theta Z' of a block, (H, K, n), multiplied as Z is stored."""
    H, K, D = theta.shape
    return (theta.reshape(H * K, D).to(Z.dtype) @ Z.T).to(theta.dtype).view(H, K, -1)


def accumulate_gradient(into: Tensor, R: Tensor, Z: Tensor) -> None:
    """Add R Z of a block to `into` (H, K, D): what residuals R (H, K, n) give in parameters."""
    into, R = into.view(-1, into.shape[2]), R.flatten(0, 1)
    if Z.dtype == into.dtype:
        into.addmm_(R, Z)
    else:
        into += R.to(Z.dtype) @ Z


def _floored(p: Tensor) -> Tensor:
    """Return p with what is below TINY_PROBABILITY as zero.

    Products of such probabilities leave float32's normal range, where processors are slow: the
    passes of separable heads took 40 times as long.
    """
    return torch.nn.functional.threshold(p, TINY_PROBABILITY, 0)
