"""The report as one self-contained HTML page: a picture of the sites, then the tables."""

from html import escape

from bnrewrite.report import Report, SiteReport

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
.groups { display: flex; flex-wrap: wrap; gap: .5rem; align-items: flex-end; }
.group { background: var(--panel); border: 1px solid var(--line); border-radius: 8px;
  padding: .45rem .5rem .3rem; }
.bars { display: flex; flex-wrap: wrap; gap: 3px; align-items: flex-end; min-height: 58px; }
.bar { width: 13px; border-radius: 3px 3px 0 0; background: var(--sync); }
.bar.local { background: var(--local); } .bar.frozen { background: var(--frozen); }
.bar.shuffle { background: var(--shuffle); }
.bar.floor { outline: 2px dashed var(--own); outline-offset: -2px; opacity: .75; }
.group small { display: block; color: var(--dim); font-size: .68rem;
  white-space: nowrap; margin-top: .3rem; }
.group em { font-style: normal; opacity: .7; }
.legend { color: var(--dim); font-size: .85rem; margin: .7rem 0 0; }
.legend i { display: inline-block; width: .8em; height: .8em; border-radius: 2px;
  margin: 0 .3em 0 .9em; vertical-align: -1px; }
.wide { overflow-x: auto; border: 1px solid var(--line); border-radius: 10px; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; }
th, td { text-align: left; padding: .38rem .7rem; border-bottom: 1px solid var(--line);
  white-space: nowrap; } tr:last-child td { border-bottom: 0; }
th { color: var(--dim); font-weight: 600; } td.n { text-align: right;
  font-variant-numeric: tabular-nums; }
code { font: .92em ui-monospace, monospace; }
"""


def to_html(report: Report) -> str:
    """``report`` as a page that needs nothing else: no scripts, no files, no network."""
    title = f"{escape(report.model)}: BatchNorm rewritten"
    body = "\n".join(
        (
            f"<h1>{escape(report.model)}</h1>",
            f'<p class="lead">{_lead(report)}</p>',
            f'<div class="cards">{_cards(report)}</div>',
            "<h2>Sites, in the order of the modules</h2>",
            f'<div class="groups">{_groups(report)}</div>',
            _legend(report),
            "<h2>Passes</h2>",
            _table(
                ("pass", "rewritten", "left"),
                [(one.name, one.num_rewritten, len(one.skipped)) for one in report.passes],
            ),
            "<h2>Left as it was</h2>" if report.skipped else "",
            _table(
                ("name", "reason", "where"),
                [(skip.name, skip.reason, skip.where or "") for skip in report.skipped],
            )
            if report.skipped
            else "",
            "<h2>Sites</h2>",
            _table(
                ("site", "mode", "group", "channels", "graph of", "where"),
                [
                    (
                        site.name,
                        site.mode,
                        site.group,
                        "" if site.num_channels is None else site.num_channels,
                        _owner_name(site),
                        site.where or "",
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
        (report.num_owners, "captured owners"),
        (report.collectives_forward, "collectives forward"),
        (report.collectives_backward, "collectives backward"),
        (len(report.skipped), "places left"),
    )
    return "".join(
        f'<div class="card"><b>{number}</b><span>{label}</span></div>' for number, label in cards
    )


def _owner_name(site: SiteReport) -> str:
    if site.owner is None:
        return "none: the layer evaluates itself"
    return site.owner or "the model itself"


def _groups(report: Report) -> str:
    groups: dict[str, list[SiteReport]] = {}
    depth = _depth(report)
    for site in report.sites:
        groups.setdefault(_prefix(site, depth), []).append(site)
    return "".join(
        f'<div class="group"><div class="bars">{"".join(map(_bar, sites))}</div>'
        f"<small>{escape(name)} <em>{len(sites)}</em></small></div>"
        for name, sites in groups.items()
    )


def _depth(report: Report) -> int:
    """The deepest level of module names at which a picture has at most _MOST_GROUPS groups."""
    for depth in range(6, 1, -1):
        if len({_prefix(site, depth) for site in report.sites}) <= _MOST_GROUPS:
            return depth
    return 1


_MOST_GROUPS = 24


def _prefix(site: SiteReport, depth: int) -> str:
    parents = site.name.split(".")[:-1]
    return ".".join(parents[:depth]) or "the model itself"


def _bar(site: SiteReport) -> str:
    """A bar whose height grows with the logarithm of the channels."""
    channels = site.num_channels or 1
    height = min(64, 6 + 5 * channels.bit_length())
    floor = " floor" if site.owner is None else ""
    label = f"{site.name}: {site.mode}, {site.num_channels or 'unknown number of'} channels"
    return (
        f'<div class="bar {escape(site.mode)}{floor}" style="height:{height}px" '
        f'title="{escape(label)}"></div>'
    )


def _legend(report: Report) -> str:
    modes = sorted({site.mode for site in report.sites})
    entries = "".join(
        f'<i style="background:var(--{escape(mode)})"></i>{escape(mode)}' for mode in modes
    )
    return (
        '<p class="legend">One bar per site; the height grows with the channels; a dashed bar is '
        f"evaluated outside any captured graph.{entries}</p>"
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
