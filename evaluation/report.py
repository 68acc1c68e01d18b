"""Figures as tables for a terminal and for Markdown alike, no wider than a terminal is.

What is asked first stands first: one summary of everything, every model beside the first. Then, for
each further model, the details of its comparison with the first. Names of models can be long, so
tables call them A, B, C and a list says who is who. This module imports nothing of this project.

A row is what scoring.py makes: {"n": …, "models": {name: figures}} with a name under a key such as
"pattern"; the first model stands first.
"""

import string
import textwrap

WIDTH = 100  # columns
NAME = 60  # of a model, at most


# ------------------------------------------------------------------------------------------------
# Names
# ------------------------------------------------------------------------------------------------
def letters(names: list[str]) -> dict[str, str]:
    """Model → A, B, …, Z, M27, M28, …"""
    alphabet = string.ascii_uppercase
    return {n: alphabet[i] if i < len(alphabet) else f"M{i + 1}" for i, n in enumerate(names)}


def legend(names: list[str]) -> str:
    """Who is A, who is B."""
    note = ", with which the others are compared" if len(names) > 1 else ""
    lines = [f"- {letter}: {shorten(name, NAME)}" for name, letter in letters(names).items()]
    return "\n".join([lines[0] + note, *lines[1:]]) + "\n"


def shorten(text: str, width: int) -> str:
    """The middle is what a path or a name can spare."""
    if len(text) <= width:
        return text
    head = (width - 1) // 2
    return f"{text[:head]}…{text[len(text) - (width - 1 - head) :]}"


def wrapped(text: str) -> str:
    """A paragraph of lines no longer than `WIDTH`."""
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False) + "\n"


# ------------------------------------------------------------------------------------------------
# Tables
# ------------------------------------------------------------------------------------------------
def plain_table(title: str, table: list[list[str]], width: int | None = WIDTH) -> str:
    """Markdown whose columns line up in a terminal. The first row is the head.

    Args: width: columns at most, for which the first column gives way; None: as wide as it gets.
    """
    excess = table_width(table) - width if width else 0
    if excess > 0:
        room = max(8, max(len(row[0]) for row in table) - excess)
        table = [[shorten(row[0], room), *row[1:]] for row in table]
    widths = _column_widths(table)
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"
        for row in table
    ]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    head = wrapped(f"**{title}**") if width else f"**{title}**\n"
    return head + "\n" + "\n".join(lines) + "\n"


def table_width(table: list[list[str]]) -> int:
    """Columns that `plain_table` would take."""
    widths = _column_widths(table)
    return sum(widths) + 3 * len(widths) + 1


def _column_widths(table: list[list[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(*table, strict=True)]


def summary(title: str, rows: dict[str, dict], cosine: dict[str, float] | None = None) -> str:
    """The first model, and beside it every other with its change: one line a measure.

    Where two models stand beside the first, the interval moves below the change; more than two take
    another table.

    Args: rows: label → row; cosine: model → mean cosine to the first model's features.
    """
    names = list(next(iter(rows.values()))["models"])
    for size in (2, 1):
        others = names[1:]
        groups = [others[i : i + size] for i in range(0, len(others), size)] or [[]]
        tables = [_beside(rows, names, group, cosine) for group in groups]
        if max(map(table_width, tables)) <= WIDTH:
            break
    return "\n".join(plain_table(title, table) for table in tables)


def _beside(
    rows: dict[str, dict], names: list[str], group: list[str], cosine: dict[str, float] | None
) -> list[list[str]]:
    """The table of `summary`, with the models of one group."""
    called, single = letters(names), len(group) == 1
    head = ["", "n", "A before" if group else "A, % [95 %]"]
    for name in group:
        more = ["change [95 %]", "McNemar p"] if single else ["change, p"]
        head += [f"{called[name]} after", *more]
    table = [head]
    for label, row in rows.items():
        first = row["models"][names[0]]
        line = [label, str(row["n"]), f"{first['percent']:.1f}" if group else percent(first)]
        below = ["", "", ""]
        for name in group:
            m = row["models"][name]
            change, p = f"{m['change']:+.1f}", p_value(m["p"])
            interval = change_interval(m)
            line += [f"{m['percent']:.1f}"]
            line += [f"{change} {interval}", p] if single else [f"{change}, p {p}"]
            below += ["", interval]
        table += [line] if single or not group else [line, below]
    if cosine and group:
        line = ["cosine to the original", "", "1"]
        for name in group:
            near = "–" if cosine[name] is None else f"{cosine[name]:.3f}"  # another width
            line += [near, *([""] * (2 if single else 1))]
        table.append(line)
    return table


def pair_table(title: str, key: str, rows: list[dict], other: str) -> str:
    """One model against the first, in full: percent of both, change, won and lost, McNemar's p. If
    `other` is the first itself: its percent alone.

    Args: key: of a row's name, such as "pattern".
    """
    names = list(rows[0]["models"])
    called, first = letters(names), names[0]
    if other == first:
        table = [[key, "n", "A, % [95 %]"]]
        table += [[row[key], str(row["n"]), percent(row["models"][first])] for row in rows]
        return plain_table(title, table)
    table = [[key, "n", "A", called[other], "change [95 %]", "won/lost", "McNemar p"]]
    for row in rows:
        m = row["models"][other]
        both = [f"{row['models'][name]['percent']:.1f}" for name in (first, other)]
        change = f"{m['change']:+.1f} {change_interval(m)}"
        count = f"{m['won']}/{m['lost']}"
        table.append([row[key], str(row["n"]), *both, change, count, p_value(m["p"])])
    return plain_table(f"{called[other]} against A: {title}", table)


# What `margin_tables` shows: measure → the row's name in the first, the column's in the second.
SHARES = {
    "official": ("right by the official rule", "right"),
    "group match": ("group match", "match"),
    "image-to-text": ("image-to-text", "by image"),
    "group": ("group (Winoground)", "group"),
    "one image wins both": ("one image wins both texts", "one wins"),
}
MEDIANS = {
    "half margin": ("median m/2, cosine × 100", "m/2"),
    "bias": ("median bias, cosine × 100", "bias"),
}
# What a reader needs to know about them; chance is that of four cosines at random.
MARGINS = (
    "Group match and margins: s12 is the cosine of text 1 with picture 2. The margin m = s11 + s22 "
    "− s12 − s21 is how well the texts tell the pictures apart; b = ½ [(s11 − s12) + (s21 − s22)] "
    "is how far picture 1 wins both texts, and the bias is |b|. A pair is right where m/2 > |b|; "
    "group match asks only for m > 0. Chance, in percent: right 25, group match 50, image-to-text "
    "25, group 17, one image wins both texts 50. Intervals of medians: bootstrap over the pairs."
)


def margin_tables(title: str, rows: list[dict], other: str) -> str:
    """What was perceived and what bias cost, one model against the first (or the first alone, if
    `other` is it): all pairs with intervals, then pattern by pattern without.

    Args: rows: of margins.margin_rows, the average last.
    """
    # All pairs: a line a measure, so that its interval finds room beside it. "joined/left" is what
    # other tables call won/lost: pairs that came to belong to the share, and that ceased to. To
    # join those in which one image wins both texts is no win.
    names, average = list(rows[0]["models"]), rows[-1]
    called, first, alone = letters(names), names[0], other == names[0]
    shown = [first] if alone else [first, other]
    table = [[f"all {average['n']} pairs", *(called[name] for name in shown)]]
    table[0] += [] if alone else ["change [95 %]", "joined/left", "McNemar p"]
    for measure, (label, _) in SHARES.items():
        figures = [average["models"][name][measure] for name in shown]
        line = [f"{label}, %", *(f"{m['percent']:.1f}" for m in figures)]
        if not alone:
            m = figures[-1]
            line += [f"{m['change']:+.1f} {change_interval(m)}", f"{m['won']}/{m['lost']}"]
            line += [p_value(m["p"])]
        table.append(line)
    for measure, (label, _) in MEDIANS.items():
        figures = [average["models"][name][measure] for name in shown]
        line = [label, *(f"{100 * m['median']:.2f}" for m in figures)]
        if not alone:
            change, (low, high) = figures[-1]["change"], figures[-1]["change_interval"]
            line += [f"{100 * change:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]", "", ""]
        table.append(line)
    # By pattern: whole percents, so that before → after of all measures stands on one line.
    by_pattern = [["pattern", *(short for _, short in (SHARES | MEDIANS).values())]]
    for row in rows[:-1]:
        models = [row["models"][name] for name in shown]
        cells = ["→".join(f"{m[key]['percent']:.0f}" for m in models) for key in SHARES]
        cells += ["→".join(f"{100 * m[key]['median']:.2f}" for m in models) for key in MEDIANS]
        by_pattern.append([row["pattern"], *cells])
    head = f"{title}; margins" if alone else f"{called[other]} against A: {title}; margins"
    below = f"{head} by pattern, percent and cosine × 100"
    return plain_table(head, table) + "\n" + plain_table(below, by_pattern)


def wide_table(title: str, key: str, rows: list[dict]) -> str:
    """Everything about every model in one table, however wide: percent with interval, and for every
    model but the first its change, the pairs won and lost, and the p of the paired test."""
    names = list(rows[0]["models"])
    table = [[key, "n"]]
    for i, name in enumerate(names):
        table[0] += [f"{name}, % [95 %]"] + (["change", "won/lost", "McNemar p"] if i else [])
    for row in rows:
        cells = [row[key], str(row["n"])]
        for i, name in enumerate(names):
            m = row["models"][name]
            cells.append(percent(m))
            if i:
                cells += [f"{m['change']:+.1f}", f"{m['won']}/{m['lost']}", p_value(m["p"])]
        table.append(cells)
    return plain_table(title, table, width=None)


# ------------------------------------------------------------------------------------------------
# Cells and lines
# ------------------------------------------------------------------------------------------------
def percent(m: dict) -> str:
    """With its Wilson interval."""
    return f"{m['percent']:.1f} [{m['interval'][0]:.1f}, {m['interval'][1]:.1f}]"


def change_interval(m: dict) -> str:
    """95 %, with signs."""
    return "[{:+.1f}, {:+.1f}]".format(*m["change_interval"])


def p_value(p: float) -> str:
    """Two digits where they can matter; six letters at most."""
    if p < 1e-99:
        return "<1e-99"
    return f"{p:.2g}" if p >= 0.001 else f"{p:.0e}"


def noise_line(row: dict, other: str) -> str:
    """A warning if a model differs from the first by less than the noise; "" if it does not."""
    m, first = row["models"][other], next(iter(row["models"]))
    if other == first or m["change_interval"][0] > 0 or m["change_interval"][1] < 0:
        return ""
    low, high = m["change_interval"]
    return wrapped(
        f"Within the noise: {shorten(other, NAME)} against {shorten(first, NAME)} is "
        f"{m['change']:+.1f} points, 95 % interval {low:+.1f} to {high:+.1f}. This set cannot rank "
        "the two."
    )


def only(rows: list[dict], names: list[str]) -> list[dict]:
    """The same rows of some of the models; the first must be among them."""
    return [{**row, "models": {name: row["models"][name] for name in names}} for row in rows]
