"""report.html: one self-contained page a run, or a page that lays several runs over each other."""

from fedloom.report.page import write_overlay, write_report

__all__ = ["write_overlay", "write_report"]
