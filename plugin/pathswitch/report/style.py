"""One look for all figures: colours and matplotlib's settings; the page takes the colours from here too."""

from __future__ import annotations

from typing import Any

from pathswitch.versions import Paradigm

INK, MUTED, PAPER, BAND, LINE = "#1f2430", "#667085", "#fefefe", "#eef1f6", "#d5dae3"
# Okabe and Ito's palette: distinct under the common colour-vision deficiencies.
COLOURS: dict[Paradigm, str] = {
    "path_switching": "#0072b2",
    "ptfs": "#d55e00",
    "cpt_rewarm": "#009e73",
    "cpt_floor": "#b0649a",
    "wsd_s": "#c98a00",
}
# What the page shows instead in dark mode; a figure on its own is always light.
DARK: dict[str, str] = {
    INK: "#e6e9f0",
    MUTED: "#98a2b3",
    PAPER: "#171a21",
    BAND: "#222733",
    LINE: "#353c4a",
    COLOURS["path_switching"]: "#4aa8e8",
    COLOURS["ptfs"]: "#f08a45",
    COLOURS["cpt_rewarm"]: "#35c79b",
    COLOURS["cpt_floor"]: "#d79ac4",
    COLOURS["wsd_s"]: "#e8b33c",
}
STYLE: dict[str, Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 10,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.solid_capstyle": "round",
    "lines.solid_joinstyle": "round",
    "hatch.linewidth": 0.6,
    "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "savefig.dpi": 160,
    # Text stays text: small, selectable, and in the reader's own font.
    "svg.fonttype": "none",
}
