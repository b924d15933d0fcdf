"""Figures of the studies: grids of panels, heat maps, one legend for all panels.

GitHub shows a picture at most about 900 pixels wide, which is 90 pixels per inch for a figure of 10
inches. So figures are at most 10 inches wide, and letters have at least 9 points (11 pixels).
"""

import math

import numpy as np

WIDTH = 10.0  # inches, at most
FONT = 9  # points, of tick labels and of numbers in cells; axis labels and titles are larger
DPI = 140  # more than GitHub shows, for those who open the file itself
LEGEND_HEIGHT = 0.4  # inches, added to the height of the panels


def grid(rows: int, columns: int, panel_width: float = 3.3, panel_height: float = 2.6, **options):
    """(figure, axes [rows, columns]). Panels are narrower if the figure would exceed WIDTH.

    panel_width, panel_height: inches. options: those of matplotlib's subplots(), such as sharey.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(min(WIDTH, panel_width * columns), panel_height * rows + LEGEND_HEIGHT),
        dpi=DPI,
        squeeze=False,
        layout="constrained",
        **options,
    )
    for axis in axes.flat:
        axis.tick_params(labelsize=FONT)
        axis.grid(alpha=0.25)
    return figure, axes


def grid_shape(panels: int, columns: int = 3) -> tuple[int, int]:
    """(rows, columns) of a grid with at least `panels` panels and at most `columns` columns."""
    columns = min(panels, columns)
    return math.ceil(panels / columns), columns


def heat_map(axis, values, rows: list[str], columns: list[str], title: str) -> None:
    """Draw a coloured table of `values` [rows, columns] with their numbers in the cells."""
    values = np.asarray(values)
    axis.imshow(values, cmap="viridis", aspect="auto")
    axis.grid(False)
    axis.set_xticks(range(len(columns)), columns)
    axis.set_yticks(range(len(rows)), rows)
    middle = (np.min(values) + np.max(values)) / 2
    for (i, j), value in np.ndenumerate(values):
        color = "white" if value < middle else "black"
        axis.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=FONT, color=color)
    axis.set_title(title, fontsize=FONT + 1)


def legend_below(figure, axes) -> None:
    """Draw one legend for all panels, and hide the panels without data."""
    handle_of = {}
    for axis in axes.flat:
        for handle, label in zip(*axis.get_legend_handles_labels()):
            handle_of[label] = handle
        axis.set_visible(axis.has_data())
    figure.legend(
        handle_of.values(), handle_of.keys(), loc="outside lower center", ncol=6, frameon=False
    )


def save(figure, path) -> None:
    """Write the figure to a file, and free its memory."""
    import matplotlib.pyplot as plt

    figure.savefig(path)
    plt.close(figure)
