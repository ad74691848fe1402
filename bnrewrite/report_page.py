"""The report as one self-contained HTML page: a picture of the sites, then the tables."""

from html import escape

from bnrewrite.naming import ITSELF
from bnrewrite.report import PassSummary, Report, SiteReport, short
from bnrewrite.steps import Round

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --dim: #646d78; --paper: #ffffff;
  --panel: #f5f6f8; --line: #dfe3e8; --sync: #2563eb; --local: #0f9d6e; --frozen: #64748b;
  --shuffle: #b45309; --own: #d97706; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --dim: #9aa4b0; --paper: #14171b;
  --panel: #1d2127; --line: #333a43; --sync: #6ea8fe; --local: #4ecb9c; --frozen: #94a3b8;
  --shuffle: #f0b35a; --own: #f6b94c; } }
body { margin: 0; background: var(--paper); color: var(--ink); line-height: 1.45;
  font: 15px/1.45 system-ui, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 2.2rem 1.4rem 4rem; }
h1 { font-size: 1.6rem; margin: 0 0 .2rem; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; }
.lead { color: var(--dim); margin: 0 0 1.4rem; }
.cards { display: flex; flex-wrap: wrap; gap: .8rem; }
.card { background: var(--panel); border: 1px solid var(--line); border-radius: 10px;
  padding: .7rem 1rem; min-width: 8.2rem; }
.card b { display: block; font-size: 1.5rem; font-variant-numeric: tabular-nums; }
.card span { color: var(--dim); font-size: .85rem; }
.rounds { display: flex; flex-wrap: wrap; gap: .45rem; align-items: flex-start; padding: 0;
  margin: 0; list-style: none; }
.round { background: var(--panel); border: 1px solid var(--line); border-radius: 8px;
  padding: .3rem .4rem .4rem; min-width: 6.6rem; }
.round.shared { border-color: var(--sync); box-shadow: inset 0 0 0 1px var(--sync); }
.round small { display: flex; justify-content: space-between; gap: .6rem; color: var(--dim);
  font-size: .7rem; margin-bottom: .25rem; }
.site { border-left: 4px solid var(--sync); background: var(--paper); border-radius: 4px;
  padding: .15rem .4rem; margin-top: .2rem; font: .74rem/1.3 ui-monospace, monospace; }
.site.local { border-color: var(--local); } .site.frozen { border-color: var(--frozen); }
.site.shuffle { border-color: var(--shuffle); } .site.floor { border-left-style: dashed; }
.site span { color: var(--dim); display: block; }
.legend { color: var(--dim); font-size: .85rem; margin: .7rem 0 0; }
.legend i { display: inline-block; width: .8em; height: .8em; border-radius: 2px;
  margin: 0 .3em 0 .9em; vertical-align: -1px; }
.wide { overflow-x: auto; border: 1px solid var(--line); border-radius: 10px; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; }
th, td { text-align: left; padding: .38rem .7rem; border-bottom: 1px solid var(--line);
  white-space: nowrap; } tr:last-child td { border-bottom: 0; }
th { color: var(--dim); font-weight: 600; } td.n {
  font-variant-numeric: tabular-nums; }
summary { cursor: pointer; color: var(--dim); margin: 1.4rem 0 .6rem; }
"""


def to_html(report: Report) -> str:
    """``report`` as a page that needs nothing else: no scripts, no files, no network."""
    title = f"{escape(report.model)}: BatchNorm rewritten"
    body = "\n".join(
        (
            f"<h1>{escape(report.model)}</h1>",
            f'<p class="lead">{_lead(report)}</p>',
            f'<div class="cards">{_cards(report)}</div>',
            "<h2>One training step, from left to right</h2>",
            f'<ol class="rounds">{_rounds(report)}</ol>',
            _legend(report),
            "<h2>Passes</h2>",
            _table(
                ("pass", "rewritten", "left", "why left"),
                [
                    (one.name, one.num_rewritten, len(one.skipped), _reasons(one))
                    for one in report.passes
                ],
            ),
            _owners(report),
            "<h2>Left as it was</h2>" if report.skipped else "",
            _table(
                ("name", "reason", "where"),
                [(skip.name, skip.reason, short(skip.where)) for skip in report.skipped],
            )
            if report.skipped
            else "",
            "<h2>Sites</h2>",
            _table(
                (
                    "site",
                    "mode",
                    "group",
                    "channels",
                    "fused",
                    "shares its collective with",
                    "graph of",
                    "where",
                ),
                [
                    (
                        site.name,
                        site.mode,
                        site.group,
                        "" if site.num_channels is None else site.num_channels,
                        site.fused,
                        ", ".join(site.shares_with),
                        _owner_name(site),
                        short(site.where),
                    )
                    for site in report.sites
                ],
            ),
        )
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n"
        "</main>\n</body>\n</html>\n"
    )


def _lead(report: Report) -> str:
    ranks = "one rank" if report.world_size == 1 else f"{report.world_size} ranks"
    modes = ", ".join(sorted({site.mode for site in report.sites})) or "none"
    return f"Mode {escape(modes)}, {ranks} when this report was made."


def _cards(report: Report) -> str:
    cards = (
        (len(report.sites), "BatchNorm sites"),
        (sum(site.owner is not None for site in report.sites), "in captured graphs"),
        (report.num_owners, "modules with graphs"),
        (report.collectives_forward, f"collectives forward, {report.before_forward} before"),
        (report.collectives_backward, f"collectives backward, {report.before_backward} before"),
        (len(report.skipped), "places left as they were"),
    )
    return "".join(
        f'<div class="card"><b>{number}</b><span>{label}</span></div>' for number, label in cards
    )


def _owner_name(site: SiteReport) -> str:
    if site.owner is None:
        return "none: the layer is on its own"
    return site.owner or ITSELF


def _rounds(report: Report) -> str:
    sites = {site.name: site for site in report.sites}
    number = 0
    cards = []
    for one in report.rounds:
        number += one.collectives_forward
        title = f"collective {number}" if one.collectives_forward else "no collective"
        notes = ["hidden"] if one.hidden else []
        shared = " shared" if one.collectives_forward and len(one.sites) > 1 else ""
        chips = "".join(_chip(sites[name], one) for name in one.sites if name in sites)
        cards.append(
            f'<li class="round{shared}"><small><span>{title}</span>'
            f"<span>{' '.join(notes)}</span></small>{chips}</li>"
        )
    return "".join(cards)


def _chip(site: SiteReport, one: Round) -> str:
    """A site with what is worth knowing at a glance; the rest shows when one points at it."""
    floor = " floor" if one.owner is None else ""
    channels = "" if site.num_channels is None else f"{site.num_channels} channels"
    below = " + ".join(filter(None, (channels, site.fused)))
    title = f"{site.name}: {site.mode}, graph of {_owner_name(site)} {short(site.where)}"
    return (
        f'<div class="site {escape(site.mode)}{floor}" title="{escape(title)}">'
        f"{escape(site.name or ITSELF)}<span>{escape(below)}</span></div>"
    )


def _reasons(one: PassSummary) -> str:
    return "; ".join(sorted({skip.reason for skip in one.skipped}))


def _owners(report: Report) -> str:
    rows: list[tuple[object, ...]] = [
        (
            owner.name or ITSELF,
            "separate" if owner.differs else "one for both",
            ", ".join(owner.inlined),
        )
        for owner in report.owners
    ]
    head = ("module", "graphs for training and evaluation", "inlined to share collectives")
    return (
        f"<details><summary>modules that run captured graphs: {len(rows)}</summary>"
        f"{_table(head, rows)}</details>"
    )


def _legend(report: Report) -> str:
    modes = sorted({site.mode for site in report.sites})
    entries = "".join(
        f'<i style="background:var(--{escape(mode)})"></i>{escape(mode)}' for mode in modes
    )
    return (
        '<p class="legend">Each box is one call. Sites in the same box share one collective in '
        "forward and one in backward. <b>hidden</b>: other work runs while the collective is in "
        "flight. <b>+</b>: what follows a site and is fused with it. A dashed edge: the layer "
        f"is on its own, outside any captured graph.{entries}</p>"
    )


def _table(head: tuple[str, ...], rows: list[tuple[object, ...]]) -> str:
    header = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join(
        "<tr>"
        + "".join(
            f'<td class="n">{cell}</td>'
            if isinstance(cell, int)
            else f"<td>{escape(str(cell))}</td>"
            for cell in row
        )
        + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><tr>{header}</tr>{body}</table></div>'
