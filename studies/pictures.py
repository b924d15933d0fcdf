"""Pictures of the analyses: grids of panels, heat maps, a legend below them.

GitHub shows a picture about 900 pixels wide. So figures are at most 10 inches wide, with letters of
at least 9 points.
"""

import numpy as np

WIDTH = 10.0  # inches, at most
FONT = 9  # points, of ticks and cells; titles and axis labels are larger


def grid(rows: int, columns: int, panel_width: float = 3.3, panel_height: float = 2.6, **options):
    """(figure, axes [rows, columns]); panels get narrower where WIDTH would be exceeded.

    options: of matplotlib's subplots(), such as sharey.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(min(WIDTH, panel_width * columns), panel_height * rows + 0.4),
        dpi=140,
        squeeze=False,
        layout="constrained",
        **options,
    )
    for axis in axes.flat:
        axis.tick_params(labelsize=FONT)
        axis.grid(alpha=0.25)
    return figure, axes


def grid_shape(panels: int, columns: int = 3) -> tuple[int, int]:
    """(rows, columns) for so many panels."""
    columns = min(panels, columns)
    return -(-panels // columns), columns


def heat_map(axis, values, rows: list[str], columns: list[str], title: str) -> None:
    """A coloured table of numbers."""
    values = np.asarray(values)
    axis.imshow(values, cmap="viridis", aspect="auto")
    axis.grid(False)
    axis.set_xticks(range(len(columns)), columns)
    axis.set_yticks(range(len(rows)), rows)
    middle = (np.min(values) + np.max(values)) / 2
    for (i, j), value in np.ndenumerate(values):
        color = "white" if value < middle else "black"
        axis.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=FONT, color=color)
    axis.set_title(title, fontsize=10)


def legend_below(figure, axes) -> None:
    """One legend for all panels; panels without data disappear."""
    handle_of = {}
    for axis in axes.flat:
        for handle, label in zip(*axis.get_legend_handles_labels()):
            handle_of[label] = handle
        axis.set_visible(axis.has_data())
    figure.legend(
        handle_of.values(), handle_of.keys(), loc="outside lower center", ncol=6, frameon=False
    )


def save(figure, path) -> None:
    import matplotlib.pyplot as plt

    figure.savefig(path)
    plt.close(figure)
