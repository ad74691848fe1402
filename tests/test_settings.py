"""Environment variables: dumps, disabled passes, logs."""

import json
import logging
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import nn

import bnrewrite
from bnrewrite.report_page import to_html


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())


def test_dump_writes_the_graph_before_and_after_each_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BNREWRITE_DUMP", str(tmp_path / "graphs"))
    bnrewrite.convert(net())
    files = sorted((tmp_path / "graphs").rglob("*.py"))
    assert [file.name for file in files] == [
        "00_captured.py",
        "01_replace_batch_norm.py",
        "02_inline_children.py",
        "03_share_collectives.py",
        "04_overlap_collectives.py",
        "05_fuse_epilogue.py",
        "06_overlap_backward.py",
    ]
    assert "torch.ops.bnrewrite" not in files[0].read_text()
    assert "torch.ops.bnrewrite.batch_norm" in files[1].read_text()


def test_dump_into_a_file_is_an_error_and_converts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BNREWRITE_DUMP", str(tmp_path / "file"))
    model = net()
    with pytest.raises(ValueError, match=r"BNREWRITE_DUMP=.*file cannot become a directory"):
        bnrewrite.convert(model)
    assert type(model[1]) is nn.BatchNorm2d


def test_disabling_an_unknown_pass_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BNREWRITE_DISABLE", "fuse_everything")
    with pytest.raises(ValueError, match="BNREWRITE_DISABLE names 'fuse_everything'"):
        bnrewrite.convert(net())


def test_logs_one_line_per_conversion_and_one_per_pass(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="bnrewrite"):
        bnrewrite.convert(net())
    levels = [(record.levelname, record.name) for record in caplog.records]
    assert levels == [("DEBUG", "bnrewrite.passes")] * 6 + [("INFO", "bnrewrite.convert")]
    assert [record.args[0] for record in caplog.records[:6]] == [  # pyright: ignore
        "replace_batch_norm",
        "inline_children",
        "share_collectives",
        "overlap_collectives",
        "fuse_epilogue",
        "overlap_backward",
    ]
    assert "1 BatchNorm modules, 1 sites in graphs" in caplog.text


class _Parser(HTMLParser):
    """Collects open elements and everything that would load something from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "i"):
            self.open.append(tag)
        self.loads += [str(value) for name, value in attrs if name in ("src", "href", "onclick")]

    def handle_endtag(self, tag: str) -> None:
        if tag != "i":
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_self_contained_and_escapes_names() -> None:
    model = nn.ModuleDict({"<script>alert(1)</script>": net(), "b": nn.BatchNorm1d(3)})
    page = to_html(bnrewrite.report(bnrewrite.convert(model)))
    assert "<script" not in page
    parser = _Parser()
    parser.feed(page)
    assert parser.open == []
    assert parser.loads == []
    assert "<script>alert(1)</script>.1" in parser.text
    assert not re.search(r"url\(|@import", page)


def test_the_report_is_plain_data() -> None:
    report = bnrewrite.report(bnrewrite.convert(net(), mode={"1": "local"}))
    data = json.loads(json.dumps(report.to_dict()))
    assert data["sites"][0]["mode"] == "local"
    assert data["collectives_forward"] == 0
    assert "1 BatchNorm site, 1 in captured graphs" in str(report)
    with pytest.raises(ValueError, match="is not converted"):
        bnrewrite.report(net())
    with pytest.raises(TypeError, match="must be a torch"):
        bnrewrite.report(torch.zeros(1))  # pyright: ignore
