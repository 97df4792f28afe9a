"""The README prover: it runs what is marked, in order, and a promise that does not hold has a place."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tools import prove_readme

PAGE = """\
```sh
exit 1
```
```sh run
echo one > order; command -v python > where
```
1. in a list
   ~~~python run timeout=30
   from pathlib import Path
   Path("order").write_text(Path("order").read_text() + "two")
   ~~~
````text
```sh run
exit 1
```
````
"""


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty repository, current."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_runs_the_marked_blocks_in_order(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (root / "README.md").write_text(PAGE)
    assert prove_readme.main([]) == 0
    assert (root / "order").read_text() == "one\ntwo"
    assert Path((root / "where").read_text().strip()).parent == prove_readme.BIN
    out = capfd.readouterr().out
    assert "== README.md:4 (sh)" in out
    assert "README.md:8: exit 0 after" in out
    assert "2 block(s) of 1 page(s)" in out


@pytest.mark.parametrize(
    ("page", "why"),
    [
        ("\n```sh run\ntrue\nfalse\necho no\n```\n", "README.md:2: exit 1"),
        ("```sh run\necho $unset_variable\n```\n", "README.md:1: exit"),
        ("```python run\nraise SystemExit(7)\n```\n", "README.md:1: exit 7"),
        ("```ruby run\n```\n", "README.md:1: 'ruby run' is neither"),
        ("```sh run timeout=soon\n```\n", "README.md:1: 'sh run timeout=soon' is neither"),
        ("```sh run\ntrue\n", "README.md:1: this block is never closed"),
    ],
)
def test_a_broken_promise_has_a_place(
    root: Path, page: str, why: str, capfd: pytest.CaptureFixture[str]
) -> None:
    (root / "README.md").write_text(page + "```sh run\ntouch later\n```\n" if "closed" not in why else page)
    assert prove_readme.main([]) == 1
    assert why in capfd.readouterr().err
    assert not (root / "later").exists()


def test_pages_that_promise_nothing_prove_nothing(root: Path) -> None:
    (root / "README.md").write_text("```sh\ntrue\n```\n")
    assert prove_readme.main([]) == 1


def test_a_timeout_ends_what_the_block_started(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (root / "README.md").write_text("```sh run timeout=1\nsleep 60 & echo $! > child\nwait\n```\n")
    started = time.monotonic()
    assert prove_readme.main([]) == 1
    assert time.monotonic() - started < 20
    assert "README.md:1: took more than 1 s" in capfd.readouterr().err
    child = int((root / "child").read_text())
    for _ in range(50):
        # Killed but perhaps not reaped yet, where no init does that.
        stat = Path(f"/proc/{child}/stat")
        if not stat.exists() or stat.read_text().split()[2] == "Z":
            break
        time.sleep(0.1)
    else:
        os.kill(child, 9)
        pytest.fail("the block's child outlived it")


def test_every_page_is_read_in_order(root: Path) -> None:
    for name in ("docs/b.md", "docs/a/c.md", "CONTRIBUTING.md", "README.md", "other.md"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("")
    assert [p.as_posix() for p in prove_readme.pages(root)] == [
        "README.md",
        "CONTRIBUTING.md",
        "docs/a/c.md",
        "docs/b.md",
    ]
