"""Which approximate inverse each head gets: the Kronecker product, or a better one where it pays.

Shapes as in objective.py: H heads, K outputs, N rows, D columns. All inverses are in the
coordinates of the heads' bases.

A head is hard if one of its Newton steps took more than HARD_STEP products. It gets an inverse of
its own if building that costs no more operations than those products did, and if it fits in
INVERSES_BYTES together with the others'. Costs are in floating-point operations: a product with the
Hessian takes 4 N D K, a Gram matrix N D^2 or more, a factorisation about D^3.
docs/solver.md, "Preconditioners".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from probe.solve.head_inverses import Dense, HeadInverse, Inverse, KroneckerHead, Woodbury
from probe.solve.losses import TINY_PROBABILITY
from probe.solve.objective import HeadObjective, Point
from probe.solve.preconditioner import Preconditioner

HARD_STEP = 12  # products in a Newton step after which a better preconditioner is looked for
MIN_PRODUCTS = 32  # that an inverse by rows may cost, or as many as the hardest step took
PRODUCT_OVERHEAD = 2e7  # operations in the time that a product takes whatever its size
UNCOUNTED_CURVATURE = 1e-5  # of a class's: may lie in other rows than those counted out
RARE_SHARE = 0.2  # a class is rare where this share of the rows holds its curvature
CURVATURE_SHARE = 0.99  # whose rows are counted exactly where counting all would not pay
INVERSES_BYTES = 1 << 30  # for all heads' own inverses


def build_preconditioner(
    objective: HeadObjective,
    point: Point,
    cg_iterations: Tensor,
    kept: Mapping[int, HeadInverse],
) -> Preconditioner:
    """Return an approximate inverse of the Hessian at a point, better where steps were hard.

    cg_iterations (H,) counts the products of each head's hardest Newton step. kept are inverses of
    their own, by head, that are still good.
    """
    heads = objective.heads
    M = objective.mean_curvature(point)
    hard = {h: n for h, n in enumerate(cg_iterations.tolist()) if n > HARD_STEP and h not in kept}
    free_bytes = INVERSES_BYTES - sum(one.nbytes for one in kept.values())
    if M.shape[1] == 1:
        own = dict(kept) | _of_one_output(objective, point, hard, free_bytes)
        base = Preconditioner.kronecker(M, heads.l2, heads.spectrum, heads.contrasts(1))
        return replace(base, head_inverses=own)
    dense = _of_few_parameters(objective, point, hard, free_bytes)
    own = dict(kept) | dense
    free_bytes -= sum(one.nbytes for one in dense.values())
    others = {h: n for h, n in hard.items() if h not in own}
    counted = _rows_to_count_out(objective, point, others, free_bytes)
    for h, (_, f) in counted.items():
        # sum_i w_i C_i over all rows less what the rows counted out hold of it.
        M[h] -= f.T @ f
    U = heads.contrasts(M.shape[1])
    base = Preconditioner.kronecker(M, heads.l2, heads.spectrum, U)
    if counted:
        woodbury = _with_rows_counted_out(objective, base, counted)
        failed = counted.keys() - woodbury.keys()
        for h in failed:
            f = counted[h][1]
            M[h] += f.T @ f
        if failed:
            base = Preconditioner.kronecker(M, heads.l2, heads.spectrum, U)
        own |= woodbury
    return replace(base, head_inverses=own)


def _of_few_parameters(
    objective: HeadObjective, point: Point, hard: Mapping[int, int], free_bytes: int
) -> dict[int, Dense]:
    """Return the inverse Hessians of softmax heads with so few parameters that it pays.

    K (K + 1) / 2 Gram matrices, one for each pair of classes, of weights w p_k ([k = j] - p_j).
    """
    heads, item = objective.heads, point.gradient.element_size()
    N, D, K = len(objective.rows), objective.rows.width, point.gradient.shape[1]
    U = heads.contrasts(K)
    # K (K + 1) / 2 Gram matrices of 2 N D^2 operations, and a factorisation of (K D)^3.
    price = K * (K + 1.0) * N * D**2 + (K * D) ** 3.0
    inverses: dict[int, Dense] = {}
    for h, products in hard.items():
        worth = max(products, MIN_PRODUCTS) * (4.0 * N * D * K + PRODUCT_OVERHEAD)
        if price > worth or item * ((K - 1) * D) ** 2 > free_bytes:
            continue
        p, w = _curvature_and_weights(objective, point, h)
        upper = torch.triu_indices(K, K, device=p.device)
        pairs = upper.T.tolist()
        grams = objective.rows.grams([w * p[k] * (float(k == j) - p[j]) for k, j in pairs])
        blocks = torch.empty(K, K, D, D, dtype=torch.float64, device=p.device)
        for (k, j), gram in zip(pairs, grams, strict=True):
            blocks[k, j] = blocks[j, k] = heads.gram_in_basis(gram, h)
        if inverse := Dense.from_blocks(blocks, heads.l2[h], heads.l2.dtype, U[h]):
            inverses[h] = inverse
            free_bytes -= inverse.nbytes
    return inverses


def _rows_to_count_out(
    objective: HeadObjective, point: Point, hard: Mapping[int, int], free_bytes: int
) -> dict[int, tuple[Tensor, Tensor]]:
    """Return rows (R,) and their f (R, K) of heads with a rare class, while they fit in memory."""
    rows_of: dict[int, tuple[Tensor, Tensor]] = {}
    for h, products in hard.items():
        if part := _rows_of_rare_class(objective, point, h, products):
            R = len(part[0])
            free_bytes -= point.gradient.element_size() * R * (R + objective.rows.width)
            if free_bytes < 0:
                break
            rows_of[h] = part
    return rows_of


def _rows_of_rare_class(
    objective: HeadObjective, point: Point, head: int, products: int
) -> tuple[Tensor, Tensor] | None:
    """Return rows (R,) that hold the curvature of the rarest class r, and their f (R, K).

    A class is rare where few rows hold its curvature v = w p_r (1 - p_r): as many as
    (sum v)^2 / sum v^2, beside those that hold the weight. Such a row's w (diag(p) - p p') has the
    part f f', f = sqrt(w p_r / (1 - p_r)) (e_r - p), that holds all of the row's curvature along r:
    what is left has none there. A class with less curvature than the penalty, such as one without
    a row, has none worth counting out.
    """
    l2 = objective.heads.l2[head]
    p, w = _curvature_and_weights(objective, point, head)
    v = w * p * (1 - p)  # (K, N)
    # The number of rows that hold v, (sum v)^2 / sum v^2 (Kish's effective size), over that of w,
    # 1 / sum w^2, because sum w = 1.
    share = v.sum(1).square() / v.square().sum(1).clamp_min(1e-300) * w.square().sum()
    share = torch.where(v.sum(1) > l2, share, torch.inf)
    r = int(share.argmin())
    if not share[r] <= RARE_SHARE:
        return None
    falling, order = v[r].sort(descending=True)
    rest = max(UNCOUNTED_CURVATURE * float(falling.sum()), float(l2))
    # As many of the largest as leave less than `rest` of the curvature.
    R = int((falling.cumsum(0) < falling.sum() - rest).sum()) + 1
    N, D, K = len(objective.rows), objective.rows.width, len(p)
    # About three Gram matrices (R, R) of the rows, and Cholesky's factor of their sum.
    price, worth = R * R * (6.0 * D + R), max(products, MIN_PRODUCTS) * 4.0 * N * D * K
    if price > worth:
        return None
    rows = order[:R]
    # f = sqrt(w p_r / (1 - p_r)) (e_r - p): f_r^2 = w p_r (1 - p_r), all there is along r.
    f = -p[:, rows]
    f[r] += 1
    f *= (w[rows] * p[r, rows] / (1 - p[r, rows])).sqrt()
    return (rows, f.T) if bool(f.isfinite().all()) else None


def _with_rows_counted_out(
    objective: HeadObjective, base: Preconditioner, counted: Mapping[int, tuple[Tensor, Tensor]]
) -> dict[int, HeadInverse]:
    """Return Woodbury's inverses of heads whose M in `base` lacks the rows counted out.

    counted: rows (R,) and their f (R, K) of each head. Heads without such an inverse are left out.
    """
    heads = objective.heads
    wanted = [rows for rows, _ in counted.values()]
    taken = torch.split(objective.rows.take(torch.cat(wanted)), [len(rows) for rows in wanted])
    inverses: dict[int, HeadInverse] = {}
    for (h, (_, f)), Z in zip(counted.items(), taken, strict=True):
        kronecker = KroneckerHead(heads.basis_of(h), base.Q[h], base.m[h], heads.l2[h])
        if inverse := Woodbury.from_rows(kronecker, f, Z):
            inverses[h] = inverse
    return inverses


def _of_one_output(
    objective: HeadObjective, point: Point, hard: Mapping[int, int], free_bytes: int
) -> dict[int, Inverse]:
    """Return the inverse Hessians of heads of one output, where it pays.

    Where that makes the difference, the rows with the last percent of the curvature are taken
    as one: their Gram matrix is that of all rows, times what curvature they have.
    """
    heads, item = objective.heads, point.gradient.element_size()
    N, D = len(objective.rows), objective.rows.width
    most = max(0, free_bytes) // (item * D * D)  # heads that fit in memory
    grams: dict[int, Tensor] = {}
    counted: list[Tensor] = []
    for h, products in hard.items():
        p, w = _curvature_and_weights(objective, point, h)
        v = w * p[0]
        falling = v.sort(descending=True).values
        # Counted are 4 n D^2 for a Gram matrix of n rows in float64 and 8 D^3 for the inverse.
        some = int((falling.cumsum(0) < CURVATURE_SHARE * v.sum()).sum())
        worth = products * (4.0 * N * D + PRODUCT_OVERHEAD)
        n = next((n for n in (N - 1, some) if 8.0 * D**3 + 4.0 * n * D**2 <= worth), None)
        if n is None or not v.sum() > TINY_PROBABILITY or len(grams) == most:
            continue
        least = falling[n]
        grams[h] = v[v < least].sum() * heads.basis_of(h).gram
        # The penalty is a multiple of the identity but for the intercept, in any basis.
        grams[h].diagonal()[:-1].add_(heads.l2[h].double())
        counted.append(torch.where(v >= least, v, 0))
    for gram, exact in zip(grams.values(), objective.rows.grams(counted), strict=True):
        gram += exact
    dtype = heads.l2.dtype
    inverses = {
        h: Inverse.from_hessian(heads.gram_in_basis(gram, h), dtype) for h, gram in grams.items()
    }
    return {h: inverse for h, inverse in inverses.items() if inverse}


def _curvature_and_weights(
    objective: HeadObjective, point: Point, head: int
) -> tuple[Tensor, Tensor]:
    """Return the curvature (K, N) of a head at all rows and its weights (N,), in float64."""
    heads = objective.heads
    return objective.curvature_of(point, head).double(), heads.weights[heads.group[head]].double()
