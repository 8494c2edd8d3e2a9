"""What the README shows is what the committed runs say."""

import shutil
import subprocess
from pathlib import Path

import pytest

from archbench.errors import RecordError
from archbench.report.readme import fill, main

ROOT = Path(__file__).resolve().parents[1]


def test_the_readme_is_up_to_date_with_the_committed_runs(tmp_path):
    """If this fails: `make readme`. What was run here since and is not committed does not count."""
    listed = subprocess.run(["git", "ls-files", "-z", "results"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip(f"not a checkout: {listed.stderr.strip()}")
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).exists() and name.endswith(".jsonl"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
    text = (ROOT / "README.md").read_text()
    assert fill(text, tmp_path) == text


def test_the_readme_links_to_files_that_are_there():
    for line in (ROOT / "README.md").read_text().splitlines():
        if line.startswith("!["):
            assert (ROOT / line.split("](")[1].rstrip(")")).is_file(), line


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing here", "lacks markers"),
        ("<!-- quality results/quick: begin -->", "lacks '<!-- quality results/quick: end -->'"),
        ("<!-- qality x: begin --><!-- qality x: end -->", "qality x: no such part; did you mean 'quality'"),
        ("<!-- quality gone: begin --><!-- quality gone: end -->", "gone: no such file or folder"),
    ],
)
def test_a_readme_that_cannot_be_filled_is_refused(text, message):
    with pytest.raises(RecordError, match=message):
        fill(text, ROOT)


def test_a_stale_part_is_told_and_mended(tmp_path, capsys):
    shutil.copytree(ROOT / "results/paper_costs", tmp_path / "results/paper_costs")
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- costs results/paper_costs: begin -->\nstale\n<!-- costs results/paper_costs: end -->\nb")
    assert main([str(readme), "--check"]) == 1 and "make readme" in capsys.readouterr().err
    assert main([str(readme)]) == 0
    assert main([str(readme), "--check"]) == 0
    text = readme.read_text()
    assert "configurations were counted" in text and text.startswith("a\n") and text.endswith("\nb")
