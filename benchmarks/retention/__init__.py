"""Test beds for what a model keeps: invented facts and small skills, and models that know them by heart."""
