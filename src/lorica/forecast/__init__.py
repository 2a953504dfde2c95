"""What a run will need, told before it starts: memory by kind, disk, and time."""
