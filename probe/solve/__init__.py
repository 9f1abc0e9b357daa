"""Solve: many penalised logistic regressions at once, to the optimum that scikit-learn defines.

Arrays in, coefficients out: nothing here knows a store, a file or a metric. `probe.heads.fit_heads`
is the door. A head is one (strength C, weighting of the rows, label set); heads are solved in
batches over the same rows. Shapes: N rows, D features, K outputs, H heads.

To read, in this order: rows (X in memory or on disk, and the coordinates in which the solver sees
it), objective (value, gradient and curvature of all heads by passes over the rows), preconditioner
(an approximate inverse Hessian), solver (Newton's method with conjugate gradients), certificate
(an upper bound on what is left), path (the order in which strengths are solved). docs/solver.md
derives it. inputs checks what users give; factors are matrix factorisations that raise nothing;
least_squares and knn are two other heads.
"""
