"""A layout is one file, or one entry point of another package."""

import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from medsight.data import registry
from medsight.data.registry import Entry, Layout, Source, find_layout, layout_names, register
from medsight.data.sources import detect_layout, kind_of, load_source


LINES = """
from medsight.data.registry import Entry, Layout
from medsight.data.schema import conversation_row

def rows(shard, source):
    for number, line in enumerate(open(shard), 1):
        place = f"{shard}, line {number}"
        messages = [{"role": "user", "content": line.strip()}, {"role": "assistant", "content": "Yes."}]
        yield Entry(place, conversation_row(place, [], messages, "train"))

lines = Layout(
    "lines", "conversations", lambda source: source.files((".lines",)), rows, lambda path, _: path.suffix == ".lines"
)
other = "no layout"
"""


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An installed package that brings two entry points, one of them broken; and a file in its layout."""
    (tmp_path / "their_layouts.py").write_text(LINES, encoding="utf-8")
    (tmp_path / "asked.lines").write_text("Is it big?\nIs it small?\n", encoding="utf-8")
    layout_names()  # registers the shipped ones, before the registry is copied
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "LAYOUTS", registry.LAYOUTS.copy())
    points = [EntryPoint(name, f"their_layouts:{name}", registry.ENTRY_POINTS) for name in ("lines", "other", "gone")]
    monkeypatch.setattr(registry, "entry_points", lambda group: points if group == "medsight.layouts" else [])
    yield tmp_path
    sys.modules.pop("their_layouts", None)


def test_another_package_brings_a_layout_by_an_entry_point(plugins: Path) -> None:
    source = Source("lines", str(plugins / "asked.lines"))
    assert kind_of(source) == "conversations"
    rows = load_source(source)
    assert [messages[0]["content"] for messages in rows["messages"]] == ["Is it big?", "Is it small?"]
    assert list(load_source(source, streaming=True)) == list(rows)
    with pytest.raises(ValueError, match="'line' is unknown: did you mean 'lines'"):
        Source("line", "a")


def test_an_entry_point_to_something_else_is_named(plugins: Path) -> None:
    with pytest.raises(ValueError, match="other = their_layouts:other: expected a Layout"):
        find_layout("other")
    with pytest.raises(ValueError, match="gone = their_layouts:gone: expected a Layout"):
        find_layout("gone")


def test_the_files_of_a_layout_from_elsewhere_are_recognised(plugins: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_layout("lines")
    monkeypatch.setattr(registry, "entry_points", lambda group: [])
    assert detect_layout(plugins / "asked.lines") == "lines"


def test_every_module_of_the_folder_is_registered_by_itself() -> None:
    folder = Path(registry.__file__).with_name("layouts")
    readers = {Path(str(sys.modules[find_layout(name).rows.__module__].__file__)) for name in layout_names()}
    assert readers == set(folder.glob("*.py")) - {folder / "__init__.py"}


def test_a_name_is_given_once() -> None:
    def rows(shard: str, source: Source) -> Iterator[Entry]:
        raise NotImplementedError

    with pytest.raises(ValueError, match="'llava' is registered already"):
        register(Layout("llava", "conversations", lambda source: [], rows))
