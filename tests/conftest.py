"""Settings that every test shares: no hub, no network, the same random examples in every run."""

from __future__ import annotations

import os

from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"
settings.register_profile("lorica", deadline=None, derandomize=True, max_examples=30)
settings.load_profile("lorica")
