"""Makes the tables and plots of docs/findings.md and of the README from result files.

The text around the tables is written by hand. Raises RunError if a document has lost its blocks.
"""

from pathlib import Path

from benchmarks.miniature.blocks import fill_blocks
from benchmarks.miniature.plots import ablation_plot, convergence_plot
from benchmarks.miniature.rows import GROUPS
from benchmarks.miniature.tables import Results, group_section, summary

CONVERGENCE, ABLATION = "images/findings_convergence.png", "images/findings_ablation.png"


def update_page(results: Results, root: Path) -> list[Path]:
    """Write the blocks and the plots.

    Args:
        results: of each row.
        root: folder that holds README.md and docs/.

    Returns:
        The files that were written.
    """
    docs = root / "docs"
    fill_blocks(docs / "findings.md", {f"rows {name}": group_section(name, results) for name in GROUPS})
    fill_blocks(root / "README.md", {"findings": summary(results)})
    (docs / "images").mkdir(exist_ok=True)
    convergence_plot(results, docs / CONVERGENCE)
    ablation_plot(results, docs / ABLATION)
    return [docs / "findings.md", root / "README.md", docs / CONVERGENCE, docs / ABLATION]
