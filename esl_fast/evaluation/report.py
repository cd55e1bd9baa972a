"""The table that papers print."""

from collections.abc import Mapping

from esl_fast.evaluation.metrics import CUTOFFS

COLUMNS = [(f"{way}_{name}", title) for way in ("i2t", "t2i") for name, title in (
    *((f"r{k}", f"R@{k}") for k in CUTOFFS), ("median_rank", "MedR"), ("mean_rank", "MeanR"),
)]  # fmt: skip


def table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Rows of metrics (see :func:`recall_metrics`) by name, as aligned text."""
    width = max(len(name) for name in rows)
    half = len(COLUMNS) // 2 * 7
    lines = [
        f"{'':{width}} {'image-to-text':^{half}} |{'text-to-image':^{half}} |{'':7}",
        f"{'':{width}} "
        + " |".join("".join(f"{title:>7}" for _, title in COLUMNS[i : i + 5]) for i in (0, 5))
        + " |   rsum",
    ]
    for name, metrics in rows.items():
        cells = [f"{metrics[key]:7.1f}" for key, _ in COLUMNS]
        lines.append(f"{name:{width}} {''.join(cells[:5])} |{''.join(cells[5:])} |{metrics['rsum']:7.1f}")
    return "\n".join(lines)
