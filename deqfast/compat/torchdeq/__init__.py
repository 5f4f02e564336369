"""x"""
from ._solvers import anderson_solver, broyden_solver, fixed_point_iter, simple_fixed_point_iter
from ._stat import SolverStat
