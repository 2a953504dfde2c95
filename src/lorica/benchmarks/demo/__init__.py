"""The demo's stream: five weeks in a small company, and what the model knew before them.

``stream.yaml`` defines it, the ``*.jsonl`` files beside it are its rows. ``language`` and ``tasks`` make the
rows from a seed; ``scripts/make_demo_model.py`` writes them and trains the model that knows the rest.
"""
