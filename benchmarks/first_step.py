"""shardlab from a command to its first step on the benchmark's model, one device, nothing compiled kept from before."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from experiments import assemble, cli

DATA = assemble.CACHE / "data"
OVERRIDES = (
    "--mesh.data 1 --mesh.fsdp 1 --mesh.tensor 1 --devices.count 1 --steps 1 --sample.tokens 0".split()
)


def main() -> int:
    """Run `shardlab train` on one device with an empty compilation cache."""
    quickstart = Path(__file__).resolve().parent.parent / "configs" / "quickstart.py"
    with tempfile.TemporaryDirectory() as folder:
        assemble.CACHE = Path(folder)
        return cli.main(["train", str(quickstart), *OVERRIDES, "--rules", "data", "--runs", folder])


if __name__ == "__main__":
    sys.exit(main())
