"""The site as it would be: every page listed, every link and anchor alive, words for pictures, HTML from every notebook."""
from pathlib import Path

from actloc.app.site_check import broken_links, check_site

ROOT = Path(__file__).parents[1]


def test_the_site_is_whole():
    assert check_site(ROOT) == {}


def test_a_lost_anchor_is_seen(tmp_path):
    (tmp_path / "a.md").write_text("[to](b.md#here) [lost](b.md#there) [gone](c.md) [inside](#me)\n\n# Me\n")
    (tmp_path / "b.md").write_text("# Here\n")
    assert [s.split()[2] for s in broken_links(tmp_path / "a.md", tmp_path)] == ["b.md#there", "c.md"]


def test_pages_of_the_site_link_to_the_repository_where_they_leave_it(tmp_path):
    from nbformat import v4, read, write
    from types import SimpleNamespace
    from actloc.app.site import link_to_repository
    (tmp_path / "learn").mkdir()
    write(v4.new_notebook(cells=[v4.new_markdown_cell("[r](../../results/README.md#how) [n](../core/10.ipynb) [w](https://a.b)")]), tmp_path / "learn/x.ipynb")
    link_to_repository(tmp_path / "learn/x.ipynb", tmp_path, SimpleNamespace(git_url="https://host/actloc", branch="main"))
    assert read(tmp_path / "learn/x.ipynb", 4).cells[0].source == "[r](https://host/actloc/blob/main/results/README.md#how) [n](../core/10.ipynb) [w](https://a.b)"
