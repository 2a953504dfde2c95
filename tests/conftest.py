"""Settings that every test shares: no hub, no network, no cache of splits, the same random examples in every run."""

from __future__ import annotations

import os

from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["LORICA_CACHE"] = "off"
settings.register_profile("lorica", deadline=None, derandomize=True, max_examples=30)
settings.load_profile("lorica")
