"""Many runs as one: recipes x variations x seeds, each an ordinary run folder, and one table of them all."""

from fedloom.bench.comparisons import AtSeed, Comparison
from fedloom.bench.grid import Cell, Outcome, grid, run_all
from fedloom.bench.page import write_page
from fedloom.bench.tables import Bench, tabulate

__all__ = ["AtSeed", "Bench", "Cell", "Comparison", "Outcome", "grid", "run_all", "tabulate", "write_page"]
