"""nox in this folder is nox at the root of the repository with this package named: `nox -s tests -- -k decode`."""

import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
options = sys.argv[1 : sys.argv.index("--")] if "--" in sys.argv else sys.argv[1:]
arguments = sys.argv[sys.argv.index("--") + 1 :] if "--" in sys.argv else []
noxfile = str(FOLDER.parent / "noxfile.py")
sys.exit(subprocess.call([sys.executable, "-m", "nox", *options, "--noxfile", noxfile, "--", FOLDER.name, *arguments]))
