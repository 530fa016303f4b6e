"""Many runs as one: recipes x variations x seeds, each an ordinary run folder, and one table of them all."""

from fedloom.bench.grid import Cell, Outcome, grid, run_all
from fedloom.bench.tables import Bench, tabulate

__all__ = ["Bench", "Cell", "Outcome", "grid", "run_all", "tabulate"]
