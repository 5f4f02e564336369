"""The solvers: options, and the workspace that each asks for."""
