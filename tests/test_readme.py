"""What the README shows is what the committed run says."""

from pathlib import Path

import pytest

from archbench.errors import RecordError
from archbench.report.readme import excerpt, update

ROOT = Path(__file__).resolve().parents[1]


def test_the_readme_is_up_to_date_with_the_committed_run():
    """If this fails: `make readme`."""
    assert excerpt(ROOT / "results/quick", ROOT) in (ROOT / "README.md").read_text()


def test_the_readme_links_to_files_that_are_there():
    for line in (ROOT / "README.md").read_text().splitlines():
        if line.startswith("!["):
            assert (ROOT / line.split("](")[1].rstrip(")")).is_file(), line


def test_a_readme_without_markers_is_refused(tmp_path):
    (tmp_path / "README.md").write_text("nothing here")
    with pytest.raises(RecordError, match="lacks the markers"):
        update(tmp_path / "README.md", ROOT / "results/quick")
