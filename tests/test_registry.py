"""Names find files; what a checkpoint was trained by is all of them."""

import pytest

from archbench import registry
from archbench.errors import ConfigError

ARCHITECTURES = [
    "calm", "infini_attention", "local", "mamba", "mamba2", "memorizing_transformer", "mtp", "ngram", "transformer",
    "transformer_xl",
]  # fmt: skip


def test_every_architecture_of_ours_is_found_by_its_file():
    assert set(ARCHITECTURES) <= set(registry.architectures())
    for name in ARCHITECTURES:
        assert registry.architecture(name).paper


def test_source_files_are_the_package_and_what_it_builds_on():
    names = {path.name for path in registry.source_files("mtp")}
    assert {"model.py", "loss.py", "transformer.py"} <= names
    assert {path.name for path in registry.source_files("mamba")} == {"mamba.py"}


def test_a_file_is_an_architecture_by_its_path(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("from archbench.architectures.mamba import ARCHITECTURE\n")
    assert registry.architecture(str(path)).paper == registry.architecture("mamba").paper
    assert registry.label(str(path)) == "mine"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n", "cannot be imported"),
        ("import nothing_of_that_name\n", "No module named 'nothing_of_that_name'"),
        ("def broken(:\n", "SyntaxError"),
    ],
)
def test_a_file_that_does_not_work_says_why(tmp_path, text, message):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        registry.architecture(str(path))
