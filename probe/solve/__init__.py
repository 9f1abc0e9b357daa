"""Solve: many penalised logistic regressions at once, to the optimum that scikit-learn defines.

Arrays in, coefficients out: nothing here knows a store, a file or a metric. `probe.heads.fit_heads`
is the way in. A head is one (strength C, weighting of the rows, label column); heads are solved in
batches over the same rows. Shapes: N rows, D columns, K outputs of a head, H heads.

To read, in this order, with docs/solver.md, which derives it: fit (prepare, solve, unpack),
coordinates (features, rows, basis), losses and objective (value, gradient, Hessian products: where
the rows are passed over), solver with newton_step and line_search (Newton's method with conjugate
gradients), preconditioner, head_inverses and inverse_choice (an approximate inverse Hessian), gap
and certificate (how far from the optimum), path (the order of strengths). sources and rows hold the
rows, head_set what heads are, inputs checks what users give; factors are matrix factorisations that
raise nothing; least_squares and knn are two other heads.
"""
