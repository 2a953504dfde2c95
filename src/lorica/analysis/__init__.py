"""What a model's own singular directions do: measured before anybody decides what to protect."""
