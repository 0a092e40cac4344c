"""Floor 5: results as pages that can be sent around."""

from __future__ import annotations

from .bench import bench_page
from .erasure import erasure_page
from .explain import explain_page
from .matrix import matrix_page, mismatch_page
from .scan import scan_page

__all__ = ["bench_page", "erasure_page", "explain_page", "matrix_page", "mismatch_page", "scan_page"]
