"""What an update of a production model must survive: see docs/reliability.md, whose rows these tests carry."""
