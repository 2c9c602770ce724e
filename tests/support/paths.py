"""Where tests find the project, its assets, and the shared inputs that are not part of it."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
ASSETS = Path(__file__).parents[1] / "assets"
SHARED = ROOT.parent / "shared"  # may be missing: tests that read it skip with a reason
