"""What `minilora verify kernels` prints: which way a product takes on each architecture, and each operation's error."""

from collections.abc import Sequence

import torch
from rich.console import Console
from rich.table import Table

from minilora.backend import told
from minilora.dispatch import FLOAT32_ROWS
from minilora.dispatch import table as dispatch_table
from minilora.evaluate.kernel_check import Check
from minilora.report.console import table


def print_ways(device: torch.device, console: Console) -> None:
    """The device, what computes there, and the whole table of ways."""
    console.print(told(device), highlight=False)
    if device.type != "cuda":
        console.print("the kernels are run by Triton's interpreter", highlight=False)
    rows = [
        [
            f"sm_{entry.arch}", "any" if limits.least_weights == 0 else f"{limits.least_weights:,} weights and more",
            str(limits.matvec), str(limits.matmul), "yes" if entry.shuffle else "no", entry.card or "an estimate",
        ]
        for entry in dispatch_table()
        for limits in entry.limits
    ]  # fmt: skip
    console.print(table(["since", "N * K", "matvec up to M", "matmul up to M", "shuffle", "measured on"], rows))
    console.print(f"in float32, matmul up to M = {FLOAT32_ROWS} at most", highlight=False)


def error_table(checks: Sequence[Check]) -> Table:
    """The worst of each operation and dtype: the error that is nearest to, or furthest over, what is allowed."""
    rows = []
    for operation, dtype in dict.fromkeys((check.operation, check.dtype) for check in checks):
        group = [check for check in checks if (check.operation, check.dtype) == (operation, dtype)]
        worst = max(group, key=lambda check: (not check.passed, check.error / max(check.allowed, 1e-300)))
        failed = sum(not check.passed for check in group)
        verdict = f"{failed} of {len(group)} failed" if failed else f"{len(group)} passed"
        rows.append([operation, dtype, verdict, f"{worst.error:.2g}", f"{worst.allowed:.2g}", worst.case])
    return table(["operation", "dtype", "checks", "worst error", "allowed", "where"], rows)
