"""The documentation: its code runs, its generated parts are whole, and the site builds without a warning."""

import doctest
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from weft.cli import app
from weft.structures import families

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(page.name for page in (ROOT / "docs").glob("*.md"))
CODE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def code_of(page: str) -> list[str]:
    """The Python blocks of a page."""
    return CODE.findall((ROOT / "docs" / page).read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", [page for page in PAGES if code_of(page)])
def test_the_code_of_a_page_does_what_it_says(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {"__name__": "page"}
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    for number, block in enumerate(code_of(page)):
        if ">>>" not in block:
            sys.modules.setdefault("page", sys.modules[__name__])  # dataclasses look their module up
            exec(compile(block, f"{page}, block {number}", "exec"), names)
            continue
        test = doctest.DocTestParser().get_doctest(block, names, f"{page}, block {number}", page, 0)
        assert test.examples
        runner.run(test, clear_globs=False)
        names.update(test.globs)
    assert runner.summarize(verbose=False).failed == 0, capsys.readouterr().out


def test_readme_and_quick_start_use_names_that_are_there() -> None:
    import weft

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    used = set(re.findall(r"\bweft\.(\w+)\(", text))
    assert {"survey", "allocate", "compress", "measure"} <= used
    assert [name for name in used if not hasattr(weft, name)] == []


@pytest.fixture(name="site", scope="module")
def _site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install 'weft[docs]'")
    pytest.importorskip("mkdocstrings", reason="mkdocstrings is not installed: pip install 'weft[docs]'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    settings = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.strip()) == (0, ""), done.stderr
    return folder


def test_the_site_holds_every_family_verb_and_public_name(site: Path) -> None:
    import weft

    pages = {page.stem: page.read_text(encoding="utf-8") for page in site.glob("*.html")}
    for name, family in families().items():
        assert f">{name}</code></a>" in pages["families"]
        assert f'id="{family.__module__}.{family.__qualname__}"' in pages["families"]  # where the link leads
    verbs = [command.name for command in app.registered_commands]
    assert len(verbs) > 8
    for verb in verbs:
        assert re.search(rf"<h2 id=\"weft-{verb}\">weft {verb}<", pages["command_line"])
    assert "--budget" in pages["command_line"]
    for name in weft.__all__:
        value = getattr(weft, name)
        assert f'id="{value.__module__}.{value.__qualname__}"' in pages["api"]
    for page in pages.values():
        assert "generated:" not in page


def test_the_site_asks_for_nothing_from_elsewhere(site: Path) -> None:
    loaded = re.compile(
        r"<(?:script|img|iframe)[^>]*\ssrc=\"(https?:[^\"]*)|<link[^>]*stylesheet[^>]*\"(https?:[^\"]*)"
    )
    for page in site.glob("*.html"):
        assert loaded.findall(page.read_text(encoding="utf-8")) == []
