"""The formulas of the solvers, once, as functions of rows.

A state is (B, N) rows in the accumulation dtype; everything else is (B,), (B, m) or (B, m, m). Symbols, as in the
documents: x_k iterate, f_k = f(x_k), g_k = f_k - x_k residual, columns dF_j = f_{j+1} - f_j and dG_j = g_{j+1} - g_j,
W = dF - c dG the test space. What a function needs to know of sums and small solves is handed in (``algebra``), and so
are the columns themselves: the oracle adds up in a fixed order, the portable backend multiplies matrices, ``Unroll``
does what autograd can follow. Nothing here writes to a tensor that it was given, and no row looks at another.
"""
