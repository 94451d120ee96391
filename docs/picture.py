"""Makes README's picture, the top of `tl-contextmix report`, with the Chromium of the system.

``python docs/picture.py`` writes docs/images/report.png.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

from tl_contextmix.report import write_report

PICTURE = Path(__file__).parent / "images" / "report.png"


def main() -> None:
    """Writes the report to a temporary folder and photographs its top."""
    browser = shutil.which("chromium")
    if browser is None:
        raise SystemExit("no chromium on the path: install it, for example as a system package")
    with tempfile.TemporaryDirectory() as folder:
        page = write_report(path=Path(folder) / "report.html")
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        options += ["--window-size=1280,1330", "--virtual-time-budget=8000"]
        shot = f"--screenshot={PICTURE}"
        subprocess.run([browser, *options, shot, page.as_uri()], check=True)


if __name__ == "__main__":
    main()
